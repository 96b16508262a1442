"""A run, with what several laws need to know of it worked out once. Judges nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tests.system.chaos.evidence import Answer, Call, Event, Mark, Run, Transition, Window

# Of what was answered with these words the ledger keeps nothing.
PASSED_BY = frozenset({"expired", "ignored"})


class Facts:
    """A run, with what several laws need to know of it worked out once."""

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
            for handler, calls in run.journals.items()
        }
        self.buried = {
            handler: {letter.transition.place for letter in letters}
            for handler, letters in run.letters.items()
        }

    def events(self) -> Iterator[Event]:
        """Yield the events whose sessions nothing excuses."""
        yield from (one for one in self.run.events.values() if one.session_id not in self.excused)

    def words(self, event: Event) -> list[str]:
        """Return what was said to an event, without the word for what is known already."""
        said = (answer.word or "" for answer in self.acknowledged.get(event.id, ()))
        return [word for word in said if word != "duplicate"]

    def kept(self) -> Iterator[Event]:
        """Yield the events that were acknowledged and that nobody may have forgotten."""
        for event_id in self.acknowledged.keys() - self.forgettable:
            event = self.run.events[event_id]
            if not PASSED_BY & {*self.words(event)}:
                yield event

    def acknowledged_at(self, event_id: str) -> float:
        """Return when an event was first acknowledged; infinity if it never was."""
        answers = self.acknowledged.get(event_id, ())
        return min((answer.answered_at for answer in answers), default=float("inf"))

    def moved_on(self) -> set[str]:
        """Return the sessions that were changed after the last time Redis could forget."""
        return {
            self.run.events[answer.event_id].session_id
            for answer in self.run.answers
            if answer.word == "admitted" and answer.asked_at > self.last_rollback
        }

    def is_known(self, event: Event) -> bool:
        """Say whether the ledger remembers an event."""
        record = self.run.records.get(event.session_id)
        return record is not None and event.id in record.events

    def journals(self) -> Iterator[tuple[str, list[Call]]]:
        """Yield each handler's calls for the sessions that nothing excuses."""
        for handler, calls in self.run.journals.items():
            yield (
                handler,
                [one for one in calls if one.transition.place.session_id not in self.excused],
            )

    def ways_out(self) -> Iterator[Transition]:
        """Yield every transition as anybody saw it, where nothing excuses its session."""
        letters = (letter.transition for each in self.run.letters.values() for letter in each)
        calls = (call.transition for each in self.run.journals.values() for call in each)
        for one in {*self.transitions, *letters, *calls}:
            if one.place.session_id not in self.excused:
                yield one


def _overlap(answer: Answer, window: Window) -> bool:
    return answer.asked_at <= window.until and answer.answered_at >= window.since
