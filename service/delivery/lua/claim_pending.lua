#!lua flags=allow-oom
-- Claim what is pending in the group, oldest first, whoever had it. The delivery count is kept;
-- what another consumer had gains one start, for nobody has seen how that one ended. At the end,
-- consumers that hold nothing any more are forgotten: under a lease there is only one.
--
-- KEYS  1  the lease; 2  the stream they are in
-- ARGV  1  token; 2  group; 3  consumer; 4  most entries; 5  first id to look at
--       6  what one failure adds to a count; 7  starts from which no more are added here
--       8  1 when the stream need not exist
-- Returns false when the lease is not ours, else {next id to look at or '', entries}, each entry
-- {entry id, delivery count, fields or false when the entry is gone from the stream}.

local stream, group, consumer = KEYS[2], ARGV[2], ARGV[3]
local failure, enough = tonumber(ARGV[6]), tonumber(ARGV[7])

local function forget_other_consumers()
  for _, one in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local described = {}
    for i = 1, #one, 2 do described[one[i]] = one[i + 1] end
    if described['name'] ~= consumer and described['pending'] == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, described['name'])
    end
  end
end

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
if ARGV[8] == '1' and redis.call('EXISTS', stream) == 0 then return {'', {}} end
local pending = redis.call('XPENDING', stream, group, ARGV[5], '+', ARGV[4])
local entries = {}
for i, one in ipairs(pending) do
  local id, owner, count = one[1], one[2], one[4]
  if owner ~= consumer and count % failure < enough then count = count + 1 end
  local claimed = redis.call('XCLAIM', stream, group, consumer, 0, id, 'RETRYCOUNT', count)
  entries[i] = {id, count, claimed[1] and claimed[1][2] or false}
end
if #pending == tonumber(ARGV[4]) then return {'(' .. pending[#pending][1], entries} end
forget_other_consumers()
return {'', entries}
