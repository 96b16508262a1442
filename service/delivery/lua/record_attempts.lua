#!lua flags=allow-oom
-- Set the delivery counts of pending entries, while the lease is ours: the pending list keeps them
-- when the worker dies. What a count holds is said in consumer.py. Where a count says that an
-- attempt has failed, that is noted as a finished attempt, if it can be.
--
-- KEYS  1  the lease; 2  the entries' stream; 3  the handler's finished attempts
-- ARGV  1  token; 2  group; 3  consumer; 4  1 for replays; 5  most finished attempts
--       then for each entry its id, its count, its event's id or '' to note nothing, the number of
--       the attempt, error class, where that was raised
-- Returns false when the lease is not ours, else 1.

local stream, group, replay = KEYS[2], ARGV[2], ARGV[4] == '1' and {'replay', '1'} or {}

-- A call that is repeated because its reply was lost finds its own count.
local function is_new(id, count)
  local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
  return pending and pending[4] ~= tonumber(count)
end

local function record(id, count, event, attempt, error_class, place)
  if event ~= '' and is_new(id, count) then
    redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'event', event, 'outcome', 'failed',
      'attempt', attempt, 'error', error_class, 'place', place, unpack(replay))
  end
  redis.call('XCLAIM', stream, group, ARGV[3], 0, id, 'RETRYCOUNT', count, 'JUSTID')
end

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
for i = 6, #ARGV, 6 do record(unpack(ARGV, i, i + 5)) end
return 1
