#!lua flags=allow-oom
-- Create the missing groups of handlers on one partition's stream. On a stream without groups they
-- begin at its start: nothing was read yet. On a stream with groups a new one begins at its end.
--
-- KEYS  1      the stream
-- ARGV  1..    the handlers' names
-- Returns the names of the groups that were created.

local stream, existing, created = KEYS[1], {}, {}
local start = '0'
if redis.call('EXISTS', stream) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    existing[group[2]] = true
    start = '$'
  end
end
for _, name in ipairs(ARGV) do
  if not existing[name] then
    redis.call('XGROUP', 'CREATE', stream, name, start, 'MKSTREAM')
    created[#created + 1] = name
  end
end
return created
