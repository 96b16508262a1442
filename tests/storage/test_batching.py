"""The laws of `coalesce`: one flight at a time, and everybody receives what is his."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.storage.batching import Batcher

pytestmark = pytest.mark.anyio


class Carrier:
    """Carries numbers, answers each with its double, and flies only when let."""

    def __init__(self) -> None:
        self.flights: list[list[int]] = []
        self.in_the_air = 0
        self.may_land = asyncio.Event()
        self.may_land.set()
        self.fails_on: dict[int, Exception] = {}

    async def fly(self, items: list[int]) -> Sequence[int | Exception]:
        """Carry one flight."""
        self.flights.append(items)
        self.in_the_air += 1
        assert self.in_the_air == 1
        try:
            await self.may_land.wait()
            await asyncio.sleep(0)
        finally:
            self.in_the_air -= 1
        for item in items:
            if item in self.fails_on:
                raise self.fails_on[item]
        return [item * 2 if item >= 0 else ValueError(str(item)) for item in items]


async def turn() -> None:
    """Let everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_loop_turn_is_one_flight() -> None:
    """What is submitted within one loop turn goes together, in order, each with its own reply."""
    carrier = Carrier()
    coalescer = Batcher(carrier.fly, most=100)

    replies = await asyncio.gather(*(coalescer.submit(n) for n in range(50)))

    assert replies == [n * 2 for n in range(50)]
    assert carrier.flights == [list(range(50))]


async def test_a_patient_one_waits_while_more_comes() -> None:
    """Items that come in one turn after the other go together, up to a whole flight."""
    carrier = Carrier()
    coalescer = Batcher(carrier.fly, most=100, patient=True)
    replies = []
    for n in range(150):
        replies.append(coalescer.submit(n))
        await asyncio.sleep(0)

    assert await asyncio.gather(*replies) == [n * 2 for n in range(150)]
    assert [len(flight) for flight in carrier.flights] == [100, 50]


async def test_a_single_item_goes_at_once() -> None:
    """A single item waits for nothing: no timer, just the next loop turn."""
    carrier = Carrier()
    coalescer = Batcher(carrier.fly, most=100)
    reply = coalescer.submit(1)

    await asyncio.sleep(0)

    assert carrier.flights == [[1]]
    assert await reply == 2


async def test_one_flight_at_a_time() -> None:
    """While one flight is under way the next gathers; it goes in order when that has landed."""
    carrier = Carrier()
    carrier.may_land.clear()
    coalescer = Batcher(carrier.fly, most=100)
    replies = [coalescer.submit(1)]
    for n in range(2, 6):
        await turn()
        replies.append(coalescer.submit(n))
    assert carrier.flights == [[1]]

    carrier.may_land.set()

    assert await asyncio.gather(*replies) == [2, 4, 6, 8, 10]
    assert carrier.flights == [[1], [2, 3, 4, 5]]


async def test_a_flight_takes_no_more_than_most() -> None:
    """More than fit go in several flights, still in order."""
    carrier = Carrier()
    coalescer = Batcher(carrier.fly, most=4)

    replies = await asyncio.gather(*(coalescer.submit(n) for n in range(10)))

    assert replies == [n * 2 for n in range(10)]
    assert carrier.flights == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_an_exception_is_its_own_items() -> None:
    """An exception among the replies is raised to the one it is for."""
    coalescer = Batcher(Carrier().fly, most=100)

    replies = await asyncio.gather(
        *(coalescer.submit(n) for n in (1, -2, 3)), return_exceptions=True
    )

    assert [replies[0], replies[2]] == [2, 6]
    assert isinstance(replies[1], ValueError)


async def test_a_failing_flight_fails_those_aboard() -> None:
    """A flight that raises fails everybody aboard and nobody else; the next one goes."""
    carrier = Carrier()
    carrier.fails_on[2] = OSError("down")
    coalescer = Batcher(carrier.fly, most=2)

    replies = await asyncio.gather(
        *(coalescer.submit(n) for n in (1, 2, 3)), return_exceptions=True
    )

    assert [type(reply) for reply in replies] == [OSError, OSError, int]
    assert await coalescer.submit(4) == 8


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_a_flight_with_the_wrong_number_of_replies_leaves_nobody_waiting(count: int) -> None:
    """Too few replies fail whoever went without; nobody waits for ever and flights go on."""

    async def fly(items: list[int]) -> list[int]:
        return items[:count]

    coalescer = Batcher(fly, most=100)

    replies = await asyncio.gather(
        *(coalescer.submit(n) for n in (1, 2, 3)), return_exceptions=True
    )

    assert replies[:count] == [1, 2, 3][:count]
    assert all(isinstance(reply, ValueError) for reply in replies[count:])


async def test_a_waiter_that_leaves_disturbs_nobody() -> None:
    """A waiter that is cancelled, before or during the flight, changes nothing for the others."""
    carrier = Carrier()
    carrier.may_land.clear()
    coalescer = Batcher(carrier.fly, most=100)

    async def wait_for(item: int) -> int:
        return await coalescer.submit(item)

    waiters = [asyncio.create_task(wait_for(n)) for n in (1, 2)]
    await turn()
    waiters += [asyncio.create_task(wait_for(n)) for n in (3, 4)]
    await turn()
    for left in (waiters[0], waiters[2]):
        left.cancel()
    await turn()
    carrier.may_land.set()

    assert await waiters[1] == 4
    assert await waiters[3] == 8
    assert waiters[0].cancelled()
    assert waiters[2].cancelled()


async def test_a_flight_cut_off_leaves_nobody_waiting() -> None:
    """When the flight itself is cancelled, whoever is aboard is too."""
    carrier = Carrier()
    carrier.may_land.clear()
    coalescer = Batcher(carrier.fly, most=100)
    reply = coalescer.submit(1)
    await turn()

    assert coalescer._flights is not None
    coalescer._flights.cancel()

    await asyncio.wait({reply})
    assert reply.cancelled()


async def test_nobody_boards_what_is_closed() -> None:
    """From the moment `close` begins nothing more is carried, and who asks for it hears so."""
    carrier = Carrier()
    carrier.may_land.clear()
    coalescer = Batcher(carrier.fly, most=100)
    coalescer.submit(1)
    await turn()
    closing = asyncio.create_task(coalescer.close())
    while not closing.done():
        assert coalescer.submit(2) is not None
        await asyncio.sleep(0)
    reply = coalescer.submit(3)

    assert reply.cancelled()
    assert coalescer._flights is None
    assert carrier.flights == [[1]]
