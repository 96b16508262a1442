#!lua flags=no-writes
-- Read entries by their ids, while the lease is ours.
--
-- KEYS  1  the lease; 2  the entries' stream
-- ARGV  1  token; 2..  entry ids
-- Returns false when the lease is not ours, else for each id the entry's fields, or false when it
-- was deleted from the stream.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local found = {}
for i = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  found[i - 1] = entry and entry[2] or false
end
return found
