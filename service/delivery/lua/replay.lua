#!lua
-- Put copies of entries onto a handler's replays, where its worker takes them like new mail. In
-- the same step they leave the stream they are in, when that is one of dead letters.
--
-- Of the past only what the group has settled is copied. What is pending or unread comes anyway;
-- a copy that overtook it would make a consumer that ignores lower sequence numbers skip it.
--
-- KEYS  1  where the entries are; 2  the handler's replays
-- ARGV  1  group; 2  the replay's name; 3  'move' for dead letters, 'copy' for the past, 'count' to
--       say what would be copied; 4..  entry ids
-- Returns {entries put there, entries left out because the group has not settled them}; those
-- that are gone, or not ours, are passed over.

local source, replays, group, are_dead = KEYS[1], KEYS[2], ARGV[1], ARGV[3] == 'move'

local function last_read()
  for _, found in ipairs(redis.call('XINFO', 'GROUPS', source)) do
    local described = {}
    for i = 1, #found, 2 do described[found[i]] = found[i + 1] end
    if described['name'] == group then return described['last-delivered-id'] end
  end
end

local function is_after(id, other)
  local ms, number = id:match('^(%d+)-(%d+)$')
  local other_ms, other_number = other:match('^(%d+)-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms > other_ms or ms == other_ms and tonumber(number) > tonumber(other_number)
end

local function copy(id, fields)
  if redis.call('EXISTS', replays) == 0 then
    redis.call('XGROUP', 'CREATE', replays, group, '0', 'MKSTREAM')
  end
  redis.call('XADD', replays, '*', 'change', fields['change'], 'previous', fields['previous'],
    'sequence', fields['sequence'], 'epoch', fields['epoch'], 'replay', ARGV[2])
  if are_dead then redis.call('XDEL', source, id) end
end

local read_to = not are_dead and redis.call('EXISTS', source) == 1 and last_read()
if not (are_dead or read_to) then return redis.error_reply('NOGROUP the handler has no group') end

local function is_settled(id)
  if are_dead then return true end
  return not is_after(id, read_to) and #redis.call('XPENDING', source, group, id, id, 1) == 0
end

local put, left_out = 0, 0
for i = 4, #ARGV do
  local entry = redis.call('XRANGE', source, ARGV[i], ARGV[i])[1]
  local fields = {}
  for n = 1, entry and #entry[2] or 0, 2 do fields[entry[2][n]] = entry[2][n + 1] end
  if fields['change'] and fields['previous'] and fields['sequence'] and fields['epoch'] then
    if is_settled(ARGV[i]) then
      if ARGV[3] ~= 'count' then copy(ARGV[i], fields) end
      put = put + 1
    else
      left_out = left_out + 1
    end
  end
end
return {put, left_out}
