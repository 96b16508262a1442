#!lua flags=allow-oom
-- Make room in a full stream of transitions: delete, oldest first and wherever they stand, entries
-- that every group has settled, so that only replays lose anything. A bounded part is looked at.
--
-- KEYS  1  the partition's stream of transitions
-- ARGV  1  where to begin: '-', or what the call before has returned; 2  most entries to look at
-- Returns {entries deleted; where to go on, or '' when every entry that can be settled was looked
-- at; the group that has settled least, or '' without any; how many entries it has not settled}.

local stream, first, most = KEYS[1], ARGV[1], tonumber(ARGV[2])

local function is_after(id, other)
  local ms, number = id:match('^(%d+)-(%d+)$')
  local other_ms, other_number = other:match('^(%d+)-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms > other_ms or ms == other_ms and tonumber(number) > tonumber(other_number)
end

local names, read_to, slowest, unsettled = {}, nil, '', 0
for n, found in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local group = {}
  for i = 1, #found, 2 do group[found[i]] = found[i + 1] end
  names[n] = group['name']
  local last = group['last-delivered-id']
  if not read_to or is_after(read_to, last) then read_to = last end
  local left = group['lag'] and group['lag'] + group['pending'] or redis.call('XLEN', stream)
  if left >= unsettled then slowest, unsettled = group['name'], left end
end
if not read_to or read_to == '0-0' then return {0, '', slowest, unsettled} end

-- Without the entry that it has read last, Redis would not know how far a group is behind; where
-- there is nothing behind that entry, it does.
local is_read = #redis.call('XRANGE', stream, '(' .. read_to, '+', 'COUNT', 1) == 0
local entries = redis.call('XRANGE', stream, first, (is_read and '' or '(') .. read_to, 'COUNT', most)
if #entries == 0 then return {0, '', slowest, unsettled} end

-- A group's pending list may be longer than what is asked for: behind its end nothing is known.
local last, is_pending = entries[#entries][1], {}
for _, name in ipairs(names) do
  local pending = redis.call('XPENDING', stream, name, entries[1][1], last, most)
  for _, one in ipairs(pending) do is_pending[one[1]] = true end
  if #pending == most then last = pending[most][1] end
end
local settled = {}
for _, entry in ipairs(entries) do
  if is_after(entry[1], last) then break end
  if not is_pending[entry[1]] then settled[#settled + 1] = entry[1] end
end
if #settled > 0 then redis.call('XDEL', stream, unpack(settled)) end
local is_end = #entries < most and last == entries[#entries][1]
return {#settled, is_end and '' or '(' .. last, slowest, unsettled}
