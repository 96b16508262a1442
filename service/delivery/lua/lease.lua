#!lua flags=allow-oom
-- Take the lease of one handler on one partition, or renew it while it is ours.
--
-- A lease that is free can be taken; it cannot be renewed, even by its last owner (leases.py says
-- why). A lease outlives its owner when this server's clock steps back. So each reply describes the
-- lease by its token and by when it ends, which changes with every renewal. A caller that has seen
-- the same description for too long may pass it, and takes the lease if it is still that one.
--
-- KEYS  1  the lease
-- ARGV  1  our token; 2  time to live in milliseconds; 3  'take' or 'renew'
--       4  the description of a lease that may be taken from its owner, or ''
-- Returns {0, ''} when the lease is ours now, else {milliseconds until it may be free,
-- '<token> <when it ends>'}. A lease without an end was set by an operator; it has no description.

local owner = redis.call('GET', KEYS[1])
local ends = redis.call('PEXPIRETIME', KEYS[1])
local description = owner and ends >= 0 and owner .. ' ' .. string.format('%.0f', ends) or ''
local is_allowed = owner == ARGV[1]
if ARGV[3] == 'take' then
  is_allowed = is_allowed or not owner or (description ~= '' and description == ARGV[4])
end
if not is_allowed then
  local left_ms = ends == -1 and tonumber(ARGV[2]) or redis.call('PTTL', KEYS[1])
  return {math.max(1, left_ms), description}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {0, ''}
