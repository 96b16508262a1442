#!lua
-- Remember, judge and hand over: one atomic step for each event, in order.
-- No `flags`: on a full server Redis refuses the whole call before its first write.
--
-- KEYS  two per event: its partition's stream of transitions, its session's hash; in Cluster all
--       events of a call are of one partition
-- ARGV  1      horizon in seconds: events created before it are expired
--       2      retention in seconds of a session's hash after its last event
--       3      most entries the stream may hold
--       then seven per event: event id, nonce, created, position, fingerprint, current status,
--       packed change
-- Returns one text per event: "<outcome> <sequence> <position before or -> <previous status>".
--         outcome: admitted, duplicate, late, unchanged, expired, full, or broken when an
--         operator made something else of the session's record
--
-- A session's hash holds, packed, for every field costs memory in each session; not in one, for a
-- value of more than 64 bytes would cost it its compact encoding:
--   state       "<position> <sequence> <epoch> <fingerprint>"
--   status      "<bytes of status> <status><previous>", for words are open and may hold spaces
--   evt_...     of each event remembered "<first letter of outcome> <sequence> <created> <nonce>";
--               the nonce lets a caller whose reply was lost ask again and hear its first answer
--   duplicates  how many copies were answered as such, where there were any

local PRUNED_ABOVE = 20
local OUTCOMES = {a = 'admitted', l = 'late', u = 'unchanged'}

local horizon_s, retention_s, cap = ARGV[1], ARGV[2], tonumber(ARGV[3])
local time = redis.call('TIME')
local oldest = tonumber(time[1]) - tonumber(horizon_s)

local function reply(outcome, sequence, previous, position)
  return outcome .. ' ' .. (sequence or 0) .. ' ' .. (position or '-') .. ' ' .. (previous or '')
end

local function packed(...)
  return table.concat({...}, ' ')
end

local function unpacked(state, status)
  if not state then return end
  local position, sequence, epoch, fingerprint = state:match('^(%d+) (%d+) (%d+) (%w+)$')
  local length, words = status:match('^(%d+) (.+)$')
  return assert(position), sequence, epoch, fingerprint, words:sub(1, length), words:sub(length + 1)
end

local function prune(session)
  if redis.call('HLEN', session) <= PRUNED_ABOVE then return end
  local fields = redis.call('HGETALL', session)
  for i = 1, #fields, 2 do
    local created = fields[i]:sub(1, 4) == 'evt_' and fields[i + 1]:match('^%a %d+ (%d+)')
    if created and tonumber(created) < oldest then redis.call('HDEL', session, fields[i]) end
  end
end

local function remember(session, event_id, outcome, sequence, created, nonce, ...)
  local verdict = outcome:sub(1, 1) .. ' ' .. sequence .. ' ' .. created .. ' ' .. nonce
  redis.call('HSET', session, event_id, verdict, ...)
  redis.call('EXPIRE', session, retention_s)
  prune(session)
end

local function admit(stream, session, event_id, nonce, created, position, fingerprint, status, change)
  local known = redis.call('HMGET', session, event_id, 'state', 'status')
  local before, sequence, epoch, story, was, earlier = unpacked(known[2], known[3])

  if known[1] then
    -- Always a write, so that a WAIT behind it covers the first delivery's write too.
    local outcome, given, owner = known[1]:match('^(%a) (%d+) %d+ (.+)$')
    if owner ~= nonce then
      redis.call('HINCRBY', session, 'duplicates', 1)
      return reply('duplicate', given, nil, before)
    end
    redis.call('HSET', session, event_id, known[1])
    if outcome == 'a' then was = given == sequence and earlier end
    return reply(OUTCOMES[outcome], given, was, before)
  end
  if tonumber(created) < oldest then return reply('expired', '0', nil, before) end

  if before and tonumber(position) < tonumber(before) then
    remember(session, event_id, 'late', sequence, created, nonce)
    return reply('late', sequence, was, before)
  end
  if before and fingerprint == story then
    remember(session, event_id, 'unchanged', sequence, created, nonce,
      'state', packed(position, sequence, epoch, story))
    return reply('unchanged', sequence, was, before)
  end
  if redis.call('XLEN', stream) >= cap then return reply('full') end

  sequence = string.format('%.0f', (sequence or 0) + 1)
  epoch = epoch or string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
  local previous = was or ''
  redis.call('XADD', stream, '*', 'change', change, 'previous', previous,
    'sequence', sequence, 'epoch', epoch)
  remember(session, event_id, 'admitted', sequence, created, nonce,
    'state', packed(position, sequence, epoch, fingerprint),
    'status', packed(#status, status .. previous))
  return reply('admitted', sequence, previous, before)
end

local replies = {}
for i = 1, #KEYS / 2 do
  local at = 3 + (i - 1) * 7
  local fine, answer = pcall(admit, KEYS[2 * i - 1], KEYS[2 * i], unpack(ARGV, at + 1, at + 7))
  replies[i] = fine and answer or reply('broken')
end
return replies
