#!lua flags=allow-oom
-- Delete the oldest entries of a partition's stream: those that every group has acknowledged and
-- that are older than the retention time. A stream without groups is left alone. Of two clocks that
-- differ the one behind counts: a wrong clock must not delete what cannot be restored.
--
-- KEYS  1  the partition's stream of transitions
-- ARGV  1  retention time in seconds; 2  the caller's clock in Unix seconds
-- Returns {number of entries deleted, names of all groups}.

local stream, names = KEYS[1], {}
if redis.call('EXISTS', stream) == 0 then return {0, names} end
local groups = redis.call('XINFO', 'GROUPS', stream)
if #groups == 0 then return {0, names} end

local now = math.min(redis.call('TIME')[1], ARGV[2])
local kept_ms, kept_number = math.max(0, (now - ARGV[1]) * 1000), 0

-- Keep every entry from this id on, or from the id that is *after* greater.
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
