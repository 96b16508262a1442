#!lua flags=no-writes
-- Say whether a handler's circuit is open. Reads only.
--
-- KEYS  1  the key that exists while it is
-- ARGV  none
-- Returns 1 or 0.

return redis.call('EXISTS', KEYS[1])
