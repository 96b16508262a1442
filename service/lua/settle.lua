#!lua flags=allow-oom
-- Settle entries a handler has taken, while the lease is ours.
--
-- KEYS  1  the partition's stream of transitions; 2  the lease
-- ARGV  1  token; 2  group; 3..  entry ids
-- Returns false when the lease is not ours, else the number of entries settled.

if redis.call('GET', KEYS[2]) ~= ARGV[1] then return false end
return redis.call('XACK', KEYS[1], ARGV[2], unpack(ARGV, 3))
