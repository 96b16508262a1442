#!lua
-- Remember, judge and hand over: one atomic step for each event, in order.
-- No `flags`: on a full server Redis refuses the whole call before its first write.
--
-- KEYS  three per event: its partition's layout, its partition's stream of transitions, its
--       session's hash; in Cluster all events of a call are of one partition
-- ARGV  1      the receiver's clock, Unix seconds
--       2      events created before this Unix second are expired
--       3      seconds by which two clocks may differ
--       4      the layout that the receiver was made for
--       5      retention in seconds of a session's hash after its last event
--       6      most entries the stream may hold
--       then seven per event: event id, nonce, created, position, fingerprint, current status,
--       packed change
-- Returns `clocks_differ` or `layout_differs`, and has done nothing; else one text per event:
--       "<outcome> <sequence> <position before or -> <previous status>".
--         outcome: admitted, duplicate, late, unchanged, expired, full, or broken when an
--         operator made something else of the session's record
--
-- A session's hash holds, packed, for every field costs memory in each session; not in one, for a
-- value of more than 64 bytes would cost it its compact encoding:
--   state       "<position> <sequence> <epoch> <fingerprint> <server>"
--   status      "<bytes of status> <status><previous>", for words are open and may hold spaces
--   evt_...     of each event remembered "<first letter of outcome> <sequence> <created> <nonce>";
--               the nonce lets a caller whose reply was lost ask again and hear its first answer
--   duplicates  how many copies were answered as such, where there were any
--
-- A server that has lost its last writes would number a transition as one that handlers have
-- already seen. So the record says which server wrote its last transition, and the next one
-- written elsewhere begins a new epoch. A server is named by its replication id: Redis takes a new
-- one at each start and each promotion, while its run id stays the same when it is demoted and
-- promoted again.

-- Every so many fields, as many as can be looked at in one go are looked at: a constant cost per
-- event, and at most about twice the ids that may still come again are kept.
local PRUNE_EVERY, PRUNE_SAMPLE = 64, 128
local OUTCOMES = {a = 'admitted', l = 'late', u = 'unchanged'}

local oldest, tolerance_s, layout = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local retention_s, cap = ARGV[5], tonumber(ARGV[6])
-- Another receiver may be behind this one by twice the tolerance, and must still know the id.
local forgettable = oldest - 2 * tolerance_s
local time = redis.call('TIME')
local server

local function server_tag()
  server = server or redis.call('INFO', 'replication'):match('master_replid:(%x%x%x%x%x%x%x%x)')
  return assert(server)
end

local function reply(outcome, sequence, previous, position)
  return outcome .. ' ' .. (sequence or 0) .. ' ' .. (position or '-') .. ' ' .. (previous or '')
end

local function packed(...)
  return table.concat({...}, ' ')
end

local function unpacked(state, status)
  if not state then return end
  local position, sequence, epoch, fingerprint, tag =
    state:match('^(%d+) (%d+) (%d+) (%w+) (%x+)$')
  local length, words = status:match('^(%d+) (.+)$')
  return assert(position), sequence, epoch, fingerprint, tag,
    words:sub(1, length), words:sub(length + 1)
end

local function prune(session)
  if redis.call('HLEN', session) % PRUNE_EVERY ~= 0 then return end
  local fields = redis.call('HRANDFIELD', session, PRUNE_SAMPLE, 'WITHVALUES')
  for i = 1, #fields, 2 do
    local created = fields[i]:sub(1, 4) == 'evt_' and fields[i + 1]:match('^%a %d+ (%d+)')
    if created and tonumber(created) < forgettable then redis.call('HDEL', session, fields[i]) end
  end
end

local function remember(session, event_id, outcome, sequence, created, nonce, ...)
  local verdict = outcome:sub(1, 1) .. ' ' .. sequence .. ' ' .. created .. ' ' .. nonce
  redis.call('HSET', session, event_id, verdict, ...)
  redis.call('EXPIRE', session, retention_s)
  prune(session)
end

-- The number of the next transition: one more in its epoch, or the first of a new epoch.
local function numbered(sequence, epoch, tag)
  if tag == server_tag() then return string.format('%.0f', sequence + 1), epoch end
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  return '1', string.format('%.0f', math.max((epoch or 0) + 1, now_ms))
end

local function admit(stream, session, event_id, nonce, created, position, fingerprint, status, change)
  local known = redis.call('HMGET', session, event_id, 'state', 'status')
  local before, sequence, epoch, story, tag, was, earlier = unpacked(known[2], known[3])

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
      'state', packed(position, sequence, epoch, story, tag))
    return reply('unchanged', sequence, was, before)
  end
  if redis.call('XLEN', stream) >= cap then return reply('full') end

  sequence, epoch = numbered(sequence, epoch, tag)
  local previous = was or ''
  redis.call('XADD', stream, '*', 'change', change, 'previous', previous,
    'sequence', sequence, 'epoch', epoch)
  remember(session, event_id, 'admitted', sequence, created, nonce,
    'state', packed(position, sequence, epoch, fingerprint, server_tag()),
    'status', packed(#status, status .. previous))
  return reply('admitted', sequence, previous, before)
end

if math.abs(time[1] - ARGV[1]) > tolerance_s then return 'clocks_differ' end
local checked = {}
for i = 1, #KEYS, 3 do
  if not checked[KEYS[i]] and redis.call('GET', KEYS[i]) ~= layout then return 'layout_differs' end
  checked[KEYS[i]] = true
end
local replies = {}
for i = 1, #KEYS / 3 do
  local at = 6 + (i - 1) * 7
  local fine, answer = pcall(admit, KEYS[3 * i - 1], KEYS[3 * i], unpack(ARGV, at + 1, at + 7))
  replies[i] = fine and answer or reply('broken')
end
return replies
