"""Receives Stripe Identity webhooks and delivers every change of a session to queues, in order.

An event passes these packages: `server` and `web`, `inbox` with `stripe` and `transitions`, then
`delivery` and `handlers`. What is asked of Stripe is in `stripe_api`. All of them use `storage` or
`telemetry`. `monitoring` reads what a deployment is doing, and `admin` shows it. `runtime` composes
and runs a process, `operations` examines a deployment, and `cli` has the commands. Every package
may import `config`, `environment`, `parsers`, `errors`, `findings`, `secret` and `cancellation`.
This file holds the version only.
"""

__version__ = "0.1.0"
