#!lua flags=allow-oom
-- Move an entry to the handler's dead letters, in one step, while the lease is ours. Note it as a
-- finished attempt, with the id of the dead letter, if it can be.
--
-- The dead letter has the entry's fields and the reason. Where the entry was deleted from its
-- stream, or has more fields than one call can take (none of ours has), its id is all that is kept.
--
-- KEYS  1  the lease; 2  the entry's stream; 3  the handler's finished attempts; 4  its dead letters
-- ARGV  1  token; 2  group; 3  1 to delete the entry; 4  most dead letters
--       5  entry id; 6  reason; 7  error class; 8  where that was raised; 9  attempts
--       10  its event's id or '' to note nothing; 11  1 for a replay; 12  most finished attempts
-- Returns false when the lease is not ours, else the number of dead letters, or 0 when there are
-- too many for another one and the entry is still pending.

local MAX_FIELDS = 1000

local function note(letter)
  local word = ARGV[7] ~= '' and ARGV[7] or ARGV[6]
  local replay = ARGV[11] == '1' and {'replay', '1'} or {}
  redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[12], '*', 'event', ARGV[10],
    'outcome', 'dead_lettered', 'attempt', ARGV[9], 'error', word, 'place', ARGV[8],
    'letter', letter, unpack(replay))
end

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
if redis.call('XLEN', KEYS[4]) >= tonumber(ARGV[4]) then return 0 end
local id = ARGV[5]
local entry = redis.call('XRANGE', KEYS[2], id, id)[1]
local fields = entry and #entry[2] <= 2 * MAX_FIELDS and entry[2] or {}
for i, name in ipairs({'entry_id', 'reason', 'error', 'place', 'attempts'}) do
  fields[#fields + 1] = name
  fields[#fields + 1] = ARGV[4 + i]
end
-- A call that is repeated because its reply was lost must not make a second dead letter. If none can
-- be made, the entry stays pending.
if redis.call('XPENDING', KEYS[2], ARGV[2], id, id, 1)[1] then
  local letter = redis.call('XADD', KEYS[4], '*', unpack(fields))
  redis.call('XACK', KEYS[2], ARGV[2], id)
  if ARGV[10] ~= '' then note(letter) end
end
if ARGV[3] == '1' then redis.call('XDEL', KEYS[2], id) end
-- Never 0, which means that there are too many: an operator may have dropped them all meanwhile.
return math.max(1, redis.call('XLEN', KEYS[4]))
