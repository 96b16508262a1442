#!lua flags=allow-oom
-- Claim what is pending in the group, oldest first, whoever had it; delivery counts are kept.
--
-- KEYS  1  the partition's stream of transitions; 2  the lease
-- ARGV  1  token; 2  group; 3  consumer; 4  most entries; 5  first id to look at
-- Returns false when the lease is not ours, else {next id to look at or '', entries}, each entry
-- {entry id, delivery count, fields or false when the entry is gone from the stream}.

local stream, group = KEYS[1], ARGV[2]
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return false end
local pending = redis.call('XPENDING', stream, group, ARGV[5], '+', ARGV[4])
local entries, last = {}, nil
for i, one in ipairs(pending) do
  local id, count = one[1], one[4]
  local claimed = redis.call('XCLAIM', stream, group, ARGV[3], 0, id, 'RETRYCOUNT', count)
  entries[i] = {id, count, claimed[1] and claimed[1][2] or false}
  last = id
end
local following = ''
if #pending == tonumber(ARGV[4]) then following = '(' .. last end
return {following, entries}
