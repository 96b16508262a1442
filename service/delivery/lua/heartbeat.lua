#!lua flags=allow-oom
-- Record a worker's heartbeat for one handler, and drop workers that have been silent too long.
--
-- All times are the server's, so workers need not agree on a clock. Heartbeats later than now date
-- from before that clock stepped back; live workers send another one within a second.
--
-- KEYS  1  the handler's workers (sorted set by last heartbeat)
-- ARGV  1  worker; 2  time to live in milliseconds, or 0 to remove the worker
-- Returns the live workers, each followed by the time of its last heartbeat.

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
