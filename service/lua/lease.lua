#!lua flags=allow-oom
-- Take the lease of one handler on one partition when it is free, or renew it while it is ours.
-- A lease that ran out cannot be renewed: whoever lost it must begin again from taking over.
--
-- KEYS  1  the lease
-- ARGV  1  token of who asks; 2  time to live in milliseconds; 3  'take' or 'renew'
-- Returns 0 when it is ours now, else the milliseconds until it may be free.

local owner = redis.call('GET', KEYS[1])
local may = owner == ARGV[1]
if ARGV[3] == 'take' then may = may or not owner end
if not may then return math.max(1, redis.call('PTTL', KEYS[1])) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 0
