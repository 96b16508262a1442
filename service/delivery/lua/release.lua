#!lua flags=allow-oom
-- Delete a lease while it is ours.
--
-- KEYS  1  the lease
-- ARGV  1  token
-- Returns 1 when it was ours, else 0.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
