#!lua flags=allow-oom
-- Delete entries of a full stream that every group has acknowledged, oldest first and wherever they
-- stand: only replays can miss them. A bounded part of the stream is examined.
--
-- KEYS  1  the partition's stream of transitions, or of notifications
-- ARGV  1  where to begin: '-', or the position that the last call returned
--       2  the most entries to examine
-- Returns {entries deleted; the position to go on from, or '' at the end of what may be deleted; the
-- group that has acknowledged least, or '' without any; how many entries it has not acknowledged,
-- without any group all}.

local stream, first, max_examined = KEYS[1], ARGV[1], tonumber(ARGV[2])

local function is_after(id, other)
  local ms, number = id:match('^(%d+)-(%d+)$')
  local other_ms, other_number = other:match('^(%d+)-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms > other_ms or ms == other_ms and tonumber(number) > tonumber(other_number)
end

local names, read_to, slowest, backlog = {}, nil, '', 0
for n, found in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local group = {}
  for i = 1, #found, 2 do group[found[i]] = found[i + 1] end
  names[n] = group['name']
  local last = group['last-delivered-id']
  if not read_to or is_after(read_to, last) then read_to = last end
  local left = group['lag'] and group['lag'] + group['pending'] or redis.call('XLEN', stream)
  if left >= backlog then slowest, backlog = group['name'], left end
end
if not read_to then return {0, '', '', redis.call('XLEN', stream)} end
if read_to == '0-0' then return {0, '', slowest, backlog} end

-- The entry that the slowest group has read last stays, for without it Redis does not know how far
-- the group is behind. Where no entry follows it, Redis does.
local is_read = #redis.call('XRANGE', stream, '(' .. read_to, '+', 'COUNT', 1) == 0
local last_deletable = (is_read and '' or '(') .. read_to
local entries = redis.call('XRANGE', stream, first, last_deletable, 'COUNT', max_examined)
if #entries == 0 then return {0, '', slowest, backlog} end

-- A group's pending list may be longer than the part that is read: nothing is known behind its end.
local last, is_pending = entries[#entries][1], {}
for _, name in ipairs(names) do
  local pending = redis.call('XPENDING', stream, name, entries[1][1], last, max_examined)
  for _, one in ipairs(pending) do is_pending[one[1]] = true end
  if #pending == max_examined then last = pending[max_examined][1] end
end
local acknowledged = {}
for _, entry in ipairs(entries) do
  if is_after(entry[1], last) then break end
  if not is_pending[entry[1]] then acknowledged[#acknowledged + 1] = entry[1] end
end
if #acknowledged > 0 then redis.call('XDEL', stream, unpack(acknowledged)) end
local is_end = #entries < max_examined and last == entries[#entries][1]
return {#acknowledged, is_end and '' or '(' .. last, slowest, backlog}
