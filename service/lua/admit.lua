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
-- A remembered event id holds "<outcome> <sequence> <created> <nonce>". The nonce lets a caller
-- whose reply was lost ask again and hear its first answer.

local PRUNED_ABOVE = 24

local horizon_s, retention_s, cap = ARGV[1], ARGV[2], tonumber(ARGV[3])
local time = redis.call('TIME')
local oldest = tonumber(time[1]) - tonumber(horizon_s)

local function reply(outcome, sequence, previous, position)
  return outcome .. ' ' .. (sequence or 0) .. ' ' .. (position or '-') .. ' ' .. (previous or '')
end

local function prune(session)
  if redis.call('HLEN', session) <= PRUNED_ABOVE then return end
  local fields = redis.call('HGETALL', session)
  for i = 1, #fields, 2 do
    local created = fields[i]:sub(1, 4) == 'evt_' and fields[i + 1]:match('^%a+ %d+ (%d+)')
    if created and tonumber(created) < oldest then redis.call('HDEL', session, fields[i]) end
  end
end

local function remember(session, event_id, outcome, sequence, created, nonce, ...)
  local verdict = outcome .. ' ' .. sequence .. ' ' .. created .. ' ' .. nonce
  redis.call('HSET', session, event_id, verdict, ...)
  redis.call('EXPIRE', session, retention_s)
  prune(session)
end

local function admit(stream, session, event_id, nonce, created, position, fingerprint, status, change)
  local known = redis.call('HMGET', session, event_id, 'position', 'fingerprint', 'status',
    'previous', 'sequence', 'epoch')
  local before, was, sequence = known[2], known[4], known[6] or '0'

  if known[1] then
    -- Always a write, so that a WAIT behind it covers the first delivery's write too.
    local outcome, given, owner = known[1]:match('^(%a+) (%d+) %d+ (.+)$')
    if owner ~= nonce then
      redis.call('HINCRBY', session, 'duplicates', 1)
      return reply('duplicate', given, nil, before)
    end
    redis.call('HSET', session, event_id, known[1])
    if outcome == 'admitted' then was = given == sequence and known[5] end
    return reply(outcome, given, was, before)
  end
  if tonumber(created) < oldest then return reply('expired', '0', nil, before) end

  if before and tonumber(position) < tonumber(before) then
    remember(session, event_id, 'late', sequence, created, nonce)
    return reply('late', sequence, was, before)
  end
  if before and fingerprint == known[3] then
    remember(session, event_id, 'unchanged', sequence, created, nonce, 'position', position)
    return reply('unchanged', sequence, was, before)
  end
  if redis.call('XLEN', stream) >= cap then return reply('full') end

  sequence = string.format('%.0f', tonumber(sequence) + 1)
  local epoch = known[7] or string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
  local previous = was or ''
  redis.call('XADD', stream, '*', 'change', change, 'previous', previous,
    'sequence', sequence, 'epoch', epoch)
  remember(session, event_id, 'admitted', sequence, created, nonce, 'position', position,
    'fingerprint', fingerprint, 'status', status, 'previous', previous,
    'sequence', sequence, 'epoch', epoch)
  return reply('admitted', sequence, previous, before)
end

local replies = {}
for i = 1, #KEYS / 2 do
  local at = 3 + (i - 1) * 7
  local fine, answer = pcall(admit, KEYS[2 * i - 1], KEYS[2 * i], unpack(ARGV, at + 1, at + 7))
  replies[i] = fine and answer or reply('broken')
end
return replies
