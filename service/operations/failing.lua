#!lua flags=no-writes
-- Counts the pending entries of one group that have failed and will be retried, among its oldest.
-- Reads only.
--
-- KEYS  1  the handler's stream of the partition
-- ARGV  1  group; 2  the delivery count of one failure; 3  most entries to look at
-- Returns how many.

local failing = 0
if redis.call('EXISTS', KEYS[1]) == 0 then return failing end
for _, entry in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[3])) do
  if entry[4] >= tonumber(ARGV[2]) then failing = failing + 1 end
end
return failing
