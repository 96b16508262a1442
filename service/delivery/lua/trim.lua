#!lua flags=allow-oom
-- Trim a partition's stream: only what every group has settled and what is old enough. A stream
-- that no group reads is left alone.
--
-- KEYS  1  the partition's stream of transitions
-- ARGV  1  seconds every entry is kept at least
-- Returns {number of entries removed, names of all groups}.

local stream, names = KEYS[1], {}
if redis.call('EXISTS', stream) == 0 then return {0, names} end
local groups = redis.call('XINFO', 'GROUPS', stream)
if #groups == 0 then return {0, names} end

local time = redis.call('TIME')
local kept_ms, kept_number = math.max(0, (time[1] - ARGV[1]) * 1000), 0

local function keep_from(id, after)
  local ms, number = id:match('^(%d+)-(%d+)$')
  ms, number = tonumber(ms), tonumber(number) + after
  if ms < kept_ms or (ms == kept_ms and number < kept_number) then
    kept_ms, kept_number = ms, number
  end
end

for n, fields in ipairs(groups) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  names[n] = group['name']
  local oldest_pending = redis.call('XPENDING', stream, group['name'])[2]
  if oldest_pending then
    keep_from(oldest_pending, 0)
  else
    keep_from(group['last-delivered-id'], 1)
  end
end
local first_kept = string.format('%.0f-%.0f', kept_ms, kept_number)
return {redis.call('XTRIM', stream, 'MINID', '=', first_kept), names}
