#!lua flags=no-writes
-- Return the names of the groups of a partition's stream; none when there is no stream. Reads only.
--
-- KEYS  1  the stream
-- ARGV  none
-- Returns the names.

local names = {}
if redis.call('EXISTS', KEYS[1]) == 0 then return names end
for n, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do names[n] = group[2] end
return names
