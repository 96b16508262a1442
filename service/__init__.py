"""Receives Stripe Identity webhooks once, in order and without secrets, and hands them to queues.

Read the packages in the order an event travels: `server` and `web`, `inbox` with `stripe` and
`transitions`, then `delivery` and `handlers`; all stand on `storage` and `telemetry`. `runtime`
puts a process together, `operations` examines one, `cli` is what people type. Below all of them
are `config`, `environment`, `errors`, `secret` and `cancellation`. Nothing lives in this file but
the version.
"""

__version__ = "0.1.0"
