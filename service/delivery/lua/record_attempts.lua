#!lua flags=allow-oom
-- Set the delivery counts of pending entries, while the lease is ours: the pending list keeps them
-- when the worker dies. What a count holds is said in consumer.py.
--
-- KEYS  1  the lease; 2  the entries' stream
-- ARGV  1  token; 2  group; 3  consumer; then for each entry its id and its count
-- Returns false when the lease is not ours, else 1.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
for i = 4, #ARGV, 2 do
  redis.call('XCLAIM', KEYS[2], ARGV[2], ARGV[3], 0, ARGV[i], 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
end
return 1
