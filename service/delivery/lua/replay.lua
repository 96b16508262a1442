#!lua
-- Replay entries to one handler: append copies of them to its stream of replays, which its worker
-- reads beside the new entries. Dead letters are deleted in the same step.
--
-- Of the history only what the group has acknowledged is copied. The handler gets the rest anyway,
-- and a copy that came before it would make a consumer that skips lower sequence numbers skip it.
--
-- KEYS  1  the entries' stream; 2  the handler's replays
-- ARGV  1  group; 2  the replay's name; 3  'move' for dead letters, 'copy' for history, 'count' to
--       count what would be copied; 4  names of the fields to copy, separated by spaces
--       5..  entry ids
-- Returns {entries replayed, entries left out because they are not acknowledged}. Entries that were
-- deleted, or are not ours, are in neither number.

local source, replays, group, are_dead = KEYS[1], KEYS[2], ARGV[1], ARGV[3] == 'move'

local function last_read_id()
  for _, fields in ipairs(redis.call('XINFO', 'GROUPS', source)) do
    local found = {}
    for i = 1, #fields, 2 do found[fields[i]] = fields[i + 1] end
    if found['name'] == group then return found['last-delivered-id'] end
  end
end

local function is_after(id, other)
  local ms, number = id:match('^(%d+)-(%d+)$')
  local other_ms, other_number = other:match('^(%d+)-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms > other_ms or ms == other_ms and tonumber(number) > tonumber(other_number)
end

-- Return the fields to copy of an entry and their values, nothing when one of them is missing.
local function fields_to_copy(id)
  local entry = redis.call('XRANGE', source, id, id)[1]
  local found, copied = {}, {}
  for n = 1, entry and #entry[2] or 0, 2 do found[entry[2][n]] = entry[2][n + 1] end
  for name in ARGV[4]:gmatch('%S+') do
    if not found[name] then return nil end
    copied[#copied + 1] = name
    copied[#copied + 1] = found[name]
  end
  return copied
end

local function copy(id, fields)
  if redis.call('EXISTS', replays) == 0 then
    redis.call('XGROUP', 'CREATE', replays, group, '0', 'MKSTREAM')
  end
  redis.call('XADD', replays, '*', 'replay', ARGV[2], unpack(fields))
  if are_dead then redis.call('XDEL', source, id) end
end

local last_read = not are_dead and redis.call('EXISTS', source) == 1 and last_read_id()
if not (are_dead or last_read) then return redis.error_reply('NOGROUP the handler has no group') end

local function is_acknowledged(id)
  if are_dead then return true end
  return not is_after(id, last_read) and #redis.call('XPENDING', source, group, id, id, 1) == 0
end

local replayed, left_out = 0, 0
for i = 5, #ARGV do
  local fields = fields_to_copy(ARGV[i])
  if fields then
    if is_acknowledged(ARGV[i]) then
      if ARGV[3] ~= 'count' then copy(ARGV[i], fields) end
      replayed = replayed + 1
    else
      left_out = left_out + 1
    end
  end
end
return {replayed, left_out}
