"""`python -m service`."""

import os
import signal

if os.getpid() == 1:
    # The first process of a container never gets a signal that it does not handle. Here SIGTERM
    # does what it does elsewhere, before `runtime.signals` handles it and once that has stopped.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))

from .cli.main import main

if __name__ == "__main__":
    main()
