"""A run, and what several laws derive from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tests.system.chaos.evidence import Answer, Call, Event, Mark, Run, Transition, Window

# The outcomes of events that no record keeps.
NOT_RECORDED = frozenset({"expired", "ignored"})
# The outcomes of requests that decided nothing about an event.
_UNDECIDED = frozenset({"queued", "duplicate"})


class Facts:
    """A run, and what several laws derive from it, computed once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.transitions = {*run.transitions, *run.deleted}
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        for answer in run.answers:
            self.answers[answer.event_id].append(answer)
        self.acknowledged = {
            event_id: found
            for event_id, answers in self.answers.items()
            if (found := [answer for answer in answers if answer.is_acknowledgement])
        }
        self.forgettable = {
            answer.event_id
            for answer in run.answers
            if any(_overlap(answer, window) for window in run.rollbacks)
        }
        self.last_rollback = max((window.until for window in run.rollbacks), default=0.0)
        self.excused = {run.events[event_id].session_id for event_id in self.forgettable}
        self.taken = {
            handler: [call.transition for call in calls if call.mark is Mark.TOOK]
            for handler, calls in run.calls.items()
        }
        self.logged: dict[str, float] = {}
        for one in sorted(run.decisions, key=lambda one: one.at):
            self.logged.setdefault(one.event_id, one.at)
        self.dead_lettered = {
            handler: {one.transition.place for one in dead_letters}
            for handler, dead_letters in run.dead_letters.items()
        }

    def events(self) -> Iterator[Event]:
        """Yield the events of sessions that are not excused."""
        yield from (one for one in self.run.events.values() if one.session_id not in self.excused)

    def outcomes(self, event: Event) -> list[str]:
        """Return the outcomes of an event, without those that decide nothing."""
        words = (answer.word or "" for answer in self.acknowledged.get(event.id, ()))
        return [word for word in words if word not in _UNDECIDED]

    def kept(self) -> Iterator[Event]:
        """Yield the acknowledged events that Redis was never allowed to forget."""
        for event_id in self.acknowledged.keys() - self.forgettable:
            event = self.run.events[event_id]
            if not NOT_RECORDED & {*self.outcomes(event)}:
                yield event

    def acknowledged_at(self, event_id: str) -> float:
        """Return when an event was first acknowledged; infinity if it never was."""
        answers = self.acknowledged.get(event_id, ())
        return min((answer.answered_at for answer in answers), default=float("inf"))

    def decided_within(self, event: Event) -> tuple[float, float]:
        """Return the earliest and the latest time at which the outcome of an event was decided."""
        known = self.logged.get(event.id, float("inf"))
        for answer in self.acknowledged.get(event.id, ()):
            if answer.word not in _UNDECIDED:
                return answer.asked_at, answer.answered_at
            # The answer was lost. Of a thin event another notification was known.
            if answer.word == "duplicate" and event.id not in self.run.thin:
                known = min(known, answer.answered_at)
        return event.created, known

    def changed_again(self) -> set[str]:
        """Return the sessions that changed after the last time at which Redis could forget."""
        return {
            self.run.events[answer.event_id].session_id
            for answer in self.run.answers
            if answer.word == "admitted" and answer.asked_at > self.last_rollback
        }

    def is_known(self, event: Event) -> bool:
        """Say whether its session's record has an event."""
        record = self.run.records.get(event.session_id)
        return record is not None and event.id in record.events

    def calls_by_handler(self) -> Iterator[tuple[str, list[Call]]]:
        """Yield each handler's calls for sessions that are not excused."""
        for handler, calls in self.run.calls.items():
            yield (
                handler,
                [one for one in calls if one.transition.place.session_id not in self.excused],
            )

    def deliveries(self) -> Iterator[Transition]:
        """Yield every transition, in streams, dead letters and calls, of sessions not excused."""
        dead_letters = (one.transition for each in self.run.dead_letters.values() for one in each)
        calls = (call.transition for each in self.run.calls.values() for call in each)
        for one in {*self.transitions, *dead_letters, *calls}:
            if one.place.session_id not in self.excused:
                yield one


def _overlap(answer: Answer, window: Window) -> bool:
    return answer.asked_at <= window.until and answer.answered_at >= window.since
