#!lua
-- Take one request from the budget of a mode, or say how long to wait for it.
--
-- The budget is a bucket that gains `rate` requests a second and holds `burst` of them. It is kept
-- as the time at which it will be full. A caller leaves a reserve in it for callers that come first.
--
-- A full bucket is a key that is gone. Where the server's clock stepped back, the bucket counts as
-- empty, not as in debt.
--
-- KEYS  1  the budget (string): when it will be full, in microseconds
-- ARGV  1  rate, requests a second; 2  burst, requests; 3  reserve, requests, at most burst - 1
-- Returns 0 if a request was taken, else the microseconds to wait before asking again.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval = 1000000 / tonumber(ARGV[1])
local capacity = interval * tonumber(ARGV[2])
local full_at = tonumber(redis.call('GET', KEYS[1]) or '0')
full_at = math.min(math.max(full_at, now), now + capacity) + interval
local wait = full_at - now - (capacity - interval * tonumber(ARGV[3]))
if wait > 0 then
  return math.ceil(wait)
end
redis.call('SET', KEYS[1], string.format('%.0f', full_at), 'PX', math.ceil((full_at - now) / 1000))
return 0
