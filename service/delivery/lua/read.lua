#!lua flags=allow-oom
-- Read new entries for one handler, while the lease is ours. Fenced, because a plain read by a
-- worker that was paused past its lease would hide entries from the new owner.
--
-- KEYS  1  the lease; 2  the partition's stream of transitions; 3  the handler's replays
-- ARGV  1  token; 2  group; 3  consumer; 4  most entries
-- Returns false when the lease is not ours, else {replayed entries, new entries, last ids}: entries
-- are {entry id, fields}; when there are none, the last id the group has read of each stream.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end

local function last_read(stream)
  if redis.call('EXISTS', stream) == 0 then return '0-0' end
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local described = {}
    for i = 1, #group, 2 do described[group[i]] = group[i + 1] end
    if described['name'] == ARGV[2] then return described['last-delivered-id'] end
  end
  return '0-0'
end

local function read(stream, count)
  local found = redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', count,
    'STREAMS', stream, '>')
  return found and found[1][2] or {}
end

local most, new, replayed = tonumber(ARGV[4]), {}, {}
-- Half for replays, so that neither they nor what is new wait for the other to end.
if redis.call('EXISTS', KEYS[3]) == 1 then replayed = read(KEYS[3], math.ceil(most / 2)) end
if most > #replayed then new = read(KEYS[2], most - #replayed) end
if #new + #replayed > 0 then return {replayed, new, {}} end
return {replayed, new, {last_read(KEYS[2]), last_read(KEYS[3])}}
