"""The list of planted bugs, each one exact change of text; `mutants` hunts them.

A change of a line that is listed here has to change its bug, too.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted bug.

    Attributes:
        bug: What is wrong now.
        path: The file, from the root.
        old: What stands there, exactly once.
        new: What is put in its place.
        tests: The tests that must fail, as arguments of pytest, relative to `tests`; if there are
            none, those of the file's own module.
    """

    bug: str
    path: str
    old: str
    new: str
    tests: str = ""

    @property
    def targets(self) -> list[str]:
        """The tests that must fail, as arguments of pytest, relative to `tests`."""
        source = PurePath(self.path).relative_to("service")
        own = f"{source.with_name(f'test_{source.stem}')}.py"
        return self.tests.split() or [own]


_ADMIT = "service/inbox/admit.lua"
_KNOWN = "  if known then return answer_known(session, event, known, record) end\n"
_APPENDED = (
    "    redis.call('XADD', stream, '*', 'change', change, 'previous', '', 'sequence', sequence)\n"
)
_UNFENCED = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end\n"
_MAY_TAKE = (
    "if ARGV[3] == 'take' then\n"
    "  is_allowed = is_allowed or not owner or (description ~= '' and description == ARGV[4])\n"
    "end\n"
)
_LATE = "  if record.latest and is_late(event, record) then\n"
_SETTLED = "      or result and event.created <= created_in(result.key) + skew_s\n"
_WAITED = "    if isinstance(confirmed, Exception) or confirmed < needed:\n"
_CALLED = "            error = await self._calls.call(item)\n"
_ENOUGH = "        if delay_s is None:\n"
_AWAITED = "        return await self._submit(self._submission(event, change))\n"
_GUESSED = (
    "        try:\n            return await self._submit(self._submission(event, change))\n"
    "        except Unavailable:\n"
    "            return Admission(Outcome.DUPLICATE, 0, None, after_final=False)\n"
)
_ADMITTED = "        admission = await self._inbox.admit(event, change)\n"
_UNAWAITED = (
    "        __import__('asyncio').ensure_future(self._inbox.admit(event, change))\n"
    "        admission = Admission(Outcome.ADMITTED, 1, None, after_final=False)\n"
)

MUTANTS = (
    # The way in: what is signed, and when.
    Mutant(
        "a signature of the scheme v0 is accepted",
        "service/stripe/signatures.py",
        "|v1=([0-9a-f]{64})",
        "|v[01]=([0-9a-f]{64})",
    ),
    Mutant(
        "a timestamp of the future is accepted",
        "service/stripe/signatures.py",
        "    if age_s < -tolerance_s:\n",
        "    if age_s < -tolerance_s * 10**6:\n",
    ),
    Mutant(
        "an old signature is accepted for longer",
        "service/stripe/signatures.py",
        "    if age_s > tolerance_s:\n",
        "    if age_s > tolerance_s * 2:\n",
    ),
    Mutant(
        "digests are compared, but not in constant time",
        "service/stripe/signatures.py",
        "if hmac.compare_digest(expected, signature) and",
        "if expected == signature and",
    ),
    # The way in: remembered, judged and handed over in one step, before 2xx.
    Mutant(
        "an event is acknowledged before it is admitted",
        "service/inbox/receiver.py",
        _ADMITTED,
        _UNAWAITED,
        "inbox/test_receiver.py web/test_app.py",
    ),
    Mutant(
        "a duplicate is answered while Redis is unsure",
        "service/inbox/admission.py",
        _AWAITED,
        _GUESSED,
        "inbox/test_admission_failures.py::TestLostReplies",
    ),
    Mutant(
        "the nonce is dropped: a repeated request is a duplicate",
        _ADMIT,
        "  if nonce ~= event.nonce then\n",
        "  if true then\n",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "every nonce is the same: every copy is answered as the first",
        "service/inbox/admission.py",
        '    return f"{random.getrandbits(32):08x}"\n',
        '    return "constant"\n',
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "late events are admitted",
        _ADMIT,
        _LATE,
        _LATE.replace("record.latest and", "false and"),
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "duplicates are found after the event was appended",
        _ADMIT,
        _KNOWN,
        _APPENDED + _KNOWN,
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "events older than the memory are admitted",
        _ADMIT,
        "if event.created < min_created then return answer(",
        "if false then return answer(",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "ids that could come again are forgotten",
        _ADMIT,
        "if created and tonumber(created) < min_kept then",
        "if created and tonumber(created) < min_kept + 9999999 then",
        "inbox/test_admission_machine.py inbox/test_admission_record.py",
    ),
    Mutant(
        "every transition begins an epoch",
        _ADMIT,
        "  if record.server == server_name() then\n",
        "  if false then\n",
        "inbox/test_admission_machine.py inbox/test_admission.py",
    ),
    Mutant(
        "a server that may have lost transitions goes on numbering",
        _ADMIT,
        "  if record.server == server_name() then\n",
        "  if record.server then\n",
        "inbox/test_admission_epochs.py",
    ),
    Mutant(
        "a new epoch may be below the one before",
        _ADMIT,
        "math.max((record.epoch or 0) + 1, now_ms)",
        "now_ms",
        "inbox/test_admission_epochs.py",
    ),
    Mutant(
        "an id is forgotten as soon as one clock says that it is too old",
        "service/inbox/admission.py",
        "MAX_CLOCK_LAG_S = 2 * MAX_CLOCK_DIFFERENCE_S\n",
        "MAX_CLOCK_LAG_S = 0\n",
        "inbox/test_admission_record.py",
    ),
    Mutant(
        "copies of a notification are queued",
        _ADMIT,
        "  if not known then\n    if tonumber(created)",
        "  if true then\n    if tonumber(created)",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "a notification is remembered although there is no room for it",
        _ADMIT,
        "  local known = redis.call('GET', noted)\n",
        "  local known = redis.call('SET', noted, nonce, 'NX', 'GET')\n",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "a copy of a notification is answered without a write that WAIT could cover",
        _ADMIT,
        "  redis.call('SET', noted, known or nonce, 'EX', NOTED_S)\n",
        "  if not known then redis.call('SET', noted, nonce, 'EX', NOTED_S) end\n",
        "inbox/test_admission_record.py",
    ),
    Mutant(
        "old notifications are queued",
        _ADMIT,
        "    if tonumber(created) < min_created then return answer(",
        "    if false then return answer(",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "the ids of sessions that were read are never forgotten",
        _ADMIT,
        "  return start == 'evt_' or start == 'read'\n",
        "  return start == 'evt_'\n",
        "inbox/test_admission_record.py",
    ),
    Mutant(
        "where age is not judged no id is forgotten",
        "service/inbox/admission.py",
        "min_created - MAX_CLOCK_LAG_S),\n",
        "(min_created if self._judges_age else 0) - MAX_CLOCK_LAG_S),\n",
        "inbox/test_admission_record.py",
    ),
    Mutant(
        "only transitions prolong a record",
        _ADMIT,
        "  redis.call('EXPIRE', session, retention_s)\n",
        "  if outcome == 'admitted' then redis.call('EXPIRE', session, retention_s) end\n",
        "inbox/test_admission.py::TestVerdicts",
    ),
    Mutant(
        "a record ends with the age limit",
        "service/config.py",
        '    ("max_event_age_days", operator.lt, "more than",',
        '    ("max_event_age_days", operator.le, "more than",',
    ),
    Mutant(
        "events are admitted under another layout",
        _ADMIT,
        "~= layout then return 'layout_differs' end\n",
        "== '' then return 'layout_differs' end\n",
        "inbox/test_admission_guards.py",
    ),
    Mutant(
        "events are admitted while the clocks differ",
        _ADMIT,
        "> tolerance_s then return 'clocks_differ' end\n",
        "> 10 * tolerance_s then return 'clocks_differ' end\n",
        "inbox/test_admission_guards.py",
    ),
    Mutant(
        "a connection that another task closes ends the process",
        "service/storage/redis_connection.py",
        "        if writer is None or writer.is_closing():\n",
        "        if writer.is_closing():\n",
        "storage/test_connections.py",
    ),
    Mutant(
        "a receiver decides where its worker begins",
        "service/runtime/process.py",
        "            _tune_garbage_collector(works=bool(chosen))\n",
        "            _ = asyncio.create_task(_create_groups(context))\n"
        "            _tune_garbage_collector(works=bool(chosen))\n",
        "system/test_end_to_end.py",
    ),
    Mutant(
        "the step before is remembered wrongly",
        _ADMIT,
        "  local previous = record.status or ''\n",
        "  local previous = record.previous or ''\n",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "a full stream is trimmed where no group has read yet",
        _ADMIT,
        "  end\n  if redis.call('XLEN', stream) >= max_entries then return answer('full') end\n",
        "  end\n  redis.call('XTRIM', stream, 'MAXLEN', max_entries - 1)\n",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "an unchanged event does not move the order key up",
        _ADMIT,
        "pack_state(record.sequence, record.epoch, record.server, hash, kind),\n"
        "      latest_fields(session, event, record))\n",
        "pack_state(record.sequence, record.epoch, record.server, hash, kind))\n",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "a late step un-verifies",
        _ADMIT,
        "      or is_final(record.kind) or latest.key >= REDACTION_UNIT\n",
        "      or latest.key >= REDACTION_UNIT\n",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "a step is admitted after redaction has begun",
        _ADMIT,
        "      or is_final(record.kind) or latest.key >= REDACTION_UNIT\n",
        "      or is_final(record.kind)\n",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "a step just after a result undoes it",
        _ADMIT,
        _SETTLED,
        "",
        "inbox/test_admission_lives.py",
    ),
    Mutant(
        "a result just before a step is late",
        _ADMIT,
        "  local is_overtaken = event.created < created_in(latest.key) - skew_s\n",
        "  local is_overtaken = event.created < created_in(latest.key)\n",
        "inbox/test_admission_lives.py",
    ),
    Mutant(
        "a result is compared with steps only",
        _ADMIT,
        "  if result and is_lower(event, result) then return true end\n",
        "",
        "inbox/test_admission_machine.py",
    ),
    Mutant(
        "equal order keys are not ordered",
        _ADMIT,
        "  if one.key ~= other.key then return one.key < other.key end\n",
        "  if true then return one.key < other.key end\n",
        "inbox/test_admission.py::TestOrder",
    ),
    Mutant(
        "a final status cannot be reversed",
        "service/transitions/ordering.py",
        "_redaction_rank(change) * _REDACTION_UNIT + created",
        "_redaction_rank(change) * _REDACTION_UNIT + (created + (type_rank == 3) * 10**9)",
        "inbox/test_admission_lives.py",
    ),
    Mutant(
        "a reversal is not said to be one",
        "service/transitions/lifecycle.py",
        "    return previous in FINAL and current not in",
        "    return previous == current and current not in",
        "operations/test_synthetic_events.py",
    ),
    Mutant(
        "what no replica has is acknowledged",
        "service/storage/scripts.py",
        _WAITED,
        _WAITED.replace("< needed", "< 0"),
        "inbox/test_admission_failures.py::TestReplica",
    ),
    Mutant(
        "a secret is left in the stored form",
        "service/transitions/transition.py",
        "        metadata=session.metadata,\n",
        '            metadata={"url": session.url.reveal() if session.url else ""},\n',
        "transitions/test_stream_entry.py",
    ),
    Mutant(
        "Content-Length is trusted",
        "service/web/app.py",
        "            if size > self._max_body_bytes:\n",
        "            if False:\n",
    ),
    Mutant(
        "the client repeats what may have been executed",
        "service/storage/clients.py",
        '        "retry": Retry(NoBackoff(), 0),\n',
        '        "retry": Retry(NoBackoff(), 3),\n',
    ),
    Mutant(
        "the client hands out connections with an answer left in them",
        "service/storage/clients.py",
        '        "maint_notifications_config": MaintNotificationsConfig(enabled=False),\n',
        "",
    ),
    Mutant(
        "any one replica stands for all",
        "service/storage/scripts.py",
        "    needed = max(min_replicas, len(role[2]))\n",
        "    needed = min_replicas\n",
        "storage/test_scripts.py::TestReplicas",
    ),
    Mutant(
        "what is not synced is acknowledged as if it were",
        "service/storage/scripts.py",
        '    config = [("CONFIG", "GET", *FSYNC_SETTINGS)] if needs.fsync else []\n',
        "    config: list[Any] = []\n",
        "storage/test_scripts.py::TestFsync",
    ),
    Mutant(
        "what one connection has verified counts for the next",
        "service/storage/redis_connection.py",
        "        self.verified_needs = None\n",
        "        pass\n",
        "storage/test_scripts.py::TestFsync",
    ),
    Mutant(
        "a Redis that takes nothing is no Redis",
        "service/storage/health.py",
        "        return error if unavailable_reason(error) in _NO_ANSWER else error_word(error)\n",
        "        return error\n",
    ),
    Mutant(
        "a primary that was demoted is not left",
        "service/storage/redis_connection.py",
        "                self._generation.start_next()\n",
        "                pass\n",
        "system/topologies/test_demotion.py",
    ),
    Mutant(
        "only who is refused leaves a primary that was demoted",
        "service/storage/redis_connection.py",
        "is_stale = self.is_connected and self._generation_number != self._generation.number\n",
        "is_stale = False\n",
        "system/topologies/test_demotion.py",
    ),
    Mutant(
        "two calls side by side share the connection that is kept",
        "service/storage/scripts.py",
        "        connection, self._last_used = self._last_used, None\n",
        "        connection = self._last_used\n",
        "storage/test_connections.py::TestPool",
    ),
    Mutant(
        "the connection that is kept is not looked at before it is used again",
        "service/storage/scripts.py",
        "            await self._pool.ensure_connection(connection)\n",
        "",
        "storage/test_connections.py::TestPool",
    ),
    Mutant(
        "a Redis that forgets what it likes is good enough",
        "service/storage/assessment.py",
        '    if policy in ("noeviction", None):\n',
        "    if policy != 1:\n",
    ),
    Mutant(
        "waiting for Redis has no end",
        "service/storage/batching.py",
        "                future.set_exception(self._make_error())\n",
        "                pass\n",
    ),
    Mutant(
        "a replay is dropped by a queue as a repeat",
        "service/transitions/cloudevents.py",
        "        deduplication_id=transition.event_id + replay,\n",
        "        deduplication_id=transition.event_id,\n",
    ),
    Mutant(
        "requests of an earlier loop turn still take slots",
        "service/server/listener_state.py",
        "        self.requests_this_turn = 0\n",
        "        pass\n",
        "server/test_protocol.py",
    ),
    Mutant(
        "one connection is accepted in a loop turn",
        "service/server/listener.py",
        "range(ACCEPTED_PER_TURN - 1)",
        "range(0)",
    ),
    Mutant(
        "requests of one loop turn are not counted: all get slots",
        "service/server/protocol.py",
        "        self._listener.requests_this_turn += 1\n",
        "",
    ),
    Mutant(
        "headers may be of any size",
        "service/server/protocol.py",
        "        if self._bytes_since_body > MAX_HEADER_BYTES:\n",
        "        if False:\n",
        "server/test_raw_http.py server/test_protocol.py",
    ),
    Mutant(
        "the task of a lost connection waits for ever",
        "service/server/protocol.py",
        "        super().connection_lost(exc)\n        self._wake()\n",
        "        super().connection_lost(exc)\n",
        "server/test_listener.py",
    ),
    Mutant(
        "a response leaves in two writes",
        "service/server/one_write.py",
        "            self._complete(head + body)\n",
        "            self.transport.write(head)\n            self._complete(body)\n",
    ),
    Mutant(
        "a connection is closed while it is used",
        "service/server/closing.py",
        "        left_s = self._since + self._deadlines_s[self._state] - self.loop.time()\n",
        "        left_s = 0\n",
        "server/test_listener.py",
    ),
    Mutant(
        "a used connection never becomes idle for long enough",
        "service/server/closing.py",
        "            self._timer = self.loop.call_later(left_s, self._on_timer)\n",
        "            pass\n",
        "server/test_listener.py::test_idle_time_is_counted_from_the_last_answer",
    ),
    Mutant(
        "a client that does not read its responses is never cut off",
        "service/server/closing.py",
        "self._write_timer = self.loop.call_later(self._listener.receive_timeout_s, self._abort)",
        "pass",
        "server/test_protocol.py",
    ),
    Mutant(
        "a client that does not read its responses is never evicted",
        "service/server/closing.py",
        "            return self._write_timer.when() - self._listener.receive_timeout_s\n",
        "            return math.inf\n",
        "server/test_protocol.py",
    ),
    Mutant(
        "a body may have any number of chunks",
        "service/server/protocol.py",
        "        if self._chunks > MAX_SMALL_CHUNKS + self._body_bytes // MIN_CHUNK_BYTES:\n",
        "        if False:\n",
        "server/test_raw_http.py",
    ),
    Mutant(
        "there may be any number of short headers",
        "service/server/protocol.py",
        "        if len(self.headers) == MAX_HEADERS:\n",
        "        if False:\n",
        "server/test_raw_http.py",
    ),
    Mutant(
        "whitespace after a header's value is part of it",
        "service/server/protocol.py",
        'value.strip(b" \\t")',
        "value",
        "server/test_raw_http.py web/test_request_log.py",
    ),
    Mutant(
        "a rejection keeps the rejected body",
        "service/web/app.py",
        "            return error.with_traceback(None)\n",
        "            return error\n",
        "web/test_request_log.py",
    ),
    Mutant(
        "a thin event of a session is forgotten",
        "service/inbox/receiver.py",
        "            raise Unavailable(UnavailableReason.API_KEY_MISSING)\n",
        "            ignored = Ignored(IgnoredReason.THIN, None, event.event_type)\n"
        "            return Receipt(Outcome.IGNORED, payload.secret_fingerprint, ignored)\n",
        "inbox/test_receiver.py web/test_app.py",
    ),
    Mutant(
        "an ignored event moves the time of the last event",
        "service/inbox/request_log.py",
        "        if self.ages_s:\n",
        "        if self.secrets:\n",
        "web/test_request_log.py",
    ),
    Mutant(
        "other endpoints' secrets are accepted",
        "service/web/app.py",
        "                    self._secrets.get(endpoint, ()),\n",
        "                    [one for several in self._secrets.values() for one in several],\n",
    ),
    Mutant(
        "named endpoints skip the allow list",
        "service/web/app.py",
        '                Route(WEBHOOK_PATH + "/{endpoint:path}", endpoint, methods=["POST"]),\n',
        '                Route(WEBHOOK_PATH + "/{endpoint:path}", webhook, methods=["POST"]),\n',
    ),
    # The way out: leases, fences, counts.
    Mutant(
        "the lease is not checked when acknowledging",
        "service/delivery/lua/ack.lua",
        _UNFENCED,
        "",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "the lease is not checked when reading",
        "service/delivery/lua/read.lua",
        _UNFENCED,
        "",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "the lease is not checked when recording attempts",
        "service/delivery/lua/record_attempts.lua",
        _UNFENCED,
        "",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "a lease is taken from its owner",
        "service/delivery/lua/lease.lua",
        _MAY_TAKE,
        "if ARGV[3] == 'take' then is_allowed = true end\n",
        "delivery/test_consumer_machine.py delivery/test_leases.py",
    ),
    Mutant(
        "an expired lease is renewed",
        "service/delivery/lua/lease.lua",
        _MAY_TAKE,
        "is_allowed = is_allowed or not owner\n",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "a lease counts from the reply, not from the request",
        "service/delivery/leases.py",
        "            lease.extend(asked_at + ttl_s)\n",
        "            lease.extend(asyncio.get_running_loop().time() + ttl_s)\n",
    ),
    Mutant(
        "what is pending goes to make room",
        "service/inbox/trim_full_stream.lua",
        "  if not is_pending[entry[1]] then",
        "  if true then",
        "inbox/test_full_streams.py",
    ),
    Mutant(
        "what lies behind a part of a pending list passes for settled",
        "service/inbox/trim_full_stream.lua",
        "  if #pending == max_examined then last = pending[max_examined][1] end\n",
        "",
        "inbox/test_full_streams.py",
    ),
    Mutant(
        "room is made so that Redis loses count of what a group has not read",
        "service/inbox/trim_full_stream.lua",
        "(is_read and '' or '(') .. read_to",
        "read_to",
        "inbox/test_full_streams.py",
    ),
    Mutant(
        "an event that finds no room does not ask for any",
        "service/inbox/admission.py",
        "                if full and await self._trimmer.trim(full):\n",
        "                if False:\n",
        "inbox/test_full_streams.py",
    ),
    Mutant(
        "dead letters expire by a wrong clock of Redis",
        "service/delivery/lua/expire_dead_letters.lua",
        "if math.abs(redis.call('TIME')[1] - ARGV[1]) <= tonumber(ARGV[2]) then\n",
        "if true then\n",
        "delivery/test_dead_letter_expiry.py",
    ),
    Mutant(
        "a wrong prefix is taken for a deployment without a trouble",
        "service/cli/defaults.py",
        "        if not await layout.is_claimed(connections, keys):\n",
        "        if not (await layout.is_claimed(connections, keys) or True):\n",
        "cli/test_dead_letters.py",
    ),
    Mutant(
        "a handler that does not exist has no dead letters",
        "service/cli/defaults.py",
        "            if handler not in names:\n",
        "            if False:\n",
        "cli/test_dead_letters.py",
    ),
    Mutant(
        "a dry run replays",
        "service/delivery/lua/replay.lua",
        "      if ARGV[3] ~= 'count' then copy(ARGV[i], fields) end\n",
        "      copy(ARGV[i], fields)\n",
        "cli/test_dead_letters.py",
    ),
    Mutant(
        "dead letters never expire",
        "service/delivery/maintenance.py",
        "        await self._dead_letter_expiry.expire_if_due(assignments)\n",
        "",
        "delivery/test_dead_letter_expiry.py",
    ),
    Mutant(
        "only the first renewal extends a lease",
        "service/delivery/leases.py",
        "        self._deadline = until\n",
        "        self._deadline = self._deadline or until\n",
    ),
    Mutant(
        "a lease outlives its owner when Redis's clock steps back",
        "service/delivery/leases.py",
        "observed.last(lease.assignment) if is_dead else b",
        "observed.last(lease.assignment) if False else b",
    ),
    Mutant(
        "a lease that was renewed meanwhile is taken from its owner",
        "service/delivery/lua/lease.lua",
        " or (description ~= '' and description == ARGV[4])\n",
        " or ARGV[4] ~= ''\n",
        "delivery/test_leases.py",
    ),
    Mutant(
        "a worker stays alive when Redis's clock steps back",
        "service/delivery/leases.py",
        " - observed.stale() |",
        " - set() |",
    ),
    Mutant(
        "each call of a consumer waits for a connection of its own",
        "service/storage/batching.py",
        "max_items=MAX_SCRIPT_CALLS)",
        "max_items=1)",
        "delivery/test_worker.py::test_a_distant_redis_and_many_partitions",
    ),
    Mutant(
        "each partition is trimmed in a round trip of its own",
        "service/delivery/retention.py",
        "    replies = await connections.run(calls)\n",
        "    replies = [(await connections.run([call]))[0] for call in calls]\n",
        "delivery/test_worker.py::test_periodic_work_takes_few_round_trips",
    ),
    Mutant(
        "why a dispatcher ended is logged each time",
        "service/delivery/failure_log.py",
        "        elif is_new:\n",
        "        else:\n",
    ),
    Mutant(
        "claiming from another consumer counts no delivery",
        "service/delivery/lua/claim_pending.lua",
        "then count = count + 1 end\n",
        "then count = count end\n",
        "delivery/test_consumer_machine.py delivery/test_consumer.py",
    ),
    Mutant(
        "a call repeated after a lost reply makes a second dead letter",
        "service/delivery/lua/dead_letter.lua",
        "if redis.call('XPENDING', KEYS[2], ARGV[2], id, id, 1)[1] then\n",
        "if true then\n",
        "delivery/test_consumer.py",
    ),
    Mutant(
        "an entry is acknowledged before its dead letter is there",
        "service/delivery/lua/dead_letter.lua",
        "  local letter = redis.call('XADD', KEYS[4], '*', unpack(fields))\n",
        "  redis.call('XACK', KEYS[2], ARGV[2], id)\n"
        "  local letter = redis.call('XADD', KEYS[4], '*', unpack(fields))\n",
        "delivery/test_consumer.py",
    ),
    Mutant(
        "an acknowledgement repeated after a lost reply is a second attempt",
        "service/delivery/lua/ack.lua",
        "  if redis.call('XACK', KEYS[2], ARGV[2], id) == 1 then\n",
        "  redis.call('XACK', KEYS[2], ARGV[2], id)\n  if true then\n",
        "delivery/test_consumer.py",
    ),
    Mutant(
        "a failure repeated after a lost reply is a second attempt",
        "service/delivery/lua/record_attempts.lua",
        "  return pending and pending[4] ~= tonumber(count)\n",
        "  return pending\n",
        "delivery/test_consumer.py",
    ),
    Mutant(
        "an attempt that cannot be noted stops the acknowledgements behind it",
        "service/delivery/lua/ack.lua",
        "      redis.pcall('XADD', KEYS[3],",
        "      redis.call('XADD', KEYS[3],",
        "delivery/test_consumer.py",
    ),
    Mutant(
        "a process of another version takes the overview away",
        "service/monitoring/activity.py",
        "        with suppress(ValueError, OverflowError, msgspec.MsgspecError):\n",
        "        with suppress(msgspec.MsgspecError):\n",
        "admin/test_broken_state.py",
    ),
    Mutant(
        "open pages starve the probes",
        "service/admin/app.py",
        "        if self._running >= MAX_AT_ONCE:\n",
        "        if self._running >= 1000:\n",
        "admin/test_busy_page.py",
    ),
    Mutant(
        "all viewers search in Redis at once",
        "service/admin/page.py",
        "                await self._searching.acquire()\n",
        "                pass\n",
        "admin/test_busy_page.py",
    ),
    Mutant(
        "letters that are named are replayed in the order of their texts",
        "service/delivery/dead_letters.py",
        "    for letter_id in sorted({*ids}, key=partial(_place, keys)):\n",
        "    for letter_id in sorted({*ids}):\n",
        "delivery/test_letter_pages.py",
    ),
    Mutant(
        "self-tests leave attempts",
        "service/delivery/consumer.py",
        " and not is_selftest(item.session_id):\n",
        ":\n",
    ),
    Mutant(
        "metadata that looks like a reference finds a session",
        "service/monitoring/session_search.py",
        "            if text in (transition.event_id, transition.client_reference_id):\n",
        "            if transition:\n",
    ),
    Mutant(
        "what was dead-lettered long ago counts as settled",
        "service/monitoring/find_deliveries.lua",
        "  search(dead_letters, first_unexplained, ",
        "  search(replays, first_unexplained, ",
        "monitoring/test_session_timeline.py",
    ),
    Mutant(
        "a transition whose replay waits counts as settled",
        "service/monitoring/session_timeline.py",
        "replay_states.get(event.event_id, state) if state == _ACKNOWLEDGED else state",
        "state",
    ),
    Mutant(
        "a dead letter that was replayed stays",
        "service/delivery/lua/replay.lua",
        "  if are_dead then redis.call('XDEL', source, id) end\n",
        "",
        "delivery/test_dead_letters.py",
    ),
    Mutant(
        "what a group has not acknowledged is replayed",
        "service/delivery/lua/replay.lua",
        "  if are_dead then return true end\n",
        "  if true then return true end\n",
        "delivery/test_dead_letters.py delivery/test_consumer_machine.py",
    ),
    Mutant(
        "a replay loses the status before",
        "service/delivery/lua/replay.lua",
        "    copied[#copied + 1] = found[name]\n",
        "    copied[#copied + 1] = name == 'previous' and '' or found[name]\n",
        "delivery/test_dead_letters.py",
    ),
    Mutant(
        "--since is a second late",
        "service/delivery/dead_letters.py",
        '    first = id_at(wanted.since, "-")\n',
        '    first = str(int(id_at(wanted.since, "-")) + 1000)\n',
        "delivery/test_letter_pages.py",
    ),
    Mutant(
        "streams are trimmed by length",
        "service/delivery/lua/trim.lua",
        "return {redis.call('XTRIM', stream, 'MINID', '=', first_kept), names}",
        "return {redis.call('XTRIM', stream, 'MAXLEN', 2), names}",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "a Redis whose clock runs ahead loses its history",
        "service/delivery/lua/trim.lua",
        "math.min(redis.call('TIME')[1], ARGV[2])",
        "redis.call('TIME')[1]",
        "delivery/test_dead_letter_expiry.py",
    ),
    Mutant(
        "what is pending is trimmed",
        "service/delivery/lua/trim.lua",
        "  if oldest_pending then\n",
        "  if false then\n",
        "delivery/test_consumer_machine.py",
    ),
    # The worker: order, attempts, circuit.
    Mutant(
        "retries are not counted",
        "service/delivery/deliverer.py",
        "        await self._consumer.record_attempts(delivery, delivery.attempts, "
        "error=word, place=where)\n",
        "",
    ),
    Mutant(
        "an entry is acknowledged before its handler was called",
        "service/delivery/deliverer.py",
        _CALLED,
        f"            await self._consumer.ack(delivery)\n{_CALLED}",
        "delivery/test_dispatcher_machine.py",
    ),
    Mutant(
        "an entry is acknowledged although its handler failed",
        "service/delivery/deliverer.py",
        _ENOUGH,
        "        if failed >= 2:\n"
        f"            return await self._consumer.ack(delivery)\n{_ENOUGH}",
        "delivery/test_dispatcher_machine.py",
    ),
    Mutant(
        "the entries of one session run side by side",
        "service/delivery/backlog.py",
        "        key = delivery.entry_id if item is None else item.session_id\n",
        "        key = delivery.entry_id\n",
        "delivery/test_dispatcher_machine.py",
    ),
    Mutant(
        "a handler is called without checking the lease",
        "service/delivery/deliverer.py",
        "            if not self._consumer.has_lease():\n",
        "            if False:\n",
    ),
    Mutant(
        "an outage costs attempts",
        "service/delivery/deliverer.py",
        "        if (reason := unreachable_reason(error)) is None:\n",
        "        if (reason := None) is None:\n",
        "delivery/test_dispatcher_machine.py",
    ),
    Mutant(
        "what an account that is gone leaves behind waits for ever",
        "service/stripe_api/fetch.py",
        "            if isinstance(error, ApiError) and not is_kept:\n",
        "            if False:\n",
        "stripe_api/test_fetch.py::test_an_account_that_is_gone_for_good",
    ),
    Mutant(
        "a timeout closes the circuit",
        "service/delivery/retries.py",
        "        if is_timeout:\n",
        "        if False:\n",
        "delivery/test_outages.py",
    ),
    Mutant(
        "an error of ours about one entry ends the work on all",
        "service/delivery/deliverer.py",
        "        except Exception as error:\n",
        "        except ZeroDivisionError as error:\n",
    ),
    Mutant(
        "failing sessions keep their slots of the window",
        "service/delivery/backlog.py",
        "        self.loaded -= session.loaded\n",
        "",
        "delivery/test_dispatcher.py",
    ),
    Mutant(
        "entries are recorded as not started twice",
        "service/delivery/dispatcher.py",
        "            if delivery.attempts.unresolved > 0 and not",
        "            if not",
    ),
    Mutant(
        "a session whose task was canceled is held back silently",
        "service/cancellation.py",
        "            if not self.is_ending and task not in self._canceled:\n",
        "            if False:\n",
        "delivery/test_dispatcher.py",
    ),
    Mutant(
        "a stopping dispatcher keeps the turn to probe",
        "service/delivery/retries.py",
        "if turn is not None and turn.scheduler is scheduler and not turn.has_begun:\n",
        "if False:\n",
    ),
    Mutant(
        "a call that ends keeps the turn to probe",
        "service/delivery/dispatcher.py",
        "                session.circuit.end_probe(session)\n",
        "                pass\n",
        "delivery/test_outages.py",
    ),
    Mutant(
        "an entry that is gone keeps the turn to probe",
        "service/delivery/retries.py",
        "            self.circuit.leave(self)\n",
        "            pass\n",
        "delivery/test_outages.py",
    ),
    Mutant(
        "a lost connection is called a time-out by all calls but one",
        "service/handlers/shared_connection.py",
        "        self.reason = self.reason or reason\n",
        "        self.reason = reason\n",
    ),
    Mutant(
        "a circuit stays open where nothing probes any more",
        "service/delivery/retries.py",
        "        self._plan_probe()\n        self._close_if_unused()\n",
        "        self._plan_probe()\n",
        "delivery/test_retries.py",
    ),
    Mutant(
        "a call in quarantine counts as a death although the worker lives",
        "service/delivery/deliverer.py",
        "        if error is not None:\n            await self._consumer.record_attempts(",
        "        if False:\n            await self._consumer.record_attempts(",
        "delivery/test_outages.py",
    ),
    Mutant(
        "a session that never reaches the queue is probed for ever",
        "service/delivery/retries.py",
        "        if self.successes > since and not",
        "        if False and not",
        "delivery/test_outages.py",
    ),
    Mutant(
        "the most probed is next",
        "service/delivery/retries.py",
        "        heapq.heappush(self._waiting, (session.probes,",
        "        heapq.heappush(self._waiting, (-session.probes,",
    ),
    Mutant(
        "an unreadable replay is looked for in the wrong stream",
        "service/delivery/consumer.py",
        "is_replay=self._is_replay)\n",
        "is_replay=item is not None and self._is_replay)\n",
    ),
    # Notifications: the handler `fetch` consumes a source of its own.
    Mutant(
        "a notification that was fetched stays in its stream",
        "service/delivery/consumer.py",
        "        self._delete_on_ack = int(is_replay or source.delete_on_ack)\n",
        "        self._delete_on_ack = int(is_replay)\n",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "what waits for fetch is counted as Redis counts lag",
        "service/delivery/lua/lag.lua",
        "if ARGV[2] == '1' then return",
        "if false then return",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "notifications are waited for with transitions",
        "service/delivery/worker.py",
        "        stream = source_of(lease.handler).stream(self._keys, lease.partition)\n",
        "        stream = self._keys.transitions(lease.partition)\n",
        "delivery/test_sources.py",
    ),
    Mutant(
        "fetch has the time limit of other handlers",
        "service/delivery/worker.py",
        "        timeout_s=FETCH_TIMEOUT_S if is_fetch else settings.handler_timeout_s,\n",
        "        timeout_s=settings.handler_timeout_s,\n",
        "delivery/test_sources.py",
    ),
    Mutant(
        "a retired fetch leaves its notifications",
        "service/delivery/consumer_groups.py",
        "        *([stream] if source.delete_on_ack else []),\n",
        "",
        "delivery/test_consumer_machine.py",
    ),
    Mutant(
        "check is silent while no worker fetches, until it is late",
        "service/monitoring/handler_rules.py",
        "        return bool(state.lag or state.replays)\n",
        "        return state.oldest_s > MAX_WAIT_S\n",
        "operations/test_check.py",
    ),
    # What processes publish of themselves, and what it means.
    Mutant(
        "a batch whose reply was lost is counted twice",
        "service/monitoring/publish.lua",
        "local is_new = not stored or stored:match('^%d+ (%S+)') ~= batch.id\n",
        "local is_new = true\n",
        "monitoring/test_publisher.py",
    ),
    Mutant(
        "a failed call takes its counts along",
        "service/monitoring/publisher.py",
        "        batch = self._unconfirmed = self._unconfirmed or self._take_batch()\n",
        "        batch = self._unconfirmed = self._take_batch()\n",
    ),
    Mutant(
        "a full Redis hides who lives",
        "service/monitoring/publish.lua",
        "#!lua flags=allow-oom\n",
        "#!lua\n",
        "monitoring/test_publisher.py",
    ),
    Mutant(
        "receivers that are not ready are enough",
        "service/monitoring/deployment_rules.py",
        "    elif all(one.ready for one in alive):\n",
        "    elif not alive:\n",
    ),
    Mutant(
        "one wrong signature among genuine ones is a wrong secret",
        "service/monitoring/deployment_rules.py",
        "    if not any(hour[word] for word in GENUINE):\n",
        "    if True:\n",
    ),
    Mutant(
        "processes that cannot write count as dead",
        "service/monitoring/deployment_rules.py",
        "        one.name in _REFUSES_WRITES and one.severity is Severity.FATAL\n",
        "        False\n",
    ),
    Mutant(
        "a handler without a worker is well while nothing waits",
        "service/monitoring/handler_rules.py",
        "    reasons = find_obstacles(state, expects_worker=True)\n",
        "    reasons = find_obstacles(state, expects_worker=False)\n",
        "monitoring/test_deployment_rules.py",
    ),
    Mutant(
        "a handler whose worker has not begun is well",
        "service/monitoring/deployment_rules.py",
        "for one in facts.activity.workers if one.is_alive for name in one.works}\n",
        "for one in facts.activity.workers if False for name in one.works}\n",
    ),
    Mutant(
        "a choice about durability is an alarm",
        "service/monitoring/deployment_rules.py",
        "    return finding.name in _CHOICES and finding.severity is Severity.WARNING\n",
        "    return False\n",
    ),
    # The process: it listens and waits, and leaves nothing behind for what did not open.
    Mutant(
        "groups are created before their handlers are open",
        "service/runtime/process.py",
        "        async with loading.open_all(openers, context.environment) as opened:\n",
        "        await context.health.usable.wait()\n        await _create_groups(context)\n"
        "        async with loading.open_all(openers, context.environment) as opened:\n",
        "runtime/test_process.py::test_a_handler_that_does_not_open_leaves_no_group",
    ),
    # The log: nothing waits for its reader but who needs the line.
    Mutant(
        "a dropped log line counts as written",
        "service/telemetry/log_writer.py",
        "            done(not is_dropped)",
        "            done(True)",
        "telemetry/test_logs.py",
    ),
    Mutant(
        "production shows what handlers were called with",
        "service/telemetry/logs.py",
        "    showing = [output for output in _outputs if output.has_tracebacks]\n",
        "    showing = [*_outputs]\n",
    ),
    Mutant(
        "a terminal shows whatever a field holds",
        "service/telemetry/logs.py",
        "terminal_log.render(sanitize(fields), ",
        "terminal_log.render(fields, ",
    ),
    Mutant(
        "a signing secret in a log line counts as clean",
        "service/telemetry/redaction.py",
        '        and "whsec_" not in text\n',
        "",
    ),
    Mutant(
        "log lines overtake those that are queued",
        "service/telemetry/log_writer.py",
        "            if not self._queued_bytes:\n",
        "            if True:\n",
        "telemetry/test_logs.py",
    ),
    Mutant(
        "the queue of log lines has no bound",
        "service/telemetry/log_writer.py",
        "self._queued_bytes > MAX_QUEUED_BYTES\n",
        "self._queued_bytes < 0\n",
        "telemetry/test_logs.py",
    ),
    Mutant(
        "an answer of Stripe's API has no largest size",
        "service/stripe_api/client.py",
        "            if len(body) > max_bytes:\n",
        "            if len(body) < 0:\n",
    ),
    Mutant(
        "a lasting refusal of Stripe's API is tried again",
        "service/stripe_api/client.py",
        "                if is_last or not answer.is_temporary:\n",
        "                if is_last:\n",
    ),
    Mutant(
        "backfill takes the requests that fetches need",
        "service/stripe_api/take_request.lua",
        "(capacity - interval * tonumber(ARGV[3]))\n",
        "capacity\n",
        "stripe_api/test_rate_limit.py",
    ),
    Mutant(
        "an endpoint that selects everything is taken to get redactions",
        "service/stripe_api/destinations.py",
        "WILDCARD_TYPES: Final = frozenset(ALL_TYPES) - {REDACTED}\n",
        "WILDCARD_TYPES: Final = frozenset(ALL_TYPES)\n",
        "stripe_api/test_endpoints.py",
    ),
    Mutant(
        "findings about Stripe are reported for ever by a process that no longer looks",
        "service/stripe_api/endpoint_watch.py",
        "        self._note([])\n",
        "",
        "stripe_api/test_endpoints.py",
    ),
    Mutant(
        "an event of another session is taken for a notification's",
        "service/stripe_api/single_events.py",
        "        and event.session.id == notification.session_id\n",
        "",
    ),
    Mutant(
        "a session that is read counts as of the time of the reading",
        "service/stripe_api/single_events.py",
        '        "created": notification.created,\n',
        '        "created": int(__import__("time").time()) + 60,\n',
    ),
    Mutant(
        "of listed events that look alike any is taken",
        "service/stripe_api/rounds.py",
        "            is_unique = times_listed[one.look] == times_waiting[one.look] == 1\n",
        "            is_unique = times_listed[one.look] >= 1\n",
    ),
    Mutant(
        "one listed event is given to two notifications",
        "service/stripe_api/rounds.py",
        "        return self._owners.get(event.event_id, notification).event_id == "
        "notification.event_id\n",
        "        return True\n",
    ),
    Mutant(
        "a second that was read in part is taken for whole",
        "service/stripe_api/rounds.py",
        "            read_from = first if window.is_complete else window.events[0].created + 1\n",
        "            read_from = first if window.is_complete else window.events[0].created\n",
    ),
    Mutant(
        "notifications of a refused key become dead letters",
        "service/stripe_api/fetch.py",
        "            if error.reason in _OF_ONE:\n",
        "            if isinstance(error, ApiError):\n",
        "stripe_api/test_fetch.py::test_what_an_error_means",
    ),
    Mutant(
        "of a window with too many events the newest are left out",
        "service/stripe_api/event_pages.py",
        "            lasts += [cut, middle] if middle < cut else [cut]\n",
        "            lasts[-1:] = [cut, middle] if middle < cut else [cut]\n",
    ),
    Mutant(
        "events that Stripe lists in any order are admitted in any order",
        "service/stripe_api/event_pages.py",
        "            self._created_gte <= found.created <= newest\n",
        "            self._created_gte <= found.created <= self._created_lte\n",
    ),
    Mutant(
        "a worker that has lost the lease moves cursors",
        "service/stripe_api/move_cursor.lua",
        "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end\n",
        "",
        "stripe_api/test_account_pass.py",
    ),
    Mutant(
        "the cursor moves past what has not been read",
        "service/stripe_api/account_pass.py",
        "cursor._replace(read_until=window.last)\n",
        "cursor._replace(read_until=int(now))\n",
    ),
    Mutant(
        "history counts as recovered",
        "service/stripe_api/account_pass.py",
        "        and found.event.created > cursor.began_at\n",
        "",
    ),
    Mutant(
        "an event whose thin notification waits counts as recovered",
        "service/stripe_api/account_pass.py",
        "        and not found.was_noted\n",
        "",
    ),
    Mutant(
        "events of another connected account are admitted",
        "service/stripe_api/window_admission.py",
        "    if event.account not in {None, caller.account}:\n",
        "    if event.account is None:\n",
    ),
    Mutant(
        "time that a notification waits for its turn counts as a failed attempt",
        "service/stripe_api/fetch.py",
        "        raise ApiError(ApiErrorReason.UNREACHABLE)\n",
        "        raise TimeoutError\n",
        "stripe_api/test_fetch.py::test_slow_answers_are_no_failed_attempts",
    ),
    Mutant(
        "a worker's clock that is ahead moves the cursor over events that are still to come",
        "service/stripe_api/move_cursor.lua",
        "local read_until = math.min(ARGV[3], now)\n",
        "local read_until = tonumber(ARGV[3])\n",
        "stripe_api/test_account_pass.py",
    ),
    Mutant(
        "a clock that is set back puts off looking back",
        "service/stripe_api/account_pass.py",
        "if not 0 <= now - at < each.every_s\n",
        "if now - at >= each.every_s\n",
    ),
    Mutant(
        "fetches keep the reconciler waiting for ever",
        "service/stripe_api/rate_limit.py",
        "                    break\n",
        "                    pass\n",
    ),
    # The page.
    Mutant(
        "a page does not escape what it shows",
        "service/admin/rendering.py",
        "            autoescape=True,\n",
        "            autoescape=False,\n",
        "admin/test_dead_letter_pages.py",
    ),
    Mutant(
        "a page shows a letter's metadata",
        "service/admin/views/dead_letters.py",
        '    *("endpoint", "replay", ',
        '    *("endpoint", "metadata", "replay", ',
        "admin/test_dead_letter_pages.py",
    ),
    Mutant(
        "each page that is open reads all of Redis",
        "service/admin/page.py",
        "time.monotonic() - self._collected_at >= KEPT_S",
        "time.monotonic() - self._collected_at >= 0",
    ),
    Mutant(
        "a bar covers the one below it",
        "service/admin/charts.py",
        "        floors = [floor + value for",
        "        floors = [floor * value for",
        "admin/test_overview.py",
    ),
    # Who may read and act on the page.
    Mutant(
        "the page answers under any name",
        "service/admin/guard.py",
        "or not is_our_name(hosts[0], self._names)",
        "",
    ),
    Mutant(
        "a request without origin counts as the page's own",
        "service/admin/guard.py",
        "    return len(origins) == 1 and ",
        "    return len(origins) != 1 or ",
        "admin/test_guard.py admin/test_letter_actions.py",
    ),
    Mutant(
        "reading needs a login on the overview only",
        "service/admin/guard.py",
        "        if not needs_login or path in _OPEN",
        '        if not needs_login or path in _OPEN or path != "/"',
    ),
    Mutant(
        "a login that may read may act",
        "service/admin/logins.py",
        'kind == "act", can_log_in',
        "True, can_log_in",
        "admin/test_logins.py admin/test_letter_actions.py",
    ),
    Mutant(
        "the time of a login is not signed",
        "service/admin/logins.py",
        '{kind} {token.name} {expires}"',
        '{kind} {token.name}"',
    ),
    Mutant(
        "a login does not end by itself",
        "service/admin/logins.py",
        'int(parts["expires"]) <= now',
        'int(parts["expires"]) <= 0',
    ),
    Mutant(
        "scripts may read the cookie",
        "service/admin/views/login.py",
        'httponly=True, samesite="strict"\n    )',
        'httponly=False, samesite="strict"\n    )',
        "admin/test_logins.py",
    ),
    Mutant(
        "a login leads to another site",
        "service/admin/views/login.py",
        "return asked if _PATH.fullmatch(asked) else",
        'return asked if asked.startswith("/") else',
        "admin/test_logins.py",
    ),
    Mutant(
        "the sender of a wrong token blocks the right one",
        "service/admin/logins.py",
        "        if self._waiting >= MAX_WAITING:\n            return\n",
        "        while self._waiting >= MAX_WAITING:\n            await asyncio.sleep(0.01)\n",
    ),
    Mutant(
        "a form acts again",
        "service/admin/forms.py",
        "connections.client.getdel(",
        "connections.client.get(",
        "admin/test_forms.py admin/test_letter_actions.py",
    ),
    Mutant(
        "a form of one action does another one",
        "service/admin/forms.py",
        "    if found != purpose.encode():",
        "    if found is None:",
        "admin/test_forms.py admin/test_letter_actions.py",
    ),
    Mutant(
        "a form has no bound",
        "service/admin/forms.py",
        "        if len(body) > MAX_BYTES:",
        "        if len(body) > MAX_BYTES**2:",
    ),
    Mutant(
        "a form acts for who only reads",
        "service/admin/views/letter_actions.py",
        "    _check_viewer(page, request)\n    form =",
        "    form =",
        "admin/test_letter_actions.py",
    ),
    Mutant(
        "nothing chosen is everything",
        "service/admin/views/letter_actions.py",
        '    if not ids and "all" not in form:',
        "    if ids is None:",
        "admin/test_letter_actions.py",
    ),
    Mutant(
        "a drop covers letters that were made after the question",
        "service/admin/views/letter_actions.py",
        "    choice = await _with_end(page, asked)\n",
        "    choice = asked\n",
        "admin/test_letter_actions.py",
    ),
    Mutant(
        "replays go to handlers that no worker calls",
        "service/admin/views/letter_actions.py",
        '    if verb == "replay" and not handler.is_configured:',
        '    if verb == "replay" and not handler.name:',
        "admin/test_letter_actions.py",
    ),
    Mutant(
        "an action goes on while its process stops",
        "service/delivery/dead_letters.py",
        "        if stopping.is_set():\n            return False\n",
        "",
    ),
    Mutant(
        "an empty file of readers opens the page",
        "service/runtime/composition.py",
        "        is_open = not page.logins.reading\n",
        "        is_open = True\n",
        "runtime/test_reloading.py",
    ),
    Mutant(
        "selftest asks Redis what its user operator may not",
        "service/operations/selftest_redis.py",
        "if await client.hgetall(",
        "if await client.exists(",
        "system/topologies/test_users.py",
    ),
)
