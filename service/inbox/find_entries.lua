#!lua flags=no-writes
-- Read entries of a stream by their ids. Reads only.
--
-- KEYS  the stream
-- ARGV  the ids
-- Returns for each id the entry's fields and values, or false where there is no such entry.

local found = {}
for i, id in ipairs(ARGV) do
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  found[i] = entry and entry[2] or false
end
return found
