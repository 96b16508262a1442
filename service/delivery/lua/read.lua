#!lua flags=allow-oom
-- Read new entries for one handler, while the lease is ours. A plain read by a worker that was
-- paused past its lease would hide the entries from the lease's new owner.
--
-- KEYS  1  the lease; 2  the partition's stream; 3  the handler's replays
-- ARGV  1  token; 2  group; 3  consumer; 4  most entries
-- Returns false when the lease is not ours, else {replays, new entries, last ids}. Each entry is
-- {id, fields}. Where there are no entries, the last id that the group has read of the stream and of
-- the replays.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end

local function last_read_id(stream)
  if redis.call('EXISTS', stream) == 0 then return '0-0' end
  for _, fields in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = {}
    for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
    if group['name'] == ARGV[2] then return group['last-delivered-id'] end
  end
  return '0-0'
end

local function read(stream, max_entries)
  local found = redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', max_entries,
    'STREAMS', stream, '>')
  return found and found[1][2] or {}
end

local max_entries, replays, new = tonumber(ARGV[4]), {}, {}
-- Up to half of a read is for replays, so that neither kind waits for the other to end.
if redis.call('EXISTS', KEYS[3]) == 1 then replays = read(KEYS[3], math.ceil(max_entries / 2)) end
if max_entries > #replays then new = read(KEYS[2], max_entries - #replays) end
if #replays + #new > 0 then return {replays, new, {}} end
return {replays, new, {last_read_id(KEYS[2]), last_read_id(KEYS[3])}}
