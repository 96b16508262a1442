#!lua flags=allow-oom
-- Publish one process's sign of life, and what it has counted. A full Redis takes it too: that is
-- when people look, and all of it is bounded.
--
-- KEYS  1  the processes (hash); 2  the latest reversals (stream); 3  the counts of the day of the
--       last event (hash); 4..  hashes of counts
-- ARGV  1  the process's name and kind; 2  its description, or empty to remove it; 3  the time of its last
--       event in milliseconds; 4  seconds to keep counts of a day; 5  the batch of counts: {id,
--       counts: for each of the hashes {ttl in seconds, {field, number, ...}}, reversals: {{field,
--       value, ...}, ...}}; 6  most reversals to keep; 7  milliseconds after which a silent process
--       is forgotten
-- Returns whether the batch was new: one whose reply was lost is not counted again.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local name, batch = ARGV[1], cjson.decode(ARGV[5])

local function count(key, ttl_s, fields)
  for i = 1, #fields, 2 do redis.call('HINCRBY', key, fields[i], fields[i + 1]) end
  redis.call('EXPIRE', key, ttl_s)
end

local function forget_silent_processes()
  local processes = redis.call('HGETALL', KEYS[1])
  for i = 1, #processes, 2 do
    local seen_ms = tonumber(processes[i + 1]:match('^%d+') or 0)
    if math.abs(now_ms - seen_ms) > tonumber(ARGV[7]) then
      redis.call('HDEL', KEYS[1], processes[i])
    end
  end
end

local stored = redis.call('HGET', KEYS[1], name)
-- Only a process that starts makes the hash larger.
if not stored then forget_silent_processes() end
local is_new = not stored or stored:match('^%d+ (%S+)') ~= batch.id
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], name)
else
  -- Before anything is counted: a call that fails half-way must not count again when it is repeated.
  local seen = string.format('%.0f', now_ms)
  redis.call('HSET', KEYS[1], name, seen .. ' ' .. batch.id .. ' ' .. ARGV[2])
end
if is_new then
  for i, counted in ipairs(batch.counts) do
    count(KEYS[i + 3], counted[1], counted[2])
  end
  for _, reversal in ipairs(batch.reversals) do
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], '*', unpack(reversal))
  end
end
if tonumber(ARGV[3]) > tonumber(redis.call('HGET', KEYS[3], 'last_event_ms') or 0) then
  redis.call('HSET', KEYS[3], 'last_event_ms', ARGV[3])
  redis.call('EXPIRE', KEYS[3], ARGV[4])
end
return is_new and 1 or 0
