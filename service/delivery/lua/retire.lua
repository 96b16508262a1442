#!lua flags=allow-oom
-- Forget a handler in one partition: its group, and with it what it has not settled, its lease,
-- its replays and its dead letters.
--
-- KEYS  1  the partition's stream of transitions; 2..  everything else that is only its own
-- ARGV  1  group
-- Returns 1 when there was anything to forget.

local had = 0
if redis.call('EXISTS', KEYS[1]) == 1 then
  had = redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
end
local rest = redis.call('DEL', unpack(KEYS, 2))
return math.min(1, had + rest)
