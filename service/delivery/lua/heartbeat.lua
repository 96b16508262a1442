#!lua flags=allow-oom
-- Say that a worker is alive, and forget those that are silent. Times are the server's, so workers
-- need not agree on a clock. What is later than now was said before that clock stepped back: the
-- living say it again within a turn.
--
-- KEYS  1  the handler's workers (sorted set by last sign of life)
-- ARGV  1  worker; 2  time to live in milliseconds, or 0 to say goodbye
-- Returns the workers that are alive, each followed by the time of its last sign of life.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl_ms = tonumber(ARGV[2])
if ttl_ms == 0 then
  redis.call('ZREM', KEYS[1], ARGV[1])
  return {}
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', now_ms - ttl_ms))
redis.call('ZREMRANGEBYSCORE', KEYS[1], string.format('(%.0f', now_ms), '+inf')
redis.call('ZADD', KEYS[1], string.format('%.0f', now_ms), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ttl_ms * 2)
return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
