"""All series have a help text and closed labels, and count what happened."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import Sample
from prometheus_client.parser import text_string_to_metric_families

from service.config import Settings
from service.secret import Secret
from service.storage.connections import Connections
from service.stripe.signatures import fingerprint
from service.telemetry import metrics
from tests.generate import series
from tests.support.apps import webhook_app
from tests.support.harness import WEBHOOK, event, signed
from tests.support.web_client import asgi_client, post_event

SERIES = series()
LABELS = {
    "action",
    "endpoint",
    "setting",
    "place",
    "outcome",
    "type",
    "secret_fingerprint",
    "reason",
    "handler",
    "finding",
    "version",
}
OLD = Secret(b"whsec_old")


@pytest.mark.parametrize("series", SERIES, ids=lambda one: str(one._name))
def test_each_series_explains_itself(series: Counter | Gauge | Histogram) -> None:
    """A series has a name idv_…, a sentence of help, and known labels."""
    [family] = series.collect()
    assert re.fullmatch(r"idv_[a-z_]+", family.name)
    assert re.fullmatch(r"[A-Z0-9].*\.", family.documentation)
    assert set(series._labelnames) <= LABELS
    assert f"# HELP {family.name}" in metrics.exposition().decode()


def test_every_series_is_in_the_one_registry() -> None:
    """The exposition has the series listed in `metrics`, and those of the process."""
    shown = {family.name for family in text_string_to_metric_families(_exposition())}
    ours = {name for name in shown if re.fullmatch(r"idv_.*(?<!_created)", name)}
    assert ours == {one._name for one in SERIES}
    assert all(name.startswith(("idv_", "process_", "python_")) for name in shown)


def _exposition() -> str:
    return metrics.exposition().decode()


def _samples() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(_exposition())
        for sample in family.samples
    }


@given(st.lists(st.floats(0, 20) | st.sampled_from([0.001, 0.5, 10.0, 0, 1])))
def test_observe_all_equals_observe(amounts: list[float]) -> None:
    """`observe_all` gives the same histogram as observing the values one by one."""
    at_once = metrics.BulkHistogram("at", "At once.", buckets=(0.001, 0.5, 1, 10), registry=None)
    one_by_one = Histogram("at", "One by one.", buckets=(0.001, 0.5, 1, 10), registry=None)
    at_once.observe_all(amounts)
    for amount in amounts:
        one_by_one.observe(amount)
    [found], [expected] = at_once.collect(), one_by_one.collect()
    assert {_place(one): pytest.approx(one.value) for one in found.samples} == {
        _place(one): one.value for one in expected.samples
    }


def _place(sample: Sample) -> tuple[str, str]:
    return sample.name, sample.labels.get("le", "")


async def test_the_counters_say_what_happened(connections: Connections, settings: Settings) -> None:
    """After a scripted run, each outcome, type and secret is counted once for each request."""
    secrets = {"": (*settings.secrets[""], OLD)}
    app, _ = webhook_app(connections, replace(settings, secrets=secrets, max_body_bytes=4096))
    now = int(time.time())
    done = event("verified", id="evt_2", status="verified", created=now - 50)
    after = event("processing", id="evt_3", status="processing", created=now - 10)
    hostile = event("canary.4711", id="evt_4")
    before = _samples()
    async with asgi_client(app) as client:
        for body in (event(created=now - 100), event(created=now - 100), done, after, hostile):
            await post_event(client, body)
        await post_event(client, done, signed(done, OLD))
        await post_event(client, b"canary-4711", {})
        await post_event(client, b" " * 5000, {})
        await post_event(client, b"", {}, path=f"{WEBHOOK}/canary-4711")
    changed = {
        (name, *sorted(value for _, value in labels)): value - before.get((name, labels), 0)
        for (name, labels), value in _samples().items()
        if value != before.get((name, labels), 0) and "_bucket" not in name
    }
    counted = {
        key: value
        for key, value in changed.items()
        if key[0]
        in ("idv_events_total", "idv_secret_matches_total", "idv_events_after_final_total")
    }
    assert counted == {
        ("idv_events_total", "admitted", "created"): 1,
        ("idv_events_total", "admitted", "verified"): 1,
        ("idv_events_total", "created", "duplicate"): 1,
        ("idv_events_total", "duplicate", "verified"): 1,
        ("idv_events_total", "late", "processing"): 1,
        ("idv_events_total", "ignored", "other"): 1,
        ("idv_events_total", "other", "signature_missing"): 1,
        ("idv_events_total", "body_too_large", "other"): 1,
        ("idv_events_total", "endpoint_unknown", "other"): 1,
        ("idv_secret_matches_total", fingerprint(settings.secrets[""][0])): 5,
        ("idv_secret_matches_total", fingerprint(OLD)): 1,
        ("idv_events_after_final_total",): 1,
    }
    assert changed["idv_receive_seconds_count",] == 9
    assert changed["idv_body_bytes_count",] == 6
    assert changed["idv_event_age_seconds_count",] == 5
    assert "canary" not in _exposition()


def test_only_loaded_secrets_are_shown() -> None:
    """A secret that was replaced is no longer shown as loaded."""
    metrics.set_loaded_secrets([("aaaaaaaa", "current"), ("bbbbbbbb", "old")])
    metrics.set_loaded_secrets([("cccccccc", "current"), ("aaaaaaaa", "old")])
    loaded = {
        tuple(sorted(value for _, value in labels))
        for (name, labels), value in _samples().items()
        if name == "idv_secret_loaded" and value
    }
    assert loaded == {("cccccccc", "current"), ("aaaaaaaa", "old")}
    metrics.set_loaded_secrets([])
