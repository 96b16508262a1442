#!lua flags=no-writes
-- Count the live workers of one handler. Reads only. Heartbeats later than now date from before the
-- server's clock stepped back, and do not count.
--
-- KEYS  1  the handler's workers (sorted set by last heartbeat)
-- ARGV  1  milliseconds for which a heartbeat counts
-- Returns their number.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
return redis.call('ZCOUNT', KEYS[1], string.format('%.0f', now_ms - ARGV[1]),
  string.format('%.0f', now_ms))
