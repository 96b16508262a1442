#!lua flags=no-writes
-- Read the latest finished attempts of one handler in one partition. Reads only.
--
-- KEYS  1  the handler's stream of finished attempts
-- ARGV  1  how many
-- Returns its last entries, the newest first, as XREVRANGE does.

return redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', ARGV[1])
