#!lua flags=no-writes
-- Read what the processes have published.
--
-- KEYS  1  the processes (hash); 2  the latest reversals (stream); 3  what the reconciling worker
--       has seen (string); 4..  hashes of counts
-- ARGV  1  most reversals to return
-- Returns {milliseconds of the server's clock, processes, reversals, what was seen or false, then
-- each hash of counts}.

local time = redis.call('TIME')
local found = {
  time[1] * 1000 + math.floor(time[2] / 1000),
  redis.call('HGETALL', KEYS[1]),
  redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', ARGV[1]),
  redis.call('GET', KEYS[3]),
}
for i = 4, #KEYS do found[i + 1] = redis.call('HGETALL', KEYS[i]) end
return found
