#!lua
-- Move the cursor of one account forward, while the reconciler's lease is ours.
--
-- KEYS  1  the lease; 2  the cursors: a hash
-- ARGV  1  the lease's token; 2  the account's field
--       3  the second up to which all events are known here
--       4  the second from which on webhooks are expected, if the account has no such second yet
-- Returns 1 when it was moved, 0 when it is there already or further, false when the lease is not
-- ours.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local found = redis.call('HGET', KEYS[2], ARGV[2])
local cursor, since = string.match(found or '', '^(%d+) (%d+)$')
if cursor and tonumber(cursor) >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3] .. ' ' .. (since or ARGV[4]))
return 1
