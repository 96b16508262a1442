#!lua flags=no-writes
-- Measure what one handler has not acknowledged in one partition. Reads only.
--
-- KEYS  1  the partition's stream; 2  the handler's replays; 3  its dead letters
-- ARGV  1  group; 2  1 when acknowledged entries are deleted: all that the stream holds is left to do
-- Returns {entries pending or unread, or -1 when Redis does not know their number; replays;
-- milliseconds since the oldest of those entries was appended, or 0 for none; dead letters}.

local time = redis.call('TIME')

local function lag(entries, oldest)
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  local age_ms = oldest and math.max(0, now_ms - tonumber(oldest:match('^%d+'))) or 0
  return {entries, redis.call('XLEN', KEYS[2]), age_ms, redis.call('XLEN', KEYS[3])}
end

local function first_id(start)
  local entry = redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', 1)[1]
  return entry and entry[1]
end

if ARGV[2] == '1' then return lag(redis.call('XLEN', KEYS[1]), first_id('-')) end

for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  if group['name'] == ARGV[1] then
    local oldest = redis.call('XPENDING', KEYS[1], ARGV[1])[2]
    -- Redis knows no lag where entries were deleted that the group had not read.
    local entries = group['lag'] and group['lag'] + group['pending'] or -1
    return lag(entries, oldest or first_id('(' .. group['last-delivered-id']))
  end
end
return redis.error_reply('NOGROUP the handler has no group')
