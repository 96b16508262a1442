#!lua flags=no-writes
-- Measure what one handler has not acknowledged in one partition. Reads only.
--
-- KEYS  1  the partition's stream; 2  the handler's replays; 3  its dead letters
-- ARGV  1  group; 2  1 when acknowledged entries are deleted: all that the stream holds is left to do
-- Returns {entries pending or unread, or -1 when their number is unknown; replays;
-- milliseconds since the oldest of those entries was appended, or 0 for none; dead letters}.

-- So many unread entries are counted here. Redis's own count is not used for them: it is missing
-- where unread entries were deleted, and Redis 7.0 does not count what was read after the last
-- rewrite of the append-only file, once it was restarted or a replica took over.
local MAX_COUNTED = 20

local time = redis.call('TIME')

local function lag(entries, oldest)
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  local age_ms = oldest and math.max(0, now_ms - tonumber(oldest:match('^%d+'))) or 0
  return {entries, redis.call('XLEN', KEYS[2]), age_ms, redis.call('XLEN', KEYS[3])}
end

local function first(start, count) return redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', count) end

local function id(entry) return entry and entry[1] end

if ARGV[2] == '1' then return lag(redis.call('XLEN', KEYS[1]), id(first('-', 1)[1])) end

for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  if group['name'] == ARGV[1] then
    local oldest = redis.call('XPENDING', KEYS[1], ARGV[1])[2]
    local unread = first('(' .. group['last-delivered-id'], MAX_COUNTED)
    local count = #unread < MAX_COUNTED and #unread or group['lag']
    return lag(count and count + group['pending'] or -1, oldest or id(unread[1]))
  end
end
return redis.error_reply('NOGROUP the handler has no group')
