#!lua flags=allow-oom
-- Move an entry to the handler's dead letters and settle it, in one step, while the lease is ours.
-- Of an entry that is gone from the stream only its id is left to bury.
--
-- KEYS  1  the partition's stream of transitions; 2  the lease; 3  the handler's dead letters
-- ARGV  1  token; 2  group; 3  entry id; 4  reason; 5  error class; 6  attempts
-- Returns false when the lease is not ours, else the number of dead letters now held.

if redis.call('GET', KEYS[2]) ~= ARGV[1] then return false end
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
local fields = entry and entry[2] or {}
for _, field in ipairs({'entry_id', ARGV[3], 'reason', ARGV[4], 'error', ARGV[5], 'attempts', ARGV[6]}) do
  fields[#fields + 1] = field
end
-- A call repeated after a lost reply finds it settled, and makes no second letter.
if redis.call('XACK', KEYS[1], ARGV[2], ARGV[3]) == 1 then
  redis.call('XADD', KEYS[3], '*', unpack(fields))
end
return redis.call('XLEN', KEYS[3])
