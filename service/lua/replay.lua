#!lua
-- Put copies of entries onto a handler's replays, where its worker takes them like new mail. In
-- the same step they leave the stream they are in, when that is one of dead letters.
--
-- KEYS  1  where the entries are; 2  the handler's replays
-- ARGV  1  group; 2  the replay's name; 3  1 when they leave; 4..  entry ids
-- Returns the number of entries put there; those that are gone, or not ours, are passed over.

local source, replays, group = KEYS[1], KEYS[2], ARGV[1]
if redis.call('EXISTS', replays) == 0 then
  redis.call('XGROUP', 'CREATE', replays, group, '0', 'MKSTREAM')
end
local put = 0
for i = 4, #ARGV do
  local entry = redis.call('XRANGE', source, ARGV[i], ARGV[i])[1]
  local fields = {}
  for n = 1, entry and #entry[2] or 0, 2 do fields[entry[2][n]] = entry[2][n + 1] end
  if fields['change'] and fields['previous'] and fields['sequence'] and fields['epoch'] then
    redis.call('XADD', replays, '*', 'change', fields['change'], 'previous', fields['previous'],
      'sequence', fields['sequence'], 'epoch', fields['epoch'], 'replay', ARGV[2])
    if ARGV[3] == '1' then redis.call('XDEL', source, ARGV[i]) end
    put = put + 1
  end
end
return put
