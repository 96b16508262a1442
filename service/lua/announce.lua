#!lua flags=allow-oom
-- Say that a worker is alive, forget those that are silent, and count the living. Times are the
-- server's, so workers need not agree on a clock.
--
-- KEYS  1  the handler's workers (sorted set by last sign of life)
-- ARGV  1  worker; 2  time to live in milliseconds, or 0 to say goodbye
-- Returns the number of living workers.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl_ms = tonumber(ARGV[2])
if ttl_ms == 0 then return redis.call('ZREM', KEYS[1], ARGV[1]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', now_ms - ttl_ms))
redis.call('ZADD', KEYS[1], string.format('%.0f', now_ms), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ttl_ms * 2)
return redis.call('ZCARD', KEYS[1])
