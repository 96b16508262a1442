#!lua flags=no-writes
-- Say who has the lease of one handler on one partition, and count the pending entries that have
-- failed and will be retried, among the oldest. Reads only.
--
-- KEYS  1  the handler's stream of the partition; 2  its lease
-- ARGV  1  group; 2  the delivery count of one failure; 3  most entries to look at
-- Returns {how many; the lease's token, or false for none}.

local failing, pending = 0, {}
if redis.call('EXISTS', KEYS[1]) == 1 then
  pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[3])
  -- Where nothing was read yet, there may be no group.
  if pending.err and not pending.err:find('NOGROUP') then return pending end
end
for _, entry in ipairs(pending) do
  if entry[4] >= tonumber(ARGV[2]) then failing = failing + 1 end
end
return {failing, redis.call('GET', KEYS[2])}
