#!lua flags=no-writes
-- Say which events their sessions' records do not know. Reads only.
--
-- KEYS  the record of each event's session
-- ARGV  the id of each event
-- Returns the numbers, from 1, of the events that are not known.

local unknown = {}
for i, session in ipairs(KEYS) do
  if redis.call('HEXISTS', session, ARGV[i]) == 0 then unknown[#unknown + 1] = i end
end
return unknown
