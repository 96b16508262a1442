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
--       5      seconds by which the clocks of Stripe's own machines may differ
--       6      retention in seconds of a session's hash after its last event
--       7      most entries the stream may hold
--       then eight per event: event id, nonce, created, order key, kind, state hash, current
--       status, packed change
-- Returns `clocks_differ` or `layout_differs`, and has done nothing; else one text per event:
--       "<outcome> <sequence> <order key of the latest event before or -> <previous status>".
--         outcome: admitted, duplicate, late, unchanged, expired, full, or broken when an
--         operator made something else of the session's record
--
-- A session's hash holds, packed, for every field costs memory in each session; not in one, for a
-- value of more than 64 bytes would cost it its compact encoding:
--   state       "<sequence> <epoch> <server> <state hash> <kind>"
--   status      "<bytes of status> <status><previous>", for words are open and may hold spaces
--   latest      "<kind> <order key> <event id>" of the latest event
--   result      the same of the latest result, where the latest event is a step
--   evt_...     of each event remembered "<first letter of outcome> <sequence> <created> <nonce>";
--               the nonce lets a caller whose reply was lost ask again and hear its first answer
--   duplicates  how many copies were answered as such, where there were any
--
-- A kind is s for a step or r for a result, a capital where the status is final. The first rule
-- that holds decides:
--   1  the id is known                                                            duplicate
--   2  created before the age limit                                               expired
--   3  a result before the latest result, or (redaction apart) created more than
--      the skew before the step that is the present status                        late
--   4  a step before the latest event, or created no more than the skew after the
--      latest result, or while the status is final or redaction has begun         late
--   5  the same state hash                                                        unchanged
--   6  otherwise                                                                  admitted
-- Before means: by order key, and by event id where that is equal.
--
-- A server that has lost its last writes would number a transition as one that handlers have
-- already seen. So the record says which server wrote its last transition, and the next one
-- written elsewhere begins a new epoch. A server is named by its replication id: Redis takes a new
-- one at each start and each promotion, while its run id stays the same when it is demoted and
-- promoted again.

-- Every so many fields, as many as can be looked at in one go are looked at: a constant cost per
-- event, and at most about twice the ids that may still come again are kept.
local PRUNE_EVERY, PRUNE_SAMPLE = 64, 128
-- The digits of an order key: redaction rank, eleven for the second of creation, step rank.
local REDACTION, SECOND = 10 ^ 12, 10
local OUTCOMES = {a = 'admitted', l = 'late', u = 'unchanged'}

local oldest, tolerance_s, layout = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local skew_s, retention_s, cap = tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
-- Another receiver may be behind this one by twice the tolerance, and must still know the id.
local forgettable = oldest - 2 * tolerance_s
local time = redis.call('TIME')
local server

local function server_tag()
  server = server or redis.call('INFO', 'replication'):match('master_replid:(%x%x%x%x%x%x%x%x)')
  return assert(server)
end

local function reply(outcome, sequence, previous, latest)
  local key = latest and latest.packed:match(' (%d+)') or '-'
  return outcome .. ' ' .. (sequence or 0) .. ' ' .. key .. ' ' .. (previous or '')
end

local function is_step(kind) return kind == 's' or kind == 'S' end
local function is_final(kind) return kind == 'S' or kind == 'R' end
local function created_in(key) return math.floor(key % REDACTION / SECOND) end

-- Whether one event is before another. Byte by byte, for Lua compares texts by the server's locale.
local function precedes(one, other)
  if one.key ~= other.key then return one.key < other.key end
  local a, b = one.id, other.id
  for i = 1, math.min(#a, #b) do
    if a:byte(i) ~= b:byte(i) then return a:byte(i) < b:byte(i) end
  end
  return #a < #b
end

local function unpacked_event(packed)
  if not packed then return end
  local kind, key, id = packed:match('^(%a) (%d+) (.+)$')
  return {kind = assert(kind), key = tonumber(key), id = id, packed = packed}
end

local function unpacked(state, status, latest, result)
  if not state then return end
  local sequence, epoch, tag, hash, kind = state:match('^(%d+) (%d+) (%x+) (%w+) (%a)$')
  local length, words = status:match('^(%d+) (.+)$')
  local record = {
    sequence = assert(sequence), epoch = epoch, tag = tag, hash = hash, kind = kind,
    status = words:sub(1, length), previous = words:sub(length + 1),
    latest = assert(unpacked_event(latest)), has_result = result and true,
  }
  record.result = unpacked_event(result) or not is_step(record.latest.kind) and record.latest
  return record
end

local function state_of(sequence, epoch, tag, hash, kind)
  return sequence .. ' ' .. epoch .. ' ' .. tag .. ' ' .. hash .. ' ' .. kind
end

local function is_late(event, record)
  local latest, result = record.latest, record.result
  if is_step(event.kind) then
    return precedes(event, latest)
      or result and event.created <= created_in(result.key) + skew_s
      or is_final(record.kind) or latest.key >= REDACTION
  end
  if result and precedes(event, result) then return true end
  local is_overtaken = event.created < created_in(latest.key) - skew_s
  return is_step(record.kind) and event.key < REDACTION and is_overtaken
end

local function prune(session)
  if redis.call('HLEN', session) % PRUNE_EVERY ~= 0 then return end
  local fields = redis.call('HRANDFIELD', session, PRUNE_SAMPLE, 'WITHVALUES')
  for i = 1, #fields, 2 do
    local created = fields[i]:sub(1, 4) == 'evt_' and fields[i + 1]:match('^%a %d+ (%d+)')
    if created and tonumber(created) < forgettable then redis.call('HDEL', session, fields[i]) end
  end
end

local function remember(session, event, outcome, sequence, ...)
  local verdict = outcome:sub(1, 1) .. ' ' .. sequence .. ' ' .. event.created .. ' ' .. event.nonce
  redis.call('HSET', session, event.id, verdict, ...)
  redis.call('EXPIRE', session, retention_s)
  prune(session)
end

-- The fields by which an event that is not late becomes the latest result or step, and the latest
-- of all unless a later one is known.
local function moved_up(session, event, record)
  if record.latest and precedes(event, record.latest) then return 'result', event.packed end
  if is_step(event.kind) and record.result then
    return 'latest', event.packed, 'result', record.result.packed
  end
  if record.has_result then redis.call('HDEL', session, 'result') end
  return 'latest', event.packed
end

-- The number of the next transition: one more in its epoch, or the first of a new epoch.
local function numbered(record)
  if record.tag == server_tag() then
    return string.format('%.0f', record.sequence + 1), record.epoch
  end
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  return '1', string.format('%.0f', math.max((record.epoch or 0) + 1, now_ms))
end

local function known_answer(session, event, verdict, record)
  local outcome, sequence, nonce = verdict:match('^(%a) (%d+) %d+ (.+)$')
  -- Always a write, so that a WAIT behind it covers the first delivery's write too.
  if nonce ~= event.nonce then
    redis.call('HINCRBY', session, 'duplicates', 1)
    return reply('duplicate', sequence, nil, record.latest)
  end
  redis.call('HSET', session, event.id, verdict)
  local previous = record.status
  if outcome == 'a' then previous = sequence == record.sequence and record.previous end
  return reply(OUTCOMES[outcome], sequence, previous, record.latest)
end

local function admit(stream, session, id, nonce, created, key, kind, hash, status, change)
  local event = {id = id, nonce = nonce, created = tonumber(created), key = tonumber(key),
    kind = kind, packed = kind .. ' ' .. key .. ' ' .. id}
  local found = redis.call('HMGET', session, id, 'state', 'status', 'latest', 'result')
  local record = unpacked(unpack(found, 2, 5)) or {}

  if found[1] then return known_answer(session, event, found[1], record) end
  if event.created < oldest then return reply('expired', '0', nil, record.latest) end
  if record.latest and is_late(event, record) then
    remember(session, event, 'late', record.sequence)
    return reply('late', record.sequence, record.status, record.latest)
  end
  if hash == record.hash then
    remember(session, event, 'unchanged', record.sequence,
      'state', state_of(record.sequence, record.epoch, record.tag, hash, kind),
      moved_up(session, event, record))
    return reply('unchanged', record.sequence, record.status, record.latest)
  end
  if redis.call('XLEN', stream) >= cap then return reply('full') end

  local sequence, epoch = numbered(record)
  local previous = record.status or ''
  redis.call('XADD', stream, '*', 'change', change, 'previous', previous,
    'sequence', sequence, 'epoch', epoch)
  remember(session, event, 'admitted', sequence,
    'state', state_of(sequence, epoch, server_tag(), hash, kind),
    'status', #status .. ' ' .. status .. previous,
    moved_up(session, event, record))
  return reply('admitted', sequence, previous, record.latest)
end

if math.abs(time[1] - ARGV[1]) > tolerance_s then return 'clocks_differ' end
local checked = {}
for i = 1, #KEYS, 3 do
  if not checked[KEYS[i]] and redis.call('GET', KEYS[i]) ~= layout then return 'layout_differs' end
  checked[KEYS[i]] = true
end
local replies = {}
for i = 1, #KEYS / 3 do
  local at = 7 + (i - 1) * 8
  local fine, answer = pcall(admit, KEYS[3 * i - 1], KEYS[3 * i], unpack(ARGV, at + 1, at + 8))
  replies[i] = fine and answer or reply('broken')
end
return replies
