#!lua flags=no-writes
-- Count a handler's living workers. Reads only. What is later than now was said before the server's
-- clock stepped back: the living say it again within a turn.
--
-- KEYS  1  the handler's workers (sorted set by last sign of life)
-- ARGV  1  milliseconds for which a sign of life counts
-- Returns their number.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
return redis.call('ZCOUNT', KEYS[1], string.format('%.0f', now_ms - ARGV[1]),
  string.format('%.0f', now_ms))
