#!lua flags=allow-oom
-- Claim pending entries for our consumer, the oldest first, while the lease is ours. What the
-- delivery count of an entry holds, and how claiming changes it, is said in consumer.py.
--
-- An entry that was deleted from the stream leaves the pending list when it is claimed. After the
-- last entry all consumers that have nothing pending are deleted: each worker that ever had the
-- lease has left one.
--
-- KEYS  1  the lease; 2  the entries' stream
-- ARGV  1  token; 2  group; 3  our consumer; 4  most entries to claim; 5  first id to look at
--       6  weight of one failure in a count; 7  deliveries from which claiming adds none
--       8  1 when the stream need not exist
-- Returns false when the lease is not ours, else {next id to look at or '' at the end, entries};
-- each entry is {id, delivery count, its fields or false when it was deleted from the stream}.

local stream, group, consumer, max_entries = KEYS[2], ARGV[2], ARGV[3], tonumber(ARGV[4])
local failure_weight, quarantine_after = tonumber(ARGV[6]), tonumber(ARGV[7])

local function delete_idle_consumers()
  for _, fields in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local found = {}
    for i = 1, #fields, 2 do found[fields[i]] = fields[i + 1] end
    if found['name'] ~= consumer and found['pending'] == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, found['name'])
    end
  end
end

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
if ARGV[8] == '1' and redis.call('EXISTS', stream) == 0 then return {'', {}} end
local pending = redis.call('XPENDING', stream, group, ARGV[5], '+', max_entries)
local entries = {}
for i, found in ipairs(pending) do
  local id, owner, count = found[1], found[2], found[4]
  local is_quarantined = count % failure_weight >= quarantine_after
  if owner ~= consumer and not is_quarantined then count = count + 1 end
  local claimed = redis.call('XCLAIM', stream, group, consumer, 0, id, 'RETRYCOUNT', count)
  entries[i] = {id, count, claimed[1] and claimed[1][2] or false}
end
if #pending == max_entries then return {'(' .. pending[#pending][1], entries} end
delete_idle_consumers()
return {'', entries}
