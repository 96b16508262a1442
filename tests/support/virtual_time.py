"""Time that passes when a test says so.

`run` is for code whose every wait is a timer: its loop jumps to the next one as soon as nothing
else is left to do. `push` is for code that talks to real servers: whatever has a deadline is past
it at once, however fast or slow the machine is.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Waits for nothing: hours of timers pass in the time their callbacks take.

    Only for code whose every wait is a timer or another coroutine; a wait with neither is a
    hang, and raises.
    """

    def __init__(self) -> None:
        super().__init__(_JumpingSelector(self))
        self._now = 0.0

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass without anything happening in it, as if the loop were blocked."""
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    """Is asked to sleep until the next timer, and moves the clock there instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen")
        if timeout > 0:
            self._loop.advance(timeout)
        return super().select(0)


def push(seconds: float) -> None:
    """Put the running loop's clock forward: what is due by then is over in its next turn."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run *main* to its end in virtual time; whatever it leaves running is canceled."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def in_virtual_time(
    test: Callable[Parameters, Coroutine[Any, Any, None]],
) -> Callable[Parameters, None]:
    """Run a test, which may have parameters, in virtual time."""

    @functools.wraps(test)
    def run_test(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        run(test(*args, **kwargs))

    return run_test
