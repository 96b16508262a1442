#!lua
-- Admit events, each in one atomic step: look up its id, compare it with its session's record,
-- append the transition to the stream, and write the record. Note thin notifications in the same
-- way: each is appended to a stream, for its event to be fetched and then admitted.
-- No `flags`: a full server refuses the whole call before its first write.
--
-- KEYS  three per event: its partition's layout, its partition's stream of transitions, its
--       session's record; of a notification: the layout, the stream of notifications, the key that
--       exists while it is known; in Cluster all of a call are of one partition
-- ARGV  1      the caller's clock, Unix seconds
--       2      events created before this Unix second are expired
--       3      ids of events created before this Unix second may be forgotten
--       4      seconds by which the caller's and Redis's clocks may differ
--       5      the layout that the caller was made for
--       6      the skew: seconds by which the clocks of Stripe's own machines may differ
--       7      retention in seconds of a session's record after its last event
--       8      the most entries that the stream may hold
--       then eight per event: event id, nonce, created, order key, kind, state hash, current
--       status, packed change; of a notification the kind is n, order key, state hash and status
--       are empty, and the last is the packed notification
-- Returns `clocks_differ` or `layout_differs`, and has done nothing; else one text per event:
--       "<outcome> <sequence> <order key of the latest event before or -> <previous status>".
--         outcome: admitted, duplicate, late, unchanged, expired, full, or broken when the
--         session's record cannot be read; of a notification queued, duplicate, expired or full
--
-- THE RULES. A step says that something began (`created`, or status `processing`); every other
-- event is a result. The kind is s for a step or r for a result, a capital where the status is
-- final. The order key is a number: redaction rank, second of creation, type rank; equal keys are
-- ordered by event id. The first rule that holds decides:
--   1  the id is known                                                            duplicate
--   2  created before the age limit                                               expired
--   3  a result lower than the latest result, or (redaction apart) created more
--      than the skew before the step that is the present status                   late
--   4  a step lower than the latest event, or created no more than the skew after
--      the latest result, or while the status is final or redaction has begun     late
--   5  the same state hash                                                        unchanged
--   6  otherwise                                                                  admitted
-- Why steps are weaker: a session always ends with a result, so a step that arrives late must not
-- undo one, whatever its timestamp. A later result may undo a final one: Stripe lets staff do so.
--
-- THE RECORD is a hash. Its values are packed, because each field costs memory in each session; not
-- into one value, because more than 64 bytes would cost the hash its compact encoding:
--   state       "<sequence> <epoch> <server> <state hash> <kind>"
--   status      "<bytes of status> <status><previous status>"; a status may hold spaces
--   latest      "<kind> <order key> <event id>" of the latest event that was not late
--   result      the same of the latest result, where the latest event is a step
--   evt_...     per known id "<first letter of outcome> <sequence> <created> <nonce> <arrived>"; a
--               caller that lost the reply asks again with its nonce, and gets the first answer
--               again. Arrived is the id of its transition in the stream if it was admitted, else the
--               Unix time in milliseconds
--   read:evt_   the same of a session that was read itself, where Stripe had no snapshot event: the
--               id is that of the notification
--   duplicates  how many copies were answered as such, if any
--
-- EPOCHS. A server that has lost its last writes would number a transition as one that handlers
-- have already seen. So the record names the server that wrote its last transition, and the next
-- transition on another server begins a new epoch at 1. A server's name is its replication id:
-- Redis changes it at each start and each promotion, while its run id survives a demotion.
--
-- NOTIFICATIONS. Rules 1 and 2 hold for them too, all others for the event that is fetched. A key of
-- its own remembers each for NOTED_S: Stripe retries for three days, and the last try may wait. A
-- copy that comes later costs a fetch, no second transition: the event's id is known by then.

-- Each time a record reaches a multiple of PRUNE_EVERY fields, up to PRUNE_SAMPLE of them are looked
-- at: a constant cost per event, and at most about twice the ids that may still come are kept.
local PRUNE_EVERY, PRUNE_SAMPLE = 64, 128
-- The digits of an order key: redaction rank, eleven for the second of creation, type rank.
local REDACTION_UNIT, SECOND_UNIT = 10 ^ 12, 10
local NOTED_S = 4 * 86400
local OUTCOMES = {a = 'admitted', l = 'late', u = 'unchanged'}

local caller_now, min_created, min_kept = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local tolerance_s, layout, skew_s = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
local retention_s, max_entries = ARGV[7], tonumber(ARGV[8])
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local server

local function server_name()
  server = server or redis.call('INFO', 'replication'):match('master_replid:(%x%x%x%x%x%x%x%x)')
  return assert(server)
end

local function answer(outcome, sequence, previous, latest)
  local key = latest and latest.packed:match(' (%d+)') or '-'
  return outcome .. ' ' .. (sequence or 0) .. ' ' .. key .. ' ' .. (previous or '')
end

local function is_step(kind) return kind == 's' or kind == 'S' end
local function is_final(kind) return kind == 'S' or kind == 'R' end
local function created_in(key) return math.floor(key % REDACTION_UNIT / SECOND_UNIT) end

-- Byte by byte, because Lua compares texts by the server's locale.
local function is_lower(one, other)
  if one.key ~= other.key then return one.key < other.key end
  local a, b = one.id, other.id
  for i = 1, math.min(#a, #b) do
    if a:byte(i) ~= b:byte(i) then return a:byte(i) < b:byte(i) end
  end
  return #a < #b
end

local function unpack_event(packed)
  if not packed then return end
  local kind, key, id = packed:match('^(%a) (%d+) (.+)$')
  return {kind = assert(kind), key = tonumber(key), id = id, packed = packed}
end

-- The record as a table; an empty one of a session that is not known.
local function unpack_record(state, status, latest, result)
  if not state then return {} end
  local sequence, epoch, name, hash, kind = state:match('^(%d+) (%d+) (%x+) (%w+) (%a)$')
  local length, words = status:match('^(%d+) (.+)$')
  local record = {
    sequence = assert(sequence), epoch = epoch, server = name, hash = hash, kind = kind,
    status = words:sub(1, length), previous = words:sub(length + 1),
    latest = assert(unpack_event(latest)), has_result = result and true,
  }
  record.result = unpack_event(result) or not is_step(record.latest.kind) and record.latest
  return record
end

local function pack_state(sequence, epoch, name, hash, kind)
  return sequence .. ' ' .. epoch .. ' ' .. name .. ' ' .. hash .. ' ' .. kind
end

-- Rules 3 and 4.
local function is_late(event, record)
  local latest, result = record.latest, record.result
  if is_step(event.kind) then
    return is_lower(event, latest)
      or result and event.created <= created_in(result.key) + skew_s
      or is_final(record.kind) or latest.key >= REDACTION_UNIT
  end
  if result and is_lower(event, result) then return true end
  local is_overtaken = event.created < created_in(latest.key) - skew_s
  return is_step(record.kind) and event.key < REDACTION_UNIT and is_overtaken
end

local function is_event_id(field)
  local start = field:sub(1, 4)
  return start == 'evt_' or start == 'read'
end

local function prune(session)
  if redis.call('HLEN', session) % PRUNE_EVERY ~= 0 then return end
  local fields = redis.call('HRANDFIELD', session, PRUNE_SAMPLE, 'WITHVALUES')
  for i = 1, #fields, 2 do
    local created = is_event_id(fields[i]) and fields[i + 1]:match('^%a %d+ (%d+)')
    if created and tonumber(created) < min_kept then redis.call('HDEL', session, fields[i]) end
  end
end

-- Remember the event's id, and set the other fields that are given.
local function remember(session, event, outcome, sequence, entry_id, ...)
  local known = outcome:sub(1, 1) .. ' ' .. sequence .. ' ' .. event.created .. ' '
    .. event.nonce .. ' ' .. (entry_id or now_ms)
  redis.call('HSET', session, event.id, known, ...)
  redis.call('EXPIRE', session, retention_s)
  prune(session)
end

-- The fields by which an event that is not late becomes the latest result or step, and the latest
-- event unless a later one is known.
local function latest_fields(session, event, record)
  if record.latest and is_lower(event, record.latest) then return 'result', event.packed end
  if is_step(event.kind) and record.result then
    return 'latest', event.packed, 'result', record.result.packed
  end
  if record.has_result then redis.call('HDEL', session, 'result') end
  return 'latest', event.packed
end

-- Sequence and epoch of the next transition: one more in its epoch, or the first of a new epoch.
local function next_number(record)
  if record.server == server_name() then
    return string.format('%.0f', record.sequence + 1), record.epoch
  end
  return '1', string.format('%.0f', math.max((record.epoch or 0) + 1, now_ms))
end

-- Rule 1, unless it is the same caller that asks again. Both ways it writes, so that a WAIT behind
-- this call covers the write of the first delivery too.
local function answer_known(session, event, known, record)
  local outcome, sequence, nonce = known:match('^(%a) (%d+) %d+ (%S+)')
  if nonce ~= event.nonce then
    redis.call('HINCRBY', session, 'duplicates', 1)
    return answer('duplicate', sequence, nil, record.latest)
  end
  redis.call('HSET', session, event.id, known)
  local previous = record.status
  if outcome == 'a' then previous = sequence == record.sequence and record.previous end
  return answer(OUTCOMES[outcome], sequence, previous, record.latest)
end

local function admit(stream, session, id, nonce, created, key, kind, hash, status, change)
  local event = {id = id, nonce = nonce, created = tonumber(created), key = tonumber(key),
    kind = kind, packed = kind .. ' ' .. key .. ' ' .. id}
  local found = redis.call('HMGET', session, id, 'state', 'status', 'latest', 'result')
  local known, record = found[1], unpack_record(unpack(found, 2, 5))

  if known then return answer_known(session, event, known, record) end
  if event.created < min_created then return answer('expired', '0', nil, record.latest) end
  if record.latest and is_late(event, record) then
    remember(session, event, 'late', record.sequence, nil)
    return answer('late', record.sequence, record.status, record.latest)
  end
  if hash == record.hash then
    remember(session, event, 'unchanged', record.sequence, nil,
      'state', pack_state(record.sequence, record.epoch, record.server, hash, kind),
      latest_fields(session, event, record))
    return answer('unchanged', record.sequence, record.status, record.latest)
  end
  if redis.call('XLEN', stream) >= max_entries then return answer('full') end

  local sequence, epoch = next_number(record)
  local previous = record.status or ''
  local entry_id = redis.call('XADD', stream, '*', 'change', change, 'previous', previous,
    'sequence', sequence, 'epoch', epoch)
  remember(session, event, 'admitted', sequence, entry_id,
    'state', pack_state(sequence, epoch, server_name(), hash, kind),
    'status', #status .. ' ' .. status .. previous,
    latest_fields(session, event, record))
  return answer('admitted', sequence, previous, record.latest)
end

-- Every answer but `expired` and `full` writes, so that a WAIT behind this call covers the write of
-- the first delivery too.
local function note(stream, noted, _, nonce, created, _, _, _, _, notification)
  local known = redis.call('GET', noted)
  if not known then
    if tonumber(created) < min_created then return answer('expired') end
    if redis.call('XLEN', stream) >= max_entries then return answer('full') end
    redis.call('XADD', stream, '*', 'notification', notification)
  end
  redis.call('SET', noted, known or nonce, 'EX', NOTED_S)
  return answer((known or nonce) == nonce and 'queued' or 'duplicate')
end

if math.abs(time[1] - caller_now) > tolerance_s then return 'clocks_differ' end
local checked = {}
for i = 1, #KEYS, 3 do
  if not checked[KEYS[i]] and redis.call('GET', KEYS[i]) ~= layout then return 'layout_differs' end
  checked[KEYS[i]] = true
end
local answers = {}
for i = 1, #KEYS / 3 do
  local before = 8 + (i - 1) * 8
  local decide = ARGV[before + 5] == 'n' and note or admit
  local is_done, found =
    pcall(decide, KEYS[3 * i - 1], KEYS[3 * i], unpack(ARGV, before + 1, before + 8))
  answers[i] = is_done and found or answer('broken')
end
return answers
