"""Charts of the last hour: numbers become shapes of an inline SVG, and a text that says the same.

A chart has one bar a minute, stacked from its series. Each series is one path, so that a chart
takes a few kilobytes. Shapes have classes and no styles, which the page's policy forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

HEIGHT = 100
# Of a minute's width.
_BAR_WIDTH = 0.78
# The scale's end is one of these, times a power of ten.
_ROUND = (1, 2, 3, 4, 5, 6, 8, 10)


class Series(NamedTuple):
    """One kind of what is counted.

    Attributes:
        name: What it is called in the legend.
        kind: What it means, as the end of the class of its shapes: good, quiet, warn or bad.
        values: The count of each minute, the oldest first.
    """

    name: str
    kind: str
    values: Sequence[int]

    @property
    def total(self) -> int:
        """The count of all minutes."""
        return sum(self.values)


class Chart(NamedTuple):
    """A chart, ready to be drawn.

    Attributes:
        title: What it shows.
        text: The same in words, for readers who do not see it.
        width: How many minutes it has.
        top: The number at the upper end of its scale.
        total: The count of all minutes and series.
        last_whole: The count of the minute before the present one.
        series: What it is made of, from the bottom to the top of each bar.
        paths: For each series the path of its bars.
    """

    title: str
    text: str
    width: int
    top: int
    total: int
    last_whole: int
    series: Sequence[Series]
    paths: Sequence[str]


def draw(title: str, minutes: Sequence[datetime], series: Sequence[Series]) -> Chart:
    """Return the chart of some series, each with one value for each of *minutes*."""
    totals = [sum(values) for values in zip(*(each.values for each in series), strict=True)]
    top = _scale_end(max(totals, default=0))
    floors = [0] * len(minutes)
    paths = []
    for each in series:
        paths.append(_path(floors, each.values, top))
        floors = [floor + value for floor, value in zip(floors, each.values, strict=True)]
    text = _describe(minutes, totals, series)
    return Chart(
        title,
        text,
        width=len(minutes),
        top=top,
        total=sum(totals),
        last_whole=sum(totals[-2:-1]),
        series=series,
        paths=paths,
    )


def _path(floors: Sequence[int], values: Sequence[int], top: int) -> str:
    """Return rectangles of *values*, each on its floor, as the data of one SVG path."""
    side = (1 - _BAR_WIDTH) / 2
    return "".join(
        f"M{minute + side:.2f} {HEIGHT * (1 - floor / top):.1f}h{_BAR_WIDTH}"
        f"v-{HEIGHT * value / top:.1f}h-{_BAR_WIDTH}z"
        for minute, (floor, value) in enumerate(zip(floors, values, strict=True))
        if value
    )


def _scale_end(greatest: int) -> int:
    """Return the least round number that is not below the greatest bar."""
    power = 1
    while greatest > 10 * power:
        power *= 10
    return next(power * step for step in _ROUND if power * step >= greatest)


def _describe(minutes: Sequence[datetime], totals: Sequence[int], series: Sequence[Series]) -> str:
    if not any(totals):
        return f"None in {len(minutes)} minutes."
    most = max(totals)
    at = minutes[totals.index(most)].astimezone()
    parts = ", ".join(f"{each.total:,} {each.name}" for each in series if each.total)
    return f"{parts} in {len(minutes)} minutes; at most {most:,} in one, at {at:%H:%M}."
