"""The way out: leases, ordered delivery, retries, dead letters."""
