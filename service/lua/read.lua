#!lua flags=allow-oom
-- Read new entries for one handler, while the lease is ours. Fenced, because a plain read by a
-- worker that was paused past its lease would hide entries from the new owner.
--
-- KEYS  1  the partition's stream of transitions; 2  the lease
-- ARGV  1  token; 2  group; 3  consumer; 4  most entries
-- Returns false when the lease is not ours, else a list of {entry id, fields}; when there is
-- nothing new, the id of the last entry the group has read.

if redis.call('GET', KEYS[2]) ~= ARGV[1] then return false end
local found = redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', ARGV[4],
  'STREAMS', KEYS[1], '>')
if found then return found[1][2] end
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local described = {}
  for i = 1, #group, 2 do described[group[i]] = group[i + 1] end
  if described['name'] == ARGV[2] then return described['last-delivered-id'] end
end
