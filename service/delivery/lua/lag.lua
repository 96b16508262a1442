#!lua flags=no-writes
-- Measure what one handler has not settled in one partition. Reads only.
--
-- KEYS  1  the partition's stream of transitions; 2  the handler's replays; 3  its dead letters
-- ARGV  1  group
-- Returns {transitions not settled, or -1 when Redis does not know; replays not settled;
-- milliseconds since the oldest of those transitions was admitted, or 0 when there is none; dead
-- letters}.

local time = redis.call('TIME')

local function age_ms(id)
  return math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(id:match('^%d+')))
end

for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local described = {}
  for i = 1, #group, 2 do described[group[i]] = group[i + 1] end
  if described['name'] == ARGV[1] then
    local first = redis.call('XPENDING', KEYS[1], ARGV[1])[2]
    if not first then
      local unread = '(' .. described['last-delivered-id']
      local found = redis.call('XRANGE', KEYS[1], unread, '+', 'COUNT', 1)[1]
      first = found and found[1]
    end
    local lag = described['lag']
    local unsettled = lag and lag + described['pending'] or -1
    local replays, dead = redis.call('XLEN', KEYS[2]), redis.call('XLEN', KEYS[3])
    return {unsettled, replays, first and age_ms(first) or 0, dead}
  end
end
return redis.error_reply('NOGROUP the handler has no group')
