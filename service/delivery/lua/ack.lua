#!lua flags=allow-oom
-- Acknowledge entries while the lease is ours, and note each as a finished attempt. Where this group
-- is the only one to read them, they are deleted with it. An attempt that cannot be noted is lost:
-- what is only shown must stop no acknowledgement.
--
-- KEYS  1  the lease; 2  the entries' stream; 3  the handler's finished attempts
-- ARGV  1  token; 2  group; 3  1 to delete them; 4  1 for replays; 5  most finished attempts
--       then for each entry its id, its event's id or '' to note nothing, the number of the attempt
-- Returns false when the lease is not ours, else the number of entries that were pending.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local acknowledged, replay = 0, ARGV[4] == '1' and {'replay', '1'} or {}
for i = 6, #ARGV, 3 do
  local id, event = ARGV[i], ARGV[i + 1]
  -- A call that is repeated because its reply was lost must not note an attempt twice.
  if redis.call('XACK', KEYS[2], ARGV[2], id) == 1 then
    acknowledged = acknowledged + 1
    if event ~= '' then
      redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'event', event,
        'outcome', 'delivered', 'attempt', ARGV[i + 2], unpack(replay))
    end
  end
  if ARGV[3] == '1' then redis.call('XDEL', KEYS[2], id) end
end
return acknowledged
