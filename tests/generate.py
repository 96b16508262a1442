"""Writes what `deploy` says of the messages anew: `python -m tests.generate`, from the root.

Holds no test; `test_schema` has those, and fails while a file is not what this would write.
"""

from __future__ import annotations

import json
from pathlib import Path

from service import schema

DEPLOY = Path(__file__).parents[1] / "deploy"


def generated() -> dict[Path, str]:
    """Return the text of every generated file by its path."""
    documents = {
        "asyncapi.yaml": schema.asyncapi(),
        "status-transition.schema.json": schema.transition_schema(),
    }
    return {
        DEPLOY / name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in documents.items()
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
