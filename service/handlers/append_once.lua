#!lua
-- Append a message to a stream, unless the guard of the message exists.
--
-- KEYS  1  the stream; 2  the guard, in the same slot
-- ARGV  1  the guard's lifetime in seconds; 2  entries to trim to, 0 for never; 3..  fields and values
-- Returns the entry's id, or false if the guard exists.

if redis.call('EXISTS', KEYS[2]) == 1 then return false end
local id
if ARGV[2] == '0' then
  id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
else
  id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
end
redis.call('SET', KEYS[2], id, 'EX', ARGV[1])
return id
