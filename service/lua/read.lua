#!lua flags=allow-oom
-- Read new entries for one handler, while the lease is ours. Fenced, because a plain read by a
-- worker that was paused past its lease would hide entries from the new owner.
--
-- KEYS  1  the lease; 2  the partition's stream of transitions; 3  the handler's replays
-- ARGV  1  token; 2  group; 3  consumer; 4  most entries
-- Returns false when the lease is not ours, else {entries, last ids}: up to so many {entry id,
-- fields}, and, when there are none, the last id the group has read of each stream.

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

local entries, most = {}, tonumber(ARGV[4])

local function read(stream, count)
  local found = redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', count,
    'STREAMS', stream, '>')
  for _, entry in ipairs(found and found[1][2] or {}) do entries[#entries + 1] = entry end
end

-- Half for replays, so that neither they nor what is new wait for the other to end.
if redis.call('EXISTS', KEYS[3]) == 1 then read(KEYS[3], math.ceil(most / 2)) end
if most > #entries then read(KEYS[2], most - #entries) end
if #entries > 0 then return {entries, {}} end
return {entries, {last_read(KEYS[2]), last_read(KEYS[3])}}
