"""The Kubernetes manifests are valid, complete and restricted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from tests.deploy.settings_named import known_settings
from tests.support.programs import ROOT, UNPACKED, documents, program, run, tool

FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "kustomization")


def kustomization() -> Any:
    """Return the parsed kustomization."""
    [found] = documents(FOLDER / "kustomization.yaml")
    return found


def settings() -> dict[str, str]:
    """Return the settings of both processes, without the secrets."""
    [generator] = kustomization()["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def everything(kind: str) -> list[Any]:
    """Return every object of a kind."""
    return [one for path in FILES for one in documents(path) if one["kind"] == kind]


def pod(deployment: Any) -> Any:
    """Return the specification of a deployment's pods."""
    return deployment["spec"]["template"]["spec"]


def selected(selector: dict[str, str]) -> list[str]:
    """Return the names of the deployments whose pods a selector finds."""
    return [
        one["metadata"]["name"]
        for one in everything("Deployment")
        if selector.items() <= one["spec"]["template"]["metadata"]["labels"].items()
    ]


def test_every_document_is_valid() -> None:
    """Each object conforms to the schema of the API and has no unknown field."""
    run(tool("kubernetes-validate"), "--strict", "--quiet", *FILES)


def test_the_kustomization_is_complete() -> None:
    """The kustomization names every file beside it, and no other."""
    assert {FOLDER / name for name in kustomization()["resources"]} == set(FILES)


def written_overlay() -> str:
    """Return the example of a user's kustomization, which the head of ours shows."""
    head = (FOLDER / "kustomization.yaml").read_text().partition("apiVersion")[0]
    [shown] = [part for part in re.split(r"^#$", head, flags=re.MULTILINE) if "resources:" in part]
    return re.sub(r"^# *?  ", "", shown, flags=re.MULTILINE)


def test_an_overlay_names_the_image(tmp_path: Path) -> None:
    """Rendered by kustomize, the example is valid and names the image."""
    overlay, rendered = tmp_path / "overlay" / "kustomization.yaml", tmp_path / "rendered.yaml"
    overlay.parent.mkdir()
    shutil.copytree(FOLDER, tmp_path / "base")
    overlay.write_text(written_overlay().replace("path/to/deploy/kubernetes", "../base"))
    kustomize = program("kustomize", "kustomize", str(UNPACKED))
    rendered.write_text(run(kustomize, "build", overlay.parent))

    run(tool("kubernetes-validate"), "--strict", "--quiet", rendered)
    pods = [pod(one) for one in documents(rendered) if one["kind"] == "Deployment"]
    images = {container["image"] for each in pods for container in each["containers"]}
    assert len(pods) == 2
    assert images == {"registry.example/identity-webhooks:0.1.0"}


def test_pods_have_time_to_stop() -> None:
    """Kubernetes waits until a pod has drained and finished."""
    least = float(settings()["DRAIN_S"]) + float(settings()["SHUTDOWN_GRACE_S"])

    for deployment in everything("Deployment"):
        assert pod(deployment)["terminationGracePeriodSeconds"] >= least + 5


def test_pods_are_restricted() -> None:
    """No pod has root, a writable root, a capability, a way to gain one, or a token."""
    for deployment in everything("Deployment"):
        spec = pod(deployment)
        [container] = spec["containers"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
    [account] = everything("ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_probes_use_the_right_port() -> None:
    """Liveness is probed on the admin port, which webhooks cannot fill; readiness on theirs."""
    for deployment in everything("Deployment"):
        [container] = pod(deployment)["containers"]
        name = container["name"]
        ports = {port["name"] for port in container["ports"]}
        asked = {
            probe: (container[probe]["httpGet"]["path"], container[probe]["httpGet"]["port"])
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        }
        traffic = "webhooks" if name == "receiver" else "admin"
        assert asked == {
            "startupProbe": ("/livez", "admin"),
            "livenessProbe": ("/livez", "admin"),
            "readinessProbe": ("/readyz", traffic),
        }
        assert {"admin", traffic} <= ports


def test_selectors_match_their_pods() -> None:
    """Service, budgets, autoscaler and policies select the pods that they are named after."""
    for deployment in everything("Deployment"):
        assert selected(deployment["spec"]["selector"]["matchLabels"]) == [
            deployment["metadata"]["name"]
        ]
    for service in everything("Service"):
        assert selected(service["spec"]["selector"]) == [service["metadata"]["name"]]
    budgets = everything("PodDisruptionBudget")
    policies = [one for one in everything("NetworkPolicy") if one["spec"]["podSelector"]]
    for one in budgets:
        assert selected(one["spec"]["selector"]["matchLabels"]) == [one["metadata"]["name"]]
    for one in policies:
        assert selected(one["spec"]["podSelector"]["matchLabels"]) == [one["metadata"]["name"]]
    [scaled] = everything("HorizontalPodAutoscaler")
    assert scaled["spec"]["scaleTargetRef"]["name"] == "receiver"
    assert len(budgets) == len(policies) == 2


def test_settings_are_ours() -> None:
    """Every variable is a setting, and secrets are files, never variables."""
    assert settings().keys() <= known_settings()
    assert settings()["DURABILITY"] == "fsync"
    for deployment in everything("Deployment"):
        [container] = pod(deployment)["containers"]
        [variable] = container["env"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod(deployment)["volumes"]}
        assert variable == {"name": "CREDENTIALS_DIRECTORY", "value": mounts["credentials"]}
        assert volumes["credentials"]["secret"]["secretName"] == container["name"]
        assert container["envFrom"] == [{"configMapRef": {"name": "settings"}}]
