"""Several receivers on one port: started, watched, replaced when they die, and stopped together.

The parent binds the ports and answers nobody; it knows neither Redis nor a secret. What one
receiver does is `processes`' business. Each of them serves both ports, so whoever asks for
metrics or readiness asks one of them; what was counted stands in files that all can sum up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from socket import socket
from subprocess import DEVNULL, Popen
from typing import NamedTuple

import structlog

from . import metrics, server, tasks
from .config import Settings
from .tether import tethered

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# Whoever lived so long did not die of its start: the pauses begin anew.
STEADY_AFTER_S = 60.0
# What each of the dead has counted is kept in files: so many, and whoever runs us begins afresh.
MOST_REPLACED = 100
# Beyond drain and grace time, for the goodbyes after them.
STOP_MARGIN_S = 5.0
_UP = b"."

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def run(settings: Settings, environ: Mapping[str, str]) -> int:
    """Run `WEB_CONCURRENCY` receivers until SIGTERM or SIGINT; return the exit code.

    Raises:
        ConfigError: A port cannot be had.
    """
    host, stalled_after_s = settings.host, settings.receive_timeout_s
    with (
        server.bound(host, settings.port, stalled_after_s=stalled_after_s) as web,
        server.bound(host, settings.admin_port, stalled_after_s=stalled_after_s) as admin,
        tempfile.TemporaryDirectory(prefix="idv-metrics-") as directory,
    ):
        shared = {**environ, "PROMETHEUS_MULTIPROC_DIR": directory}
        return asyncio.run(_Supervisor(settings, shared, (web, admin), directory).run())


class Place(NamedTuple):
    """Where one of several receivers listens, and how it says that it does."""

    web: socket
    admin: socket
    pipe: int

    @classmethod
    def inherited(cls, told: str) -> Place:
        """Return the place that the parent has passed on, by the numbers it *told*."""
        web, admin, pipe = map(int, told.split(","))
        return cls(socket(fileno=web), socket(fileno=admin), pipe)

    def told(self) -> str:
        """Return what tells a child its place."""
        return f"{self.web.fileno()},{self.admin.fileno()},{self.pipe}"

    def up(self) -> None:
        """Tell the parent that this receiver listens. The end of the pipe will tell of ours."""
        os.write(self.pipe, _UP)


class _Receiver:
    """One child and what is known of it."""

    def __init__(self, process: Popen[bytes], pipe: int) -> None:
        self.process = process
        self.is_up = False
        self._pipe = pipe
        self._reload_owed = False

    async def up(self) -> None:
        """Wait until it listens, or has ended without."""
        self.is_up = await self._told() == _UP
        if self.is_up and self._reload_owed:
            self.process.send_signal(signal.SIGHUP)

    async def ended(self) -> int:
        """Wait for its end; return its exit code."""
        if self.is_up:
            await self._told()
        os.close(self._pipe)
        return self.process.wait()

    def reload(self) -> None:
        """Pass SIGHUP on; one that is still starting would die of it, so it gets it later."""
        if self.is_up:
            self.process.send_signal(signal.SIGHUP)
        else:
            self._reload_owed = True

    async def _told(self) -> bytes:
        """Wait for a word from it; none means that it has ended."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._pipe, readable.set)
        await readable.wait()
        loop.remove_reader(self._pipe)
        return os.read(self._pipe, 1)


class _Supervisor:
    """Keeps as many receivers alive as the settings say."""

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        sockets: tuple[socket, socket],
        directory: str,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._sockets = sockets
        self._directory = directory
        self._on_terminal = os.isatty(0)
        self._living: set[_Receiver] = set()
        self._up = asyncio.Event()
        self._stopping = asyncio.Event()
        self._ended = 0
        self._code = 0

    async def run(self) -> int:
        """Start them, the first alone so that what is wrong is said once; stop them at the end."""
        self._follow_signals()
        keeping = [asyncio.create_task(self._keep())]
        stopped = asyncio.create_task(self._stopping.wait())
        first_up = asyncio.create_task(self._up.wait())
        await asyncio.wait({stopped, first_up}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stopping.is_set():
            number = self._settings.web_concurrency
            keeping += [asyncio.create_task(self._keep()) for _ in range(number - 1)]
            port, admin_port = (each.getsockname()[1] for each in self._sockets)
            log.info("receivers.started", processes=number, port=port, admin_port=admin_port)
        await stopped
        await tasks.end(first_up)
        await self._stop(keeping)
        return self._code

    def _follow_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._told_to_reload)

    def _told_to_stop(self) -> None:
        """Stop in good order; a second signal ends us at once, and by the tether everybody."""
        self._stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _told_to_reload(self) -> None:
        if self._on_terminal and not os.isatty(0):
            # It has gone, which means stop to whoever was started from it.
            self._stopping.set()
        for receiver in self._living:
            receiver.reload()

    async def _keep(self) -> None:
        """Have one receiver running, until told to stop."""
        loop = asyncio.get_running_loop()
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            began_at = loop.time()
            try:
                await self._live()
            except OSError as error:
                log.error("receiver.not_started", error=type(error).__name__)  # noqa: TRY400 - whole
            if loop.time() - began_at > STEADY_AFTER_S:
                pause_s = FIRST_PAUSE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    async def _live(self) -> None:
        """Start one receiver on our sockets, and wait for its end."""
        self._living.add(receiver := self._started())
        await receiver.up()
        if receiver.is_up:
            self._up.set()
        code = await receiver.ended()
        self._living.discard(receiver)
        metrics.forget(receiver.process.pid, self._directory)
        self._judge(receiver.process.pid, code)

    def _started(self) -> _Receiver:
        """Start a receiver.

        No thread watches it: a parent's threads end one after the other, and to the tether the
        end of each would be another one's.
        """
        ours, theirs = os.pipe()
        place = Place(*self._sockets, theirs)
        command = [sys.executable, "-m", str(__package__), "serve", "--inherited", place.told()]
        try:
            process = Popen(  # noqa: S603 - ourselves
                tethered(command),
                env=self._environ,
                stdin=DEVNULL,
                pass_fds=(place.web.fileno(), place.admin.fileno(), theirs),
                # Ctrl-C is for us alone, who pass it on; twice would end them at once.
                start_new_session=True,
            )
        except OSError:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return _Receiver(process, ours)

    def _judge(self, pid: int, code: int) -> None:
        """See what the end of one receiver means for all."""
        if self._stopping.is_set():
            self._code = self._code or int(code not in (0, -signal.SIGTERM))
            return
        log.error("receiver.ended", pid=pid, exit_code=code)
        self._ended += 1
        # What made the last that listened end by its own decision would end the next one too.
        is_last = not any(receiver.is_up for receiver in self._living)
        if (code > 0 and is_last) or self._ended > MOST_REPLACED:
            self._code = max(code, 1)
            self._stopping.set()

    async def _stop(self, keeping: list[asyncio.Task[None]]) -> None:
        """Let everybody finish, in the time that one alone would have."""
        # The listeners close with the last who holds them; nobody here would take a connection.
        for each in self._sockets:
            each.close()
        for receiver in self._living:
            receiver.process.terminate()
        grace_s = self._settings.drain_s + self._settings.shutdown_grace_s + STOP_MARGIN_S
        await asyncio.wait(keeping, timeout=grace_s)
        for receiver in self._living:
            receiver.process.kill()
        await asyncio.gather(*keeping)
        log.info("receivers.stopped", exit_code=self._code)
