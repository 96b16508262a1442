#!lua flags=allow-oom
-- Delete dead letters that are too old, the oldest first, a bounded number of them. The id of a
-- dead letter says when it was made, by this server's clock. That clock may have been wrong: while
-- it differs from the caller's, nothing is deleted.
--
-- KEYS  1  a handler's dead letters in one partition
-- ARGV  1  the caller's clock in Unix seconds; 2  seconds by which the clocks may differ
--       3  seconds for which a dead letter is kept; 4  most dead letters to delete
-- Returns {dead letters deleted, Unix milliseconds of the oldest one left or 0 for none}.

local function oldest(count, last_id)
  return redis.call('XRANGE', KEYS[1], '-', last_id, 'COUNT', count)
end

local deleted = 0
if math.abs(redis.call('TIME')[1] - ARGV[1]) <= tonumber(ARGV[2]) then
  local last_id = string.format('%.0f', math.max(0, (ARGV[1] - ARGV[3]) * 1000))
  local ids = {}
  for n, dead_letter in ipairs(oldest(ARGV[4], last_id)) do ids[n] = dead_letter[1] end
  if #ids > 0 then deleted = redis.call('XDEL', KEYS[1], unpack(ids)) end
end
local left = oldest(1, '+')[1]
return {deleted, left and tonumber(left[1]:match('^%d+')) or 0}
