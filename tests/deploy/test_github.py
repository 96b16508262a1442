"""The workflow and the pre-commit hooks: valid, and no more than .ci/run."""

from __future__ import annotations

from tests.support.programs import ROOT, documents, run, tool

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"


def test_the_workflow_is_valid() -> None:
    """It conforms to the schema of workflows."""
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", WORKFLOW)


def test_the_workflow_runs_ci() -> None:
    """Its last step is .ci/run: no check lives in the workflow alone."""
    [workflow] = documents(WORKFLOW)
    *_, last = workflow["jobs"]["run"]["steps"]

    assert last == {"run": ".ci/run"}


def test_hooks_are_what_ci_lints() -> None:
    """Each hook is a command of .ci/run, and none is fetched from elsewhere."""
    [configuration] = documents(HOOKS)
    [repository] = configuration["repos"]
    commands = (ROOT / ".ci" / "run").read_text()

    assert repository["repo"] == "local"
    assert [hook["id"] for hook in repository["hooks"]] == ["lint", "format", "types"]
    assert all(f"{hook['entry']}\n" in commands for hook in repository["hooks"])
