#!lua flags=no-writes
-- Measure what one handler has not acknowledged in one partition. Reads only.
--
-- KEYS  1  the partition's stream of transitions; 2  the handler's replays; 3  its dead letters
-- ARGV  1  group
-- Returns {transitions pending or unread, or -1 when Redis does not know their number; replays;
-- milliseconds since the oldest of those transitions was admitted, or 0 for none; dead letters}.

local time = redis.call('TIME')

local function age_ms(id)
  return math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(id:match('^%d+')))
end

for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  if group['name'] == ARGV[1] then
    local oldest = redis.call('XPENDING', KEYS[1], ARGV[1])[2]
    if not oldest then
      local unread = '(' .. group['last-delivered-id']
      local entry = redis.call('XRANGE', KEYS[1], unread, '+', 'COUNT', 1)[1]
      oldest = entry and entry[1]
    end
    -- Redis knows no lag where entries were deleted that the group had not read.
    local transitions = group['lag'] and group['lag'] + group['pending'] or -1
    local replays, dead_letters = redis.call('XLEN', KEYS[2]), redis.call('XLEN', KEYS[3])
    return {transitions, replays, oldest and age_ms(oldest) or 0, dead_letters}
  end
end
return redis.error_reply('NOGROUP the handler has no group')
