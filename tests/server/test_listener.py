"""Listening: each wait has a deadline, no request affects the next, stopping is clean."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import ConfigError
from service.server.listener import SOCKET_BUFFER_BYTES, Listener
from service.server.protocol import GuardedProtocol
from tests.support.apps import INCOMPLETE, Gate, echo_app, post
from tests.support.harness import answer, connected, listening, rest
from tests.support.virtual_time import push
from tests.support.waiting import DEADLINE_S, until

# Longer than any test takes: a test moves the clock on instead.
TIMEOUT_S = 600.0
LONGER_S = 3600


@asynccontextmanager
async def one_client(
    gate: Gate | None = None,
) -> AsyncIterator[tuple[Listener, asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a listener with these deadlines, and a raw connection to it."""
    async with (
        listening(echo_app(gate), receive_timeout_s=TIMEOUT_S, keep_alive_s=LONGER_S) as listener,
        connected(listener.port) as (reader, writer),
    ):
        yield listener, reader, writer


Heard = Callable[[Listener, bytes], Awaitable[None]]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """Return a function that waits until all bytes of the only client were received."""
    count = 0
    receive = GuardedProtocol.data_received

    def counting(self: GuardedProtocol, received: bytes) -> None:
        nonlocal count
        receive(self, received)
        count += len(received)

    async def wait(listener: Listener, sent: bytes) -> None:
        state = listener._server.server_state
        await until(lambda: state.connections and count == len(sent))

    monkeypatch.setattr(GuardedProtocol, "data_received", counting)
    return wait


# Without a byte after a response a connection is idle.
SLOW = [(b"", sent) for sent in INCOMPLETE.values()] + [
    (post(), sent) for sent in INCOMPLETE.values() if sent
]


@pytest.mark.parametrize(("before", "sent"), SLOW)
async def test_a_request_has_a_deadline(before: bytes, sent: bytes, heard: Heard) -> None:
    """A client must send a whole request in time, on a used connection too."""
    async with one_client() as (listener, reader, writer):
        if before:
            writer.write(before)
            await answer(reader)
        writer.write(sent)
        await heard(listener, before + sent)
        push(TIMEOUT_S - 60)
        await asyncio.sleep(0.02)
        assert not reader.at_eof()
        push(60)
        assert await rest(reader) == b""


@pytest.mark.parametrize(
    "start", [INCOMPLETE["half a header"], INCOMPLETE["half a large body"], b"\r\n"]
)
async def test_dripping_does_not_move_the_deadline(start: bytes, heard: Heard) -> None:
    """The deadline is for the whole request: a byte now and then does not move it."""
    async with one_client() as (listener, reader, writer):
        sent = start
        writer.write(start)
        await heard(listener, sent)
        for _ in range(4):
            push(TIMEOUT_S / 5)
            drop = b"\r\n" if start == b"\r\n" else b"a"
            sent += drop
            writer.write(drop)
            await heard(listener, sent)
        assert not reader.at_eof()
        push(TIMEOUT_S / 5)
        assert await rest(reader) == b""


async def test_idle_time_is_counted_from_the_last_answer() -> None:
    """A used connection stays open, however old it is; an unused one ends."""
    async with one_client() as (_, reader, writer):
        # An odd number: the timer that fires after the last request was started before it.
        for body in (b"1", b"2", b"3"):
            writer.write(post(body))
            assert await answer(reader) == (200, body)
            push(2 * LONGER_S / 3)
            # Let the timers that are due now run before the next request.
            for _ in range(10):
                await asyncio.sleep(0)
        push(LONGER_S / 3)
        assert await rest(reader) == b""


@pytest.mark.parametrize("sent", [b"", post(), INCOMPLETE["half a body"], post(path="/gate")])
async def test_a_lost_connection_leaves_no_task(sent: bytes, heard: Heard) -> None:
    """A task runs the requests of each connection, and ends with it: in the end none is left."""
    gate = Gate()
    async with listening(echo_app(gate)) as listener:
        state = listener._server.server_state
        async with connected(listener.port) as (_, writer):
            writer.write(sent)
            await heard(listener, sent)
            assert len(state.tasks) == 1
        await until(lambda: not state.connections)
        gate.opened.set()
        await until(lambda: not state.tasks)


async def test_a_slow_application_is_not_cut_off() -> None:
    """The deadline is for the client: the time of the application does not count."""
    gate = Gate()
    async with one_client(gate) as (_, reader, writer):
        writer.write(post(path="/gate"))
        await until(lambda: gate.entered)
        push(2 * TIMEOUT_S)
        await asyncio.sleep(0.02)
        gate.opened.set()
        assert await answer(reader) == (200, b"x")


@pytest.mark.parametrize(("missing", "deadline_s"), [(2, TIMEOUT_S), (0, LONGER_S)])
async def test_a_connection_with_an_unread_body_ends(
    heard: Heard, missing: int, deadline_s: float
) -> None:
    """Answered before its body came, a request still has its deadline; then keep-alive counts."""
    async with one_client() as (listener, reader, writer):
        whole = post(b"y" * 10, path="/unread")
        writer.write(whole[:-5])
        assert await answer(reader) == (200, b"unread")
        sent = whole[: len(whole) - missing]
        writer.write(sent[len(whole) - 5 :])
        await heard(listener, sent)
        push(deadline_s)
        assert await rest(reader) == b""


async def test_pipelined_requests_come_in_any_pieces() -> None:
    """They are answered in order, large bodies too, whatever pieces are received."""
    bodies = [b"a" * 40_000, b"b", b"c" * 100_000, b"d", b"e" * 70_000]
    stream = b"".join(post(body) for body in bodies)
    async with listening(echo_app()) as listener:
        for size in (1_000, 39_990, 40_100, 65_536):
            async with connected(listener.port) as (reader, writer):
                for start in range(0, len(stream), size):
                    writer.write(stream[start : start + size])
                    await writer.drain()
                    await asyncio.sleep(0)
                for body in bodies:
                    assert await answer(reader) == (200, body)


async def test_stopping_finishes_requests_in_flight() -> None:
    """After a stop no client connects, idle connections close, and requests are answered."""
    gate = Gate()
    async with (
        listening(echo_app(gate)) as listener,
        connected(listener.port) as (idle, writer),
        connected(listener.port) as (busy, busy_writer),
    ):
        writer.write(post())
        await answer(idle)
        busy_writer.write(post(path="/gate"))
        await until(lambda: gate.entered)
        listener.stop()
        assert await rest(idle) == b""
        with pytest.raises(OSError, match=r"."):
            await asyncio.open_connection("127.0.0.1", listener.port)
        gate.opened.set()
        assert await answer(busy) == (200, b"x")
        assert await rest(busy) == b""


@pytest.mark.parametrize("sent", [b"", INCOMPLETE["half a header"], INCOMPLETE["half a body"]])
async def test_a_stuck_client_delays_a_stop_by_the_grace_time(sent: bytes, heard: Heard) -> None:
    """A client that is stuck in mid-request delays a stop by no more than the grace time."""
    app: Any = Stuck()
    async with contextlib.AsyncExitStack() as stopped:
        listener = await stopped.enter_async_context(
            listening(app, receive_timeout_s=LONGER_S, grace_s=TIMEOUT_S)
        )
        port = listener.port
        async with connected(port) as (reader, writer):
            writer.write(sent)
            await heard(listener, sent)
            is_in_hand = sent == INCOMPLETE["half a body"]
            await until(lambda: app.entered == is_in_hand)
            listener.stop()
            await until(lambda: refuses(port))
            # uvicorn starts the grace time a tenth of a second later.
            await asyncio.sleep(0.2)
            assert not app.is_cut
            push(TIMEOUT_S)
            async with asyncio.timeout(DEADLINE_S):
                await stopped.aclose()
            if is_in_hand:
                assert (await rest(reader)).startswith(b"HTTP/1.1 503 ")
    assert app.is_cut == is_in_hand


class Stuck:
    """An endpoint that waits for the rest of a body until it is canceled."""

    def __init__(self) -> None:
        self.entered = False
        self.is_cut = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer when canceled."""
        self.entered = True
        try:
            await Request(scope, receive).body()
        except asyncio.CancelledError:
            self.is_cut = True
        await Response(status_code=503)(scope, receive, send)


def refuses(port: int) -> bool:
    """Say whether connections to *port* are refused."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


async def test_one_read_brings_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much a client sends, one read returns no more than the socket's buffer."""
    sizes = []
    receive = GuardedProtocol.data_received

    def counting(self: GuardedProtocol, received: bytes) -> None:
        sizes.append(len(received))
        receive(self, received)

    monkeypatch.setattr(GuardedProtocol, "data_received", counting)
    async with listening(echo_app()) as listener, connected(listener.port) as (reader, writer):
        writer.write(post(b"y" * 2_000_000))
        assert await answer(reader) == (200, b"y" * 2_000_000)
    # Linux doubles the requested size, for its own bookkeeping.
    assert max(sizes) <= 2 * SOCKET_BUFFER_BYTES


def test_each_loop_turn_accepts_several_connections() -> None:
    """However many clients have connected, one does not cost a loop turn."""
    connections = 80

    async def accept_all() -> None:
        listener = _listener(max_connections=connections)
        with contextlib.ExitStack() as clients:
            for _ in range(connections):
                client = clients.enter_context(socket.socket())
                client.connect(("127.0.0.1", listener.port))
            serving = asyncio.create_task(listener.run())
            turns = 0
            accepted = listener._server.server_state.connections
            while len(accepted) < connections and turns < connections:
                await asyncio.sleep(0)
                turns += 1
        listener.stop()
        await serving
        assert turns < connections / 2

    uvloop.run(accept_all())


def _listener(**changes: Any) -> Listener:
    defaults = {"host": "127.0.0.1", "port": 0, "max_connections": 9}
    return Listener(
        echo_app(),
        receive_timeout_s=1,
        keep_alive_s=1,
        grace_s=1,
        **{**defaults, **changes},
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b", "::1%nowhere"])
def test_an_unusable_address_is_a_config_error(host: str) -> None:
    """The ConfigError names the settings and not their values."""
    with pytest.raises(ConfigError, match="HOST, PORT or ADMIN_PORT") as caught:
        _listener(host=host)
    assert host not in str(caught.value)


def test_a_port_in_use_is_a_config_error(request: pytest.FixtureRequest) -> None:
    """A port that another socket listens on is a ConfigError."""
    first = _listener()
    request.addfinalizer(first._socket.close)
    with pytest.raises(ConfigError, match="PORT or ADMIN_PORT"):
        _listener(port=first.port)
