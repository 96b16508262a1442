"""The list of all our series. Nothing here measures; whoever does names one of these.

Every label's values come from a closed list or from the configuration, never from a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Collection, Sequence
from functools import cache, partial

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)

from .. import __version__

# With PROMETHEUS_MULTIPROC_DIR in the environment (left there for another service, perhaps) the
# client library would keep all values in files of that directory, and fail where there is none.
values.ValueClass = values.MutexValue
# They would double the series, and PromQL has no use for them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# What the label says of a request whose type nobody knows, or nobody may know.
OTHER_TYPE = "other"
REGISTRY = CollectorRegistry()
for _collector in (GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR):
    REGISTRY.register(_collector)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class BulkHistogram(Histogram):
    """A histogram that is told of many values at once, for which the library has no call."""

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Observe each of *amounts*, at the cost of a few."""
        self._sum.inc(sum(amounts))
        places = Counts(map(partial(bisect_left, self._upper_bounds), amounts))
        for place, times in places.items():
            self._buckets[place].inc(times)


BUILD = Gauge(
    "idv_build_info",
    "1, with the version of this service.",
    ["version"],
    registry=REGISTRY,
)
BUILD.labels(__version__).set(1)
EVENTS = Counter(
    "idv_events_total",
    "Requests on the webhook path by outcome (or the reason of the refusal) and event type.",
    ["outcome", "type"],
    registry=REGISTRY,
)
RECEIVE_SECONDS = BulkHistogram(
    "idv_receive_seconds",
    "From the first byte of a request in hand to its answer.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
LAST_EVENT = Gauge(
    "idv_last_event_timestamp_seconds",
    "Unix time of the last event that was for us, whatever became of it; 0 before the first.",
    registry=REGISTRY,
)
ADMISSION_SECONDS = Histogram(
    "idv_admission_seconds",
    "Duration of the round trips to Redis that admit events.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
ADMISSION_BATCH = Histogram(
    "idv_admission_batch_events",
    "Events that went to Redis in one round trip.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
BODY_BYTES = BulkHistogram(
    "idv_body_bytes",
    "Size of the bodies of genuine events.",
    buckets=(1024, 2048, 4096, 8192, 16384, 65536, 262144),
    registry=REGISTRY,
)
EVENT_AGE_SECONDS = BulkHistogram(
    "idv_event_age_seconds",
    "Age of genuine events on arrival, by Stripe's clock and ours.",
    buckets=(1, 5, 15, 60, 300, 3600, 6 * 3600, 86400, 3 * 86400, 30 * 86400),
    registry=REGISTRY,
)
IN_FLIGHT = Gauge(
    "idv_requests_in_flight",
    "Webhook requests in hand.",
    registry=REGISTRY,
)
CONNECTIONS_REFUSED = Counter(
    "idv_connections_refused_total",
    "Connections ended below the application, by reason.",
    ["reason"],
    registry=REGISTRY,
)
READY = Gauge(
    "idv_ready",
    "1 while the process is ready for traffic.",
    registry=REGISTRY,
)
REDIS_FINDING_SEVERITY = Gauge(
    "idv_redis_finding_severity",
    "What Redis's state means for the promises, by finding: 0 fine, 1 a warning, 2 fatal.",
    ["finding"],
    registry=REGISTRY,
)
EVENTS_AFTER_FINAL = Counter(
    "idv_events_after_final_total",
    "Late events created after what their session already finally was.",
    registry=REGISTRY,
)
REVERSALS = Counter(
    "idv_reversals_total",
    "Transitions from a final status to another one that is not redacted.",
    registry=REGISTRY,
)
SKIPPED_FIELDS = Counter(
    "idv_skipped_fields_total",
    "Fields of Stripe's that nobody needs, and that were left out because they could not be read.",
    registry=REGISTRY,
)
SECRET_MATCHES = Counter(
    "idv_secret_matches_total",
    "Verified requests by the fingerprint of the signing secret that matched.",
    ["secret_fingerprint"],
    registry=REGISTRY,
)
SECRET_LOADED = Gauge(
    "idv_secret_loaded",
    "1 for each signing secret in use, by its place among its endpoint's: current (first) or old.",
    ["secret_fingerprint", "place"],
    registry=REGISTRY,
)
CONFIG_RELOAD_FAILED = Gauge(
    "idv_config_reload_failed",
    "1 while what stands in the files of a setting is refused, and what was is in use still.",
    ["setting"],
    registry=REGISTRY,
)
LOOP_LAG_SECONDS = Histogram(
    "idv_event_loop_lag_seconds",
    "How much later than asked for the event loop came round, looked at five times a second.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
REDIS_ERRORS = Counter(
    "idv_redis_errors_total", "Failed calls to Redis by reason.", ["reason"], registry=REGISTRY
)
LOG_LINES_DROPPED = Counter(
    "idv_log_lines_dropped_total",
    "Log lines dropped because standard output was not read, or could not be written.",
    registry=REGISTRY,
)
DELIVERIES = Counter(
    "idv_deliveries_total",
    "Handler calls by outcome (delivered, failed), what became of the failed (retried,"
    " dead_lettered), and transitions of a self-test, which no handler is shown (selftest).",
    ["handler", "outcome"],
    registry=REGISTRY,
)
DELIVERY_SECONDS = Histogram(
    "idv_delivery_seconds",
    "Duration of handler calls.",
    ["handler"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
LEASES_HELD = Gauge(
    "idv_leases_held",
    "Partitions this process works, by handler.",
    ["handler"],
    registry=REGISTRY,
)
CIRCUIT_OPEN = Gauge(
    "idv_circuit_open",
    "Destinations that a handler cannot reach and only probes: 0 or 1 where it has but one.",
    ["handler"],
    registry=REGISTRY,
)
PARKED_ENTRIES = Gauge(
    "idv_parked_entries",
    "Transitions of which only the id is kept until they are tried again, by handler.",
    ["handler"],
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
READING_PAUSED = Gauge(
    "idv_reading_paused",
    "Partitions in which so many transitions wait for a retry that no more are read, by handler.",
    ["handler"],
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
LAG_ENTRIES = Gauge(
    "idv_lag_entries",
    "Transitions not yet settled in the partitions this process works, by handler.",
    ["handler"],
    registry=REGISTRY,
)
DEAD_LETTERS = Gauge(
    "idv_dead_letters",
    "Dead letters held in the partitions this process works, by handler.",
    ["handler"],
    registry=REGISTRY,
)
DEAD_LETTERS_EXPIRE = Gauge(
    "idv_dead_letters_expire_seconds",
    "Seconds until the oldest of those dead letters is deleted for its age; +Inf for none.",
    ["handler"],
    registry=REGISTRY,
)
ORPHAN_GROUPS = Gauge(
    "idv_orphan_groups",
    "Handlers that are no longer configured, but whose unsettled transitions hold trimming.",
    registry=REGISTRY,
)
STREAM_TRIMMED = Counter(
    "idv_stream_trimmed_total",
    "Settled transitions deleted, by reason: age, or full to make room for new ones.",
    ["reason"],
    registry=REGISTRY,
)
# Prometheus sees an increase only of what was there before.
for _reason in ("age", "full"):
    STREAM_TRIMMED.labels(_reason)
OLDEST_SECONDS = Gauge(
    "idv_oldest_pending_seconds",
    "Age of the oldest transition not yet settled in those partitions, by handler.",
    ["handler"],
    registry=REGISTRY,
)

_loaded: set[tuple[str, str]] = set()


@cache
def events(outcome: str, event_type: str) -> Counter:
    """Return the child of `EVENTS`, looked up once."""
    return EVENTS.labels(outcome, event_type)


@cache
def secret_matches(fingerprint: str) -> Counter:
    """Return the child of `SECRET_MATCHES`, looked up once."""
    return SECRET_MATCHES.labels(fingerprint)


def set_loaded_secrets(found: Collection[tuple[str, str]]) -> None:
    """Tell which signing secrets are in use, by fingerprint and place, and no longer any other."""
    for labels in _loaded - {*found}:
        SECRET_LOADED.labels(*labels).set(0)
    for labels in found:
        SECRET_LOADED.labels(*labels).set(1)
    _loaded.update(found)


def exposition() -> bytes:
    """Return all series in Prometheus's text format."""
    return generate_latest(REGISTRY)
