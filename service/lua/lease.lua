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
if not may then
  local left_ms = redis.call('PTTL', KEYS[1])
  -- One without an end is nobody's whom we know: an operator's. Asked for again after a while.
  if left_ms == -1 then left_ms = tonumber(ARGV[2]) end
  return math.max(1, left_ms)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 0
