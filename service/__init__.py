"""Receives Stripe Identity webhooks once, in order and without secrets, and hands them to queues.

The modules are a flat pipeline, read in the order an event travels: `web`, `receiver`,
`signatures`, `events`, `inbox`, then `worker`, `dispatch`, `mailbox`, `handlers`. Nothing lives
in this file but the version.
"""

__version__ = "0.1.0"
