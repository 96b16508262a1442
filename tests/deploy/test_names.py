"""Files in deploy/ name only settings that exist, and their YAML is well formed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.settings_named import known_settings
from tests.generate import generated
from tests.support.programs import ROOT, run, tool

DEPLOY = ROOT / "deploy"
GENERATED = generated().keys()
# Not the generated files, the pins, or an operator's secrets.
TEXTS = [
    path
    for path in [ROOT / "Procfile", *sorted(DEPLOY.rglob("*"))]
    if path.is_file()
    and (path.suffix == ".md" or path not in GENERATED)
    and not {"requirements", "secrets"} & set(path.parts)
]
# Names in capitals that are not settings of the service.
FOREIGN = {
    "CREDENTIALS_DIRECTORY": "systemd's, which the service reads too",
    **dict.fromkeys(("AF_INET", "AF_INET6", "AF_UNIX"), "the kernel's families of addresses"),
    **dict.fromkeys(
        ("STRIPE_WEBHOOK_SECRETS_FILE", "REDIS_URL_FILE"),
        "ours with the suffix that every setting may have",
    ),
    "NAME_FILE": "any setting with that suffix",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "OpenTelemetry's, which its exporter reads",
    "HTTPS_PROXY": "the HTTP client's",
    "NO_COLOR": "of the user, for all programs: https://no-color.org",
}
YAML_RULES = (
    "{extends: default, rules: {document-start: disable, line-length: {max: 120},"
    " octal-values: disable, truthy: {check-keys: false}}}"
)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_exist(path: Path) -> None:
    """Each word that looks like the name of a setting, in a value or a comment, is one."""
    text = re.sub(r"#[A-Z]+_PASSWORD_SHA256", "", path.read_text())
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text))

    assert named <= known_settings() | FOREIGN.keys()


@pytest.mark.parametrize(
    "path",
    [path for path in TEXTS if path.suffix in {".yaml", ".yml"}],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_yaml_is_well_formed(path: Path) -> None:
    """No key is given twice; indentation, spaces and line lengths are consistent."""
    run(tool("yamllint"), "--strict", "-d", YAML_RULES, path)
