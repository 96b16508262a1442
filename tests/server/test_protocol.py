"""Connections: how many there may be, how each ends, and how requests are shed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from service.server.closing import MAX_LINGERING
from service.server.listener import Listener
from tests.support.apps import INCOMPLETE, Gate, echo_app, post
from tests.support.harness import answer, connected, listening, rest
from tests.support.virtual_time import push
from tests.support.waiting import DEADLINE_S, until
from tests.support.web_client import counted, sample

BUSY = b'{"error":"unavailable"}'


def refused_busy() -> float:
    """Return how many connections were refused because there were too many."""
    return sample("idv_connections_refused_total", reason="busy")


@asynccontextmanager
async def opened(
    port: int, count: int
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """Yield *count* raw connections, opened one after the other."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(port)) for _ in range(count)]


async def is_answered_busy(reader: asyncio.StreamReader) -> bool:
    """Say whether one 503 with Retry-After is all that comes before the end."""
    head, _, body = (await rest(reader)).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert {b"retry-after: 5", b"connection: close"} <= set(lines)
    return lines[0] == b"HTTP/1.1 503 Service Unavailable" and body == BUSY


async def test_above_the_limit_a_new_connection_is_refused_at_once() -> None:
    """If all connections have a request in flight, the next one gets a 503; those go on."""
    gate = Gate()
    async with (
        listening(echo_app(gate), max_connections=3) as listener,
        opened(listener.port, 3) as busy,
    ):
        for _, writer in busy:
            writer.write(post(path="/gate"))
        await until(lambda: gate.entered == 3)
        for _ in range(MAX_LINGERING + 5):
            async with connected(listener.port) as (reader, writer):
                writer.write(post())
                assert await is_answered_busy(reader)
        gate.opened.set()
        for reader, _ in busy:
            assert await answer(reader) == (200, b"x")


async def test_lingering_is_bounded() -> None:
    """However many connections are refused, few linger, and not for long."""
    gate = Gate()
    async with (
        listening(echo_app(gate), max_connections=1) as listener,
        connected(listener.port) as (busy, writer),
    ):
        writer.write(post(path="/gate"))
        await until(lambda: gate.entered)
        before = refused_busy()
        async with opened(listener.port, MAX_LINGERING + 20):
            await until(lambda: refused_busy() - before == MAX_LINGERING + 20)
            assert 0 < listener._state.lingering <= MAX_LINGERING
            await until(lambda: listener._state.lingering == 0)
        gate.opened.set()
        assert await answer(busy) == (200, b"x")


@pytest.mark.parametrize("sent", INCOMPLETE.values(), ids=INCOMPLETE)
async def test_the_slowest_is_evicted(sent: bytes) -> None:
    """At the limit a new connection evicts the one that has waited for its client longest."""
    async with (
        listening(echo_app(), max_connections=3, receive_timeout_s=60) as listener,
        opened(listener.port, 3) as slow,
    ):
        for _, writer in slow:
            writer.write(sent)
            await asyncio.sleep(0.01)
        async with connected(listener.port) as (reader, writer):
            writer.write(post())
            assert await answer(reader) == (200, b"x")
        assert await is_answered_busy(slow[0][0])
        for _, writer in slow[1:]:
            assert not writer.transport.is_closing()


async def test_idle_connections_are_evicted_without_a_response() -> None:
    """Idle connections make room, and none gets a response to no request."""
    async with (
        listening(echo_app(), max_connections=3) as listener,
        opened(listener.port, 3) as pool,
    ):
        for reader, writer in pool:
            writer.write(post())
            await answer(reader)
        async with connected(listener.port) as (reader, writer):
            writer.write(post())
            assert await answer(reader) == (200, b"x")
        assert await rest(pool[0][0]) == b""
        for reader, writer in pool[1:]:
            writer.write(post())
            assert await answer(reader) == (200, b"x")


@contextlib.contextmanager
def reading_slowly(listener: Listener) -> Iterator[socket.socket]:
    """Yield an unread connection with small buffers on both sides."""
    listener._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", listener.port))
        slow.setblocking(False)
        yield slow


def are_blocked(listener: Listener) -> int:
    """Return how many connections wait for their clients to read."""
    connections: Any = listener._server.server_state.connections
    return sum(connection._write_timer is not None for connection in connections)


UNREAD = {"one large": post(b"y" * 60_000), "pipelined": post(b"y" * 7_000) * 8}


@pytest.mark.parametrize(
    ("sent", "read"), [(UNREAD["one large"], 5), (UNREAD["pipelined"], 0)], ids=UNREAD
)
async def test_a_response_has_a_deadline(sent: bytes, read: int) -> None:
    """A client must take a whole response in time: a byte now and then is not enough."""
    async with listening(echo_app(), receive_timeout_s=600, keep_alive_s=3600) as listener:
        connections = listener._server.server_state.connections
        with reading_slowly(listener) as slow:
            await asyncio.get_running_loop().sock_sendall(slow, sent)
            await until(lambda: are_blocked(listener))
            push(540)
            for _ in range(read):
                assert slow.recv(100)
                await asyncio.sleep(0.01)
            assert len(connections) == 1
            push(60)
            await until(lambda: not connections)


async def test_a_client_that_reads_in_time_may_be_slow() -> None:
    """A response that is taken lifts its deadline, and the next one has its own."""
    async with listening(echo_app(), receive_timeout_s=600, keep_alive_s=36_000) as listener:
        loop = asyncio.get_running_loop()
        connections = listener._server.server_state.connections
        with reading_slowly(listener) as slow:
            for _ in range(3):
                await loop.sock_sendall(slow, post(b"y" * 60_000))
                await until(lambda: are_blocked(listener))
                push(540)
                heard = b""
                while not heard.endswith(b"y" * 60_000):
                    heard += await asyncio.wait_for(loop.sock_recv(slow, 65_536), DEADLINE_S)
                assert heard.startswith(b"HTTP/1.1 200 ")
                await until(lambda: not are_blocked(listener))
                push(540)
                await asyncio.sleep(0.02)
                assert len(connections) == 1


@pytest.mark.parametrize("sent", UNREAD.values(), ids=UNREAD)
async def test_clients_that_do_not_read_are_evicted(sent: bytes) -> None:
    """At the limit a new connection evicts a client that does not take its response."""
    gate = Gate()
    async with (
        listening(echo_app(gate), max_connections=2, receive_timeout_s=600) as listener,
        connected(listener.port) as (busy, writer),
    ):
        writer.write(post(path="/gate"))
        await until(lambda: gate.entered)
        with reading_slowly(listener) as slow:
            await asyncio.get_running_loop().sock_sendall(slow, sent)
            await until(lambda: are_blocked(listener))
            async with connected(listener.port) as (reader, newcomer):
                newcomer.write(post())
                assert await answer(reader) == (200, b"x")
            assert not are_blocked(listener)
        gate.opened.set()
        assert await answer(busy) == (200, b"x")


@pytest.mark.parametrize("before", [b"", post()], ids=["a new", "a used"])
@pytest.mark.parametrize("cut", [10, 40, -1])
async def test_a_request_that_has_begun_may_finish(before: bytes, cut: int) -> None:
    """A request that was partly received before the stop is received and answered."""
    async with listening(echo_app()) as listener, connected(listener.port) as (reader, writer):
        if before:
            writer.write(before)
            await answer(reader)
        whole = post(b"y" * 50)
        writer.write(whole[:cut])
        await until(lambda: _has_begun(listener))
        listener.stop()
        await until(lambda: not listener._server.servers[0].is_serving())
        writer.write(whole[cut:])
        assert await answer(reader) == (200, b"y" * 50)
        assert await rest(reader) == b""


def _has_begun(listener: Listener) -> bool:
    return any(
        connection._stage.name != "START"  # type: ignore[union-attr]
        for connection in listener._server.server_state.connections
    )


async def test_a_final_response_waits_for_those_before_it() -> None:
    """Garbage behind requests in flight is answered after them, once."""
    gate = Gate()
    async with listening(echo_app(gate)) as listener, connected(listener.port) as (reader, writer):
        writer.write(post(path="/gate") + post(b"y"))
        await until(lambda: gate.entered)
        writer.write(b"garbage\r\n\r\n" + post())
        await asyncio.sleep(0.05)
        gate.opened.set()
        assert await answer(reader) == (200, b"x")
        assert await answer(reader) == (200, b"y")
        assert await answer(reader) == (400, b'{"error":"request_malformed"}')
        assert await rest(reader) == b""


async def test_an_answered_request_is_not_answered_again() -> None:
    """A body that turns out malformed after its response ends the connection without another."""
    async with listening(echo_app()) as listener, connected(listener.port) as (reader, writer):
        writer.write(
            b"POST /unread HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
        )
        assert await answer(reader) == (200, b"unread")
        writer.write(b"garbage\r\n")
        assert await rest(reader) == b""


async def test_under_overload_requests_are_shed() -> None:
    """Without available slots a POST gets a 503 at once, and keeps its connection."""
    gate, busy = Gate(), [True]
    before = counted("busy")
    async with (
        listening(echo_app(gate), available_slots=lambda: 0 if busy[0] else 1) as listener,
        connected(listener.port) as (reader, writer),
    ):
        for _ in range(3):
            writer.write(post(path="/gate"))
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\nretry-after: 5\r\n" in head
            assert b"connection:" not in head
            assert await reader.readexactly(len(BUSY)) == BUSY
        assert gate.entered == 0
        busy[0] = False
        writer.write(post())
        assert await answer(reader) == (200, b"x")
    # The listener reports the last ones when it stops.
    assert counted("busy") - before == 3


async def test_requests_of_one_loop_turn_get_no_more_slots_than_there_are() -> None:
    """Requests that are read in the same loop turn count against each other."""
    gate, places = Gate(), 3
    async with (
        listening(echo_app(gate), available_slots=lambda: places - gate.entered) as listener,
        opened(listener.port, 20) as clients,
    ):
        connections = listener._server.server_state.connections
        await until(lambda: len(connections) == len(clients))
        for _, writer in clients:
            writer.write(post(path="/gate"))
        answers = [asyncio.create_task(answer(reader)) for reader, _ in clients]
        await until(lambda: sum(each.done() for each in answers) == len(clients) - 3)
        gate.opened.set()
        statuses = [status for status, _ in await asyncio.gather(*answers)]
        assert gate.entered == 3
        assert sorted(statuses) == [200] * 3 + [503] * 17
        places += 3
        for reader, writer in clients[:3]:
            writer.write(post(path="/gate"))
            assert await answer(reader) == (200, b"x")


async def test_after_a_shed_request_a_connection_is_idle() -> None:
    """It has no deadline of a request, and ends with the keep-alive time."""
    async with (
        listening(
            echo_app(), receive_timeout_s=600, keep_alive_s=3600, available_slots=lambda: 0
        ) as listener,
        connected(listener.port) as (reader, writer),
    ):
        writer.write(post())
        assert await answer(reader) == (503, BUSY)
        push(2 * 600)
        await asyncio.sleep(0.02)
        assert not reader.at_eof()
        push(3600)
        assert await rest(reader) == b""


async def test_unread_503s_do_not_pile_up() -> None:
    """Under overload too, a client that takes no responses is cut off, and fills no memory."""
    async with listening(echo_app(), receive_timeout_s=2, available_slots=lambda: 0) as listener:
        connections = listener._server.server_state.connections
        with reading_slowly(listener) as deaf:
            most = 0
            with contextlib.suppress(ConnectionError):
                while True:
                    most = max([most, *(c.transport.get_write_buffer_size() for c in connections)])
                    with contextlib.suppress(BlockingIOError):
                        deaf.send(post())
                    await asyncio.sleep(0.002)
            await until(lambda: not connections)
    assert 0 < most < 96 * 1024
