"""The overview: its charts, and what it says of each state of a deployment."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from service.admin.charts import HEIGHT, Series, draw
from service.admin.page import Page
from service.errors import UnavailableReason
from service.findings import Finding, Severity
from service.monitoring.overview import Overview, unavailable
from tests.admin import samples
from tests.support.logins import OpenPage
from tests.support.shown import Shown

MINUTES = [datetime(2026, 7, 31, 14, tzinfo=UTC) + timedelta(minutes=each) for each in range(4)]
# A rectangle in a path: left edge, lower edge, width, height.
BAR = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v-([\d.]+)h-[\d.]+z")


def bars(path: str) -> list[tuple[int, float, float]]:
    """Return each bar's minute, lower edge and height, in units of the drawing."""
    assert BAR.sub("", path) == ""
    return [
        (int(float(left)), HEIGHT - float(low), float(height))
        for left, low, _, height in BAR.findall(path)
    ]


def test_bars_are_stacked_to_scale() -> None:
    """Each bar stands on the one below it, and is as high as its part of the scale."""
    chart = draw(
        "In", MINUTES, [Series("good", "good", [3, 0, 40, 1]), Series("bad", "bad", [1, 0, 10, 2])]
    )

    assert (chart.top, chart.total, chart.last_whole) == (50, 57, 50)
    assert bars(chart.paths[0]) == [(0, 0, 6), (2, 0, 80), (3, 0, 2)]
    assert bars(chart.paths[1]) == [(0, 6, 2), (2, 80, 20), (3, 2, 4)]
    local = MINUTES[2].astimezone()
    assert chart.text == f"44 good, 13 bad in 4 minutes; at most 50 in one, at {local:%H:%M}."


@pytest.mark.parametrize(
    ("greatest", "top"), [(0, 1), (1, 1), (7, 8), (10, 10), (11, 20), (999, 1000), (1001, 2000)]
)
def test_the_scale_is_round_and_fits(greatest: int, top: int) -> None:
    """The scale ends at the next round number; no minutes and no events are no error."""
    assert draw("In", MINUTES, [Series("good", "good", [0, greatest, 0, 0])]).top == top
    assert draw("In", [], [Series("good", "good", [])]).paths == [""]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (
            samples.overview(),
            (
                *("Failing", "fatal Handler rabbitmq", "Next: look at the queue;", "hint Redis"),
                *("Receivers ready 1 of 2", "Workers alive 1 of 2", "Dead letters 61"),
                *(
                    "Waiting 1,206",
                    "admitted or queued 22,022",
                    "rejected 88",
                    "answered with 503 120",
                    "dead-lettered 9",
                ),
                *("1,204 32 min 3 open: unreachable 61 1 8 of 8", "not configured unknown + 2"),
                *("silent 95 s ago", "redis_slow", "3 in 7 days", "2 h ago", "4 events in 7 days"),
                *("71 s behind", "not compared yet api_forbidden", "redacted_not_selected"),
                "hint replication",
            ),
        ),
        (samples.healthy(), ("All is well", "Receivers ready 2 of 2", "Dead letters 0")),
        (
            unavailable(UnavailableReason.REDIS_SLOW),
            (
                *("Failing", "does not answer in time (redis_slow)"),
                "Reconciler Unknown: Redis could not be read. What is wrong at Stripe Unknown:",
            ),
        ),
        (
            samples.overview(
                endpoint_findings=(Finding("stripe_api", Severity.WARNING, (), "no answer"),),
                destinations=(),
            ),
            ("set up to send here Unknown: Stripe's API could not be read.",),
        ),
        (
            Overview(MINUTES[0], "attention", ()),
            (
                *("Attention", "Receivers ready 0 of 0", "no worker has begun to deliver", "never"),
                *("No process gave a sign of life", "send here Unknown: no worker has a key"),
            ),
        ),
    ],
    ids=["failing", "well", "redis away", "stripe away", "empty"],
)
async def test_what_it_says(
    open_page: OpenPage,
    make_page: Callable[..., Page],
    monkeypatch: pytest.MonkeyPatch,
    state: Overview,
    expected: tuple[str, ...],
) -> None:
    """Every fact is there as text, whatever is missing."""
    page = make_page()

    async def collected() -> Overview:
        return state

    monkeypatch.setattr(page, "overview", collected)
    async with open_page(page) as client:
        shown = [Shown((await client.get(path)).text).text for path in ("/", "/endpoints")]
        text = " ".join(shown)

    assert [one for one in expected if one not in text] == []
