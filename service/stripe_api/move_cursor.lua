#!lua
-- Move the cursor of one account forward, while the reconciler's lease is ours.
--
-- KEYS  1  the lease; 2  the cursors: a hash
-- ARGV  1  the lease's token; 2  the account's field
--       3  the second up to which all events are known here
--       4  the second from which on webhooks are expected, if the account has no such second yet
--       5  seconds by which the clocks of workers and of Redis may differ
-- A second that Redis's clock has not reached is not known to the end, whatever a worker's clock
-- says. A cursor that is further ahead than clocks may differ was moved by a wrong clock: it is
-- void.
-- Returns 1 when it was moved, 0 when it is there already or further, false when the lease is not
-- ours.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local found = redis.call('HGET', KEYS[2], ARGV[2])
local cursor, since = string.match(found or '', '^(%d+) (%d+)$')
local now = tonumber(redis.call('TIME')[1])
if cursor and tonumber(cursor) > now + ARGV[5] then cursor, since = nil, nil end
local read_until = math.min(ARGV[3], now)
if cursor and tonumber(cursor) >= read_until then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], string.format('%.0f', read_until) .. ' ' .. (since or ARGV[4]))
return 1
