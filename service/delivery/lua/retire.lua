#!lua flags=allow-oom
-- Delete everything that one handler has in one partition: its group, with what is pending in it,
-- its lease, its replays, its dead letters and its finished attempts.
--
-- KEYS  1  the partition's stream; 2..  the keys that are the handler's alone
-- ARGV  1  group
-- Returns 1 when there was anything to delete, else 0.

local groups = 0
if redis.call('EXISTS', KEYS[1]) == 1 then
  groups = redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
end
return math.min(1, groups + redis.call('DEL', unpack(KEYS, 2)))
