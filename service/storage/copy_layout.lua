#!lua flags=allow-oom
-- Copy the layout that has been claimed into one partition.
--
-- KEYS  1      the partition's layout
-- ARGV  1      the layout
-- Returns OK.

return redis.call('SET', KEYS[1], ARGV[1])
