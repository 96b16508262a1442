"""The alerts and the dashboard are valid, use series that exist, and each alert fires."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from service.errors import ApiErrorReason, RejectionReason, UnavailableReason
from service.inbox.admission import Outcome
from service.inbox.request_log import SELFTEST
from service.telemetry import metrics
from tests.generate import series, series_name
from tests.support.harness import event, signed
from tests.support.processes import Process, open_sandbox
from tests.support.programs import ROOT, documents, program, run
from tests.support.waiting import wait_until

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
TESTS = (RULES.with_name("tests.yml"), RULES.with_name("tests-days.yml"))
RUNBOOK = RULES.with_name("runbook.md")
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
PACKAGE = "prometheus"
ENDINGS = ("_bucket", "_sum", "_count")
ONE = {"labels": "{}", "value": 1}
WORDS = {
    *(*Outcome, *RejectionReason, *UnavailableReason, *ApiErrorReason, "client_left", SELFTEST),
    *("delivered", "failed", "retried", "dead_lettered"),
}


def promtool() -> Path:
    """Return the path of promtool, or skip."""
    return program("promtool", PACKAGE)


def known() -> set[str]:
    """Return every name that a query may use: our series, and those that rules record."""
    found = {series_name(one) for one in series()}
    found |= {rule["record"] for rule in rules() if "record" in rule}
    for one in series():
        if isinstance(one, Histogram):
            found |= {f"{one._name}{ending}" for ending in ENDINGS}
    return found


def asked_for(query: str) -> set[str]:
    """Return every series of ours that a query names."""
    return set(re.findall(r"\bidv[_:][\w:]+", query))


def labels_asked_for(query: str) -> set[str]:
    """Return every label that a query selects or sums by."""
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    grouped = re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", query)
    return {*selected, *(name for group in grouped for name in re.split(r"[\s,]+", group) if name)}


def rules() -> list[Any]:
    """Return every rule."""
    [found] = documents(RULES)
    return [rule for group in found["groups"] for rule in group["rules"]]


def alerts() -> list[Any]:
    """Return every alert."""
    return [rule for rule in rules() if "alert" in rule]


def panels() -> list[Any]:
    """Return every panel of the dashboard, those in rows included."""
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [*found, *(inner for panel in found for inner in panel.get("panels", []))]


def queries() -> list[str]:
    """Return every query of the dashboard, its variables' included."""
    described = json.loads(DASHBOARD.read_text())
    of_variables = [one["query"] for one in described["templating"]["list"] if "query" in one]
    of_panels = [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    return [*of_panels, *(each for each in of_variables if "idv_" in each)]


def test_the_rules_are_valid() -> None:
    """Promtool accepts every rule."""
    run(promtool(), "check", "rules", RULES)


def test_each_alert_fires_when_it_should() -> None:
    """Promtool runs each alert's cases: it fires in some, and not in others."""
    run(promtool(), "test", "rules", *TESTS)
    files = [found for path in TESTS for found in documents(path)]
    tests = [test for found in files for test in found["tests"]]
    cases = [case for test in tests for case in test["promql_expr_test"]]
    for alert in alerts():
        mine = [case for case in cases if f'alertname="{alert["alert"]}"' in case["expr"]]
        assert {bool(case["exp_samples"]) for case in mine} == {True, False}, alert["alert"]


def test_each_alert_has_its_entry() -> None:
    """An alert has a severity, a summary, what to do, and its entry in the runbook."""
    entries = set(re.findall(r'<a id="(alert-[^"]+)"></a>', RUNBOOK.read_text()))
    for alert in alerts():
        anchor = "alert" + re.sub(r"([A-Z])", r"-\1", alert["alert"]).lower()
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}
        assert alert["annotations"]["description"].endswith(".")
        assert alert["annotations"]["runbook"] == f"deploy/prometheus/runbook.md#{anchor}"
        entries.remove(anchor)
    assert entries == set()


@pytest.mark.parametrize("query", [*(rule["expr"] for rule in rules()), *queries()])
def test_queries_name_what_exists(query: str) -> None:
    """Series and labels are those of `metrics` and of Prometheus itself, outcomes have a list."""
    assert asked_for(query)
    assert asked_for(query) <= known()
    assert labels_asked_for(query) <= _labels() | {"job", "instance", "le"}
    for words in re.findall(r'outcome[=!]~?"([^"]*)"', query):
        for word in words.split("|"):
            assert any(re.fullmatch(word, each) for each in WORDS), word


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("Events by outcome", {*Outcome, SELFTEST}),
        ("Rejected with 4xx", {*RejectionReason, "client_left"}),
        ("Answered with 503", {*UnavailableReason}),
    ],
)
def test_each_outcome_has_its_panel(title: str, words: set[str]) -> None:
    """What is answered with 200 is not shown as rejected."""
    [(sign, pattern)] = re.findall(r'outcome([=!])~"([^"]*)"', shown_in(title))
    outcomes = {*Outcome, SELFTEST, *RejectionReason, "client_left", *UnavailableReason}
    found = {one for one in outcomes if bool(re.fullmatch(pattern, one)) == (sign == "=")}
    assert found == words


def test_the_exposition_is_valid() -> None:
    """Promtool has no complaint about our series."""
    checked = subprocess.run(
        [promtool(), "check", "metrics"],
        input=metrics.exposition(),
        capture_output=True,
        check=False,
    )
    # `process_…` and `python_…` are the client library's.
    said = [line for line in (checked.stdout + checked.stderr).splitlines() if b"idv_" in line]
    assert said == []
    assert checked.returncode in (0, 3), checked.stderr


def test_a_healthy_dashboard_has_no_empty_panel(tmp_path: Path) -> None:
    """On a healthy deployment each query has a result, or its panel shows that it is empty."""
    with open_sandbox(tmp_path) as opened:
        receiver, worker = (opened.start(name).ready() for name in ("serve", "work"))
        body = event()
        httpx2.post(receiver.url, content=body, headers=signed(body)).raise_for_status()
        wait_until(lambda: worker.lines("transition"))
        exposed = held(serve=receiver, work=worker)
    asked = [
        target["expr"]
        for panel in panels()
        for target in panel.get("targets", [])
        if "noValue" not in panel["fieldConfig"]["defaults"]
    ]
    play(tmp_path, exposed, {f"count({query}) > bool 0": [ONE] for query in asked})


def test_choices_are_not_counted_as_findings(tmp_path: Path) -> None:
    """Without a replica and without a sync of each write, the dashboard counts no finding."""
    risks = {"eviction": 0, "fsync": 1, "replication": 1}
    series = {
        f'idv_redis_finding_severity{{job="a",finding="{name}"}}': risk
        for name, risk in risks.items()
    }
    play(tmp_path, series, {shown_in("Findings"): [{"labels": "{}", "value": 0}]})


def test_without_dead_letters_none_expires(tmp_path: Path) -> None:
    """The dashboard says when the first dead letter expires, and nothing where there is none."""
    query = shown_in("Dead letters expire")
    series = {'idv_dead_letters_expire_seconds{job="a",handler="log"}': math.inf}
    play(tmp_path, series, {query: []})
    series['idv_dead_letters_expire_seconds{job="b",handler="nats"}'] = 60
    play(tmp_path, series, {query: [{"labels": "{}", "value": 60}]})


def shown_in(title: str) -> str:
    """Return the first query of the dashboard's panel with a title."""
    [panel] = [each for each in panels() if each["title"] == title]
    query: str = panel["targets"][0]["expr"]
    return query


def test_a_self_test_of_a_new_deployment_fires_no_alert(tmp_path: Path) -> None:
    """Each series whose increase an alert looks at exists before the first count."""
    with open_sandbox(tmp_path) as opened:
        started = {name: opened.start(name).ready() for name in ("serve", "work")}
        at_work = ('idv_ready{job="serve"}', 'idv_leases_held{handler="log",job="work"}')
        wait_until(lambda: all(map(held(**started).get, at_work)))
        before = held(**started)
        assert opened.run("selftest", "--to", started["serve"].url).wait() == 0
        after = held(**started)
    # Those of Stripe's API need a key of it.
    counted = re.compile(r"(?:increase|rate)\(((?!idv_stripe)idv_\w+(?:\{[^}]*\})?)\[")
    found = {each for rule in rules() for each in counted.findall(rule["expr"])}
    play(tmp_path, before, {f"count({each}) > bool 0": [ONE] for each in found})
    values = {name: f"{before.get(name, '_')} {value:+}+0x180" for name, value in after.items()}
    promtest(tmp_path, values, {"count_over_time(ALERTS{alertstate='firing'}[3h:1m])": []}, "3h")


def held(**processes: Process) -> dict[str, float]:
    """Return every series that the processes expose, with its value."""
    exposed = {job: httpx2.get(f"{each.admin}/metrics").text for job, each in processes.items()}
    return {
        _series(sample.name, {**sample.labels, "job": job}): sample.value
        for job, text in exposed.items()
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("idv_")
    }


def _series(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


def play(directory: Path, series: Mapping[str, float], cases: dict[str, list[Any]]) -> None:
    """Let promtool run queries on constant series, and compare their results."""
    promtest(directory, {name: f"{value:+}+0x20" for name, value in series.items()}, cases, "10m")


def promtest(
    directory: Path, series: Mapping[str, str], cases: dict[str, list[Any]], at: str
) -> None:
    """Let promtool run the rules and queries on series of values, one for each minute."""
    tests = directory / "tests.yml"
    asked = [
        {
            "expr": query.replace("$job", ".*").replace("$__rate_interval", "5m"),
            "eval_time": at,
            "exp_samples": samples,
        }
        for query, samples in cases.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    case = {"interval": "1m", "input_series": inputs, "promql_expr_test": asked}
    whole = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}
    tests.write_text(json.dumps(whole))
    run(promtool(), "test", "rules", tests)


def test_the_dashboard_is_complete() -> None:
    """Panels have ids, places, titles and descriptions, and the data source is a variable."""
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in found}) == len(found)
    for panel in found:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["title"]
            assert panel["description"].endswith(".")


def test_every_series_is_used() -> None:
    """Each series is used by an alert or by a panel."""
    looked_at = {name for query in queries() for name in asked_for(query)}
    looked_at |= {name for rule in rules() for name in asked_for(rule["expr"])}
    names = {name.removesuffix(ending) for name in looked_at for ending in ("", *ENDINGS)}
    assert {series_name(one) for one in series()} <= names


def _labels() -> set[str]:
    return {name for one in series() for name in one._labelnames}
