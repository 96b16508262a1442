#!lua flags=no-writes
-- Find transitions of one partition by texts that their changes contain, or notifications, dead
-- letters and replays by what they hold. Reads only. Looking at 1,000 entries takes Redis a few
-- milliseconds.
--
-- KEYS  1  the stream
-- ARGV  1  the id from which to search back; 2  most entries to look at; 3  most to return
--       4..  the texts, one of which it must contain
-- Returns {the id of the last entry that was looked at, or '' when the stream ends there, how many
-- entries were looked at, the entries found, newest first, as XREVRANGE returns them}.

local function is_match(fields)
  -- What it holds is the first field; in a replay the second.
  local text = fields[1] == 'replay' and fields[4] or fields[2]
  for i = 4, #ARGV do
    if text:find(ARGV[i], 1, true) then return true end
  end
end

local max_entries, max_found = tonumber(ARGV[2]), tonumber(ARGV[3])
local entries = redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', max_entries)
local found = {}
for i, entry in ipairs(entries) do
  if is_match(entry[2]) then found[#found + 1] = entry end
  if #found == max_found then return {entry[1], i, found} end
end
return {#entries == max_entries and entries[#entries][1] or '', #entries, found}
