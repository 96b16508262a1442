"""All Prometheus series of this service, with their help texts.

Nothing here measures. Label values come from a closed list or from the configuration, never from
a request, so that no sender can create series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Collection, Sequence
from functools import partial

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

# If PROMETHEUS_MULTIPROC_DIR is set (for another service, perhaps), the client library would keep
# all values in files of that directory, and fail if it does not exist.
values.ValueClass = values.MutexValue
# A `_created` sample for every series doubles their number, and PromQL does not use them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# The `type` label of requests whose event type is unknown or not verified.
OTHER_TYPE = "other"
REGISTRY = CollectorRegistry()
for _collector in (GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR):
    REGISTRY.register(_collector)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class BulkHistogram(Histogram):
    """A histogram that can observe many values in one call, which the library cannot."""

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Observe each of *amounts*, with one increment for each bucket they fall into."""
        self._sum.inc(sum(amounts))
        buckets = Counts(map(partial(bisect_left, self._upper_bounds), amounts))
        for bucket, times in buckets.items():
            self._buckets[bucket].inc(times)


BUILD = Gauge(
    "idv_build_info",
    "Always 1; the version of this service is a label.",
    ["version"],
    registry=REGISTRY,
)
BUILD.labels(__version__).set(1)
EVENTS = Counter(
    "idv_events_total",
    "Requests on the webhook path, by outcome or reason of rejection, and event type; expired"
    " events of a self-test as selftest.",
    ["outcome", "type"],
    registry=REGISTRY,
)
RECEIVE_SECONDS = BulkHistogram(
    "idv_receive_seconds",
    "Seconds from the first byte of a request to its response.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
LAST_EVENT = Gauge(
    "idv_last_event_timestamp_seconds",
    "Unix time of the last verified event of a session, self-tests apart; 0 before the first.",
    registry=REGISTRY,
)
ADMISSION_SECONDS = Histogram(
    "idv_admission_seconds",
    "Duration of the Redis round trips that admit events.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
ADMISSION_BATCH = Histogram(
    "idv_admission_batch_events",
    "Events admitted in one Redis round trip.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
BODY_BYTES = BulkHistogram(
    "idv_body_bytes",
    "Body size of verified events.",
    buckets=(1024, 2048, 4096, 8192, 16384, 65536, 262144),
    registry=REGISTRY,
)
EVENT_AGE_SECONDS = BulkHistogram(
    "idv_event_age_seconds",
    "Age of verified events on arrival: our clock minus the time Stripe created them.",
    buckets=(1, 5, 15, 60, 300, 3600, 6 * 3600, 86400, 3 * 86400, 30 * 86400),
    registry=REGISTRY,
)
IN_FLIGHT = Gauge(
    "idv_requests_in_flight",
    "Webhook requests in progress.",
    registry=REGISTRY,
)
CONNECTIONS_REFUSED = Counter(
    "idv_connections_refused_total",
    "Connections closed before a request reached the application, by reason.",
    ["reason"],
    registry=REGISTRY,
)
READY = Gauge(
    "idv_ready",
    "1 while the process is ready for traffic, else 0.",
    registry=REGISTRY,
)
REDIS_FINDING_SEVERITY = Gauge(
    "idv_redis_finding_severity",
    "Severity of each finding about Redis: 0 for none, 1 for a warning, 2 for fatal.",
    ["finding"],
    registry=REGISTRY,
)
EVENTS_AFTER_FINAL = Counter(
    "idv_events_after_final_total",
    "Late events created after the final status of their session.",
    registry=REGISTRY,
)
REVERSALS = Counter(
    "idv_reversals_total",
    "Transitions from a final status to another status that is not redacted.",
    registry=REGISTRY,
)
SKIPPED_FIELDS = Counter(
    "idv_skipped_fields_total",
    "Optional fields of events that were skipped because they could not be parsed.",
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
    "1 for each signing secret in use, by place in its endpoint's list: current (first) or old.",
    ["secret_fingerprint", "place"],
    registry=REGISTRY,
)
CONFIG_RELOAD_FAILED = Gauge(
    "idv_config_reload_failed",
    "1 while a changed setting is invalid and the previous value stays in use.",
    ["setting"],
    registry=REGISTRY,
)
LOOP_LAG_SECONDS = Histogram(
    "idv_event_loop_lag_seconds",
    "Delay of a timer on the event loop, measured five times a second.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
REDIS_ERRORS = Counter(
    "idv_redis_errors_total", "Failed Redis calls, by reason.", ["reason"], registry=REGISTRY
)
LOG_LINES_DROPPED = Counter(
    "idv_log_lines_dropped_total",
    "Log lines dropped because standard output was not read or could not be written.",
    registry=REGISTRY,
)
DELIVERIES = Counter(
    "idv_deliveries_total",
    "Handler calls by outcome: delivered or failed; failed ones again as retried or dead_lettered;"
    " transitions of a self-test, which no handler receives, as selftest.",
    ["handler", "outcome"],
    registry=REGISTRY,
)
DELIVERY_SECONDS = Histogram(
    "idv_delivery_seconds",
    "Duration of handler calls, by handler.",
    ["handler"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
LEASES_HELD = Gauge(
    "idv_leases_held",
    "Partitions whose lease this process holds, by handler.",
    ["handler"],
    registry=REGISTRY,
)
CIRCUIT_OPEN = Gauge(
    "idv_circuit_open",
    "Destinations whose circuit is open, so that a handler only probes them, by handler.",
    ["handler"],
    registry=REGISTRY,
)
PARKED_ENTRIES = Gauge(
    "idv_parked_entries",
    "Transitions waiting for a retry with only their id in memory, by handler.",
    ["handler"],
    registry=REGISTRY,
)
READING_PAUSED = Gauge(
    "idv_reading_paused",
    "Partitions that are not read because too many transitions wait for a retry, by handler.",
    ["handler"],
    registry=REGISTRY,
)
LAG_ENTRIES = Gauge(
    "idv_lag_entries",
    "Unsettled transitions in the partitions this process holds, by handler.",
    ["handler"],
    registry=REGISTRY,
)
DEAD_LETTERS = Gauge(
    "idv_dead_letters",
    "Dead letters in the partitions this process holds, by handler.",
    ["handler"],
    registry=REGISTRY,
)
DEAD_LETTERS_EXPIRE = Gauge(
    "idv_dead_letters_expire_seconds",
    "Seconds until the oldest of these dead letters expires, by handler; +Inf if there are none.",
    ["handler"],
    registry=REGISTRY,
)
ORPHAN_GROUPS = Gauge(
    "idv_orphan_groups",
    "Handlers that are no longer configured but whose unsettled transitions prevent trimming.",
    registry=REGISTRY,
)
STREAM_TRIMMED = Counter(
    "idv_stream_trimmed_total",
    "Settled transitions deleted, by reason: their age, or full to make room for new ones.",
    ["reason"],
    registry=REGISTRY,
)
# Prometheus sees an increase only if the series existed before it.
for _reason in ("age", "full"):
    STREAM_TRIMMED.labels(_reason)
OLDEST_SECONDS = Gauge(
    "idv_oldest_pending_seconds",
    "Age of the oldest unsettled transition in the partitions this process holds, by handler.",
    ["handler"],
    registry=REGISTRY,
)
FETCH_SECONDS = Histogram(
    "idv_fetch_seconds",
    "Seconds from the arrival of a thin event to the decision on the event fetched for it, by"
    " outcome.",
    ["outcome"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600, 3600, 86400),
    registry=REGISTRY,
)
STRIPE_API_REQUESTS = Counter(
    "idv_stripe_api_requests_total",
    "Requests to Stripe's API, by what was read and outcome: ok or the reason of the failure.",
    ["endpoint", "outcome"],
    registry=REGISTRY,
)
STRIPE_API_SECONDS = Histogram(
    "idv_stripe_api_seconds",
    "Duration of requests to Stripe's API, by what was read.",
    ["endpoint"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
STRIPE_FINDING_SEVERITY = Gauge(
    "idv_stripe_finding_severity",
    "Severity of each finding about what Stripe sends here: 0 for none, 1 a warning, 2 fatal.",
    ["finding"],
    registry=REGISTRY,
)
EVENTS_RECOVERED = Counter(
    "idv_events_recovered_total",
    "Events that were admitted from Stripe's list of events because no webhook had brought them.",
    registry=REGISTRY,
)
RECONCILE_LAG_SECONDS = Gauge(
    "idv_reconcile_lag_seconds",
    "Age of the second up to which the events of every account were compared with Stripe's list.",
    registry=REGISTRY,
)
RECONCILE_PASSES = Counter(
    "idv_reconcile_passes_total",
    "Comparisons of one account's events with Stripe's list, by outcome: ok, or why it was ended.",
    ["outcome"],
    registry=REGISTRY,
)
ADMIN_LOGINS = Counter(
    "idv_admin_logins_total",
    "Attempts to log in to the page, by outcome: logged_in or failed.",
    ["outcome"],
    registry=REGISTRY,
)
ADMIN_ACTIONS = Counter(
    "idv_admin_actions_total",
    "Replays and drops of dead letters that were started on this process's page, by outcome: done,"
    " interrupted or failed.",
    ["action", "outcome"],
    registry=REGISTRY,
)
# Prometheus sees an increase only if the series existed before it.
for _outcome in ("logged_in", "failed"):
    ADMIN_LOGINS.labels(_outcome)

_loaded_secrets: set[tuple[str, str]] = set()


def set_loaded_secrets(loaded: Collection[tuple[str, str]]) -> None:
    """Set `SECRET_LOADED` to 1 for the *loaded* (fingerprint, place), and to 0 for all others."""
    for labels in _loaded_secrets - {*loaded}:
        SECRET_LOADED.labels(*labels).set(0)
    for labels in loaded:
        SECRET_LOADED.labels(*labels).set(1)
        # Prometheus sees no increase in a series that appears with its first count.
        SECRET_MATCHES.labels(labels[0])
    _loaded_secrets.update(loaded)


def read_totals(counter: Counter, *labels: str) -> Counts[tuple[str, ...]]:
    """Return what *counter* has counted, by the values of *labels* and summed over all others."""
    totals: Counts[tuple[str, ...]] = Counts()
    for metric in counter.collect():
        for sample in metric.samples:
            totals[tuple(sample.labels[label] for label in labels)] += int(sample.value)
    return totals


def read_last_event() -> float:
    """Return the Unix time of the last verified event; 0 before the first."""
    return sum(sample.value for metric in LAST_EVENT.collect() for sample in metric.samples)


def exposition() -> bytes:
    """Return all series in the Prometheus text format."""
    return generate_latest(REGISTRY)
