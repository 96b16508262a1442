#!lua flags=no-writes
-- Find how far one session's transitions are at one handler: which are unread, pending, dead letters
-- or replayed. Reads only.
--
-- Some dead letters are asked for by their ids. Those of acknowledged transitions of which nothing is
-- known are searched behind the first of these, and replays that are not acknowledged from the first
-- one on, up to MAX_SEARCHED each: that takes Redis 2 ms, and there may be a hundred thousand.
--
-- KEYS  1  the partition's transitions; 2  the handler's replays; 3  its dead letters
-- ARGV  1  group; 2  the session's id as it stands in a change; 3  number of transitions; for each,
--       oldest first, its entry id and 1 if it is known what became of it; then ids of dead letters
-- Returns {for each transition -1 if it was not read, -2 if it was acknowledged, else the delivery
-- count, or -3 for each if there is no such group; dead letters; replays, each behind its state as
-- above}. Dead letters and replays are entries, as XRANGE returns them.

local MAX_SEARCHED = 500
local UNREAD, ACKNOWLEDGED, NO_GROUP = -1, -2, -3
local transitions, replays, dead_letters = unpack(KEYS)
local group, session, last_argument = ARGV[1], ARGV[2], 3 + 2 * ARGV[3]

local function last_read_id(stream)
  if redis.call('EXISTS', stream) == 0 then return end
  for _, fields in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local found = {}
    for i = 1, #fields, 2 do found[fields[i]] = fields[i + 1] end
    if found['name'] == group then return found['last-delivered-id'] end
  end
end

local function is_after(id, other)
  local ms, number = id:match('^(%d+)-(%d+)$')
  local other_ms, other_number = other:match('^(%d+)-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms > other_ms or ms == other_ms and tonumber(number) > tonumber(other_number)
end

local function state_of(stream, id, last_read)
  if not last_read then return NO_GROUP end
  if is_after(id, last_read) then return UNREAD end
  local pending = redis.call('XPENDING', stream, group, id, id, 1)[1]
  return pending and pending[4] or ACKNOWLEDGED
end

local function is_ours(entry)
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'change' then return entry[2][i + 1]:find(session, 1, true) end
  end
end

-- Call `visit` with the session's entries among the first ones of a stream from an id on.
local function search(stream, start, visit)
  for _, entry in ipairs(redis.call('XRANGE', stream, start, '+', 'COUNT', MAX_SEARCHED)) do
    if is_ours(entry) then visit(entry) end
  end
end

local states, first_unexplained = {}, nil
local last_read = last_read_id(transitions)
for i = 4, last_argument, 2 do
  local state = state_of(transitions, ARGV[i], last_read)
  states[#states + 1] = state
  local is_explained = state ~= ACKNOWLEDGED or ARGV[i + 1] == '1'
  first_unexplained = first_unexplained or not is_explained and ARGV[i]
end

local letters = {}
for i = last_argument + 1, #ARGV do
  letters[#letters + 1] = redis.call('XRANGE', dead_letters, ARGV[i], ARGV[i])[1]
end
if first_unexplained then
  search(dead_letters, first_unexplained, function(entry) letters[#letters + 1] = entry end)
end

local found, last_replay = {}, last_read_id(replays)
search(replays, '-', function(entry)
  found[#found + 1] = {state_of(replays, entry[1], last_replay), entry}
end)
return {states, letters, found}
