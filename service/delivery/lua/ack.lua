#!lua flags=allow-oom
-- Settle entries a handler has taken, while the lease is ours.
--
-- KEYS  1  the lease; 2  the stream they are in
-- ARGV  1  token; 2  group; 3  1 when they go with it; 4..  entry ids
-- Returns false when the lease is not ours, else the number of entries settled.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
if ARGV[3] == '1' then redis.call('XDEL', KEYS[2], unpack(ARGV, 4)) end
return redis.call('XACK', KEYS[2], ARGV[2], unpack(ARGV, 4))
