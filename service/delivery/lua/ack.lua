#!lua flags=allow-oom
-- Acknowledge entries while the lease is ours. Where this group is the only one to read them, they
-- are deleted with it.
--
-- KEYS  1  the lease; 2  the entries' stream
-- ARGV  1  token; 2  group; 3  1 to delete them; 4..  entry ids
-- Returns false when the lease is not ours, else the number of entries that were pending.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
if ARGV[3] == '1' then redis.call('XDEL', KEYS[2], unpack(ARGV, 4)) end
return redis.call('XACK', KEYS[2], ARGV[2], unpack(ARGV, 4))
