#!lua flags=allow-oom
-- Delete dead letters that are too old, the oldest first, a bounded number of them. A letter's id
-- says when it came there by this server's clock: where that differs from the caller's, nothing is
-- deleted, for it may have been put forward.
--
-- KEYS  1  a handler's dead letters in one partition
-- ARGV  1  the caller's clock, Unix seconds; 2  seconds by which the clocks may differ
--       3  seconds every letter is kept; 4  most letters to delete
-- Returns {letters deleted, Unix milliseconds of the oldest that is left or 0 for none}.

local function oldest(count, last)
  return redis.call('XRANGE', KEYS[1], '-', last, 'COUNT', count)
end

local deleted = 0
if math.abs(redis.call('TIME')[1] - ARGV[1]) <= tonumber(ARGV[2]) then
  local last = string.format('%.0f', math.max(0, (ARGV[1] - ARGV[3]) * 1000))
  local ids = {}
  for n, letter in ipairs(oldest(ARGV[4], last)) do ids[n] = letter[1] end
  if #ids > 0 then deleted = redis.call('XDEL', KEYS[1], unpack(ids)) end
end
local left = oldest(1, '+')[1]
return {deleted, left and tonumber(left[1]:match('^%d+')) or 0}
