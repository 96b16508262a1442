#!lua flags=allow-oom
-- Keep how often entries were tried where it survives a restart: in the group's pending list.
--
-- KEYS  1  the lease; 2  the stream they are in
-- ARGV  1  token; 2  group; 3  consumer; then two per entry: its id and the count to keep
-- Returns false when the lease is not ours, else 1.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
for i = 4, #ARGV, 2 do
  redis.call('XCLAIM', KEYS[2], ARGV[2], ARGV[3], 0, ARGV[i], 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
end
return 1
