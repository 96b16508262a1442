#!lua flags=allow-oom
-- Take the lease of one handler on one partition when it is free, or renew it while it is ours.
-- A lease that ran out cannot be renewed: whoever lost it must begin again from taking over.
--
-- Redis ends a lease by its own clock. When that steps back, a lease would outlive its owner by
-- the length of the step. So the time at which it ends tells each renewal from the one before, and
-- a caller that has seen none for too long may take the lease from its owner.
--
-- KEYS  1  the lease
-- ARGV  1  token of who asks; 2  time to live in milliseconds; 3  'take' or 'renew'
--       4  the owner's lease as it was returned before, if it is to be taken from the owner
-- Returns {0, ''} when it is ours now; else {milliseconds until it may be free, "<the owner's
-- token> <when the lease ends>"}. One without an end is an operator's and described by ''.

local owner = redis.call('GET', KEYS[1])
local ends = redis.call('PEXPIRETIME', KEYS[1])
local held = owner and ends >= 0 and owner .. ' ' .. string.format('%.0f', ends) or ''
local may = owner == ARGV[1]
if ARGV[3] == 'take' then may = may or not owner or held ~= '' and held == ARGV[4] end
if not may then
  local left_ms = ends == -1 and tonumber(ARGV[2]) or redis.call('PTTL', KEYS[1])
  return {math.max(1, left_ms), held}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {0, ''}
