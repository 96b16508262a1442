#!lua
-- Would a write be taken? Without `flags`, Redis refuses the call wherever it would refuse a write:
-- while it is full, a replica, short of replicas, or unable to save. Reads and writes nothing.
--
-- KEYS  none
-- ARGV  none
-- Returns 1.

return 1
