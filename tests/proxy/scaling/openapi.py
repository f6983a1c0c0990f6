"""The schemas of `docs/platform.openapi.yaml`, from the messages: `python -m tests.proxy.scaling.openapi`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema
from ruamel.yaml import YAML

from proxy.scaling import messages

FILE = Path(__file__).parents[3] / "docs" / "platform.openapi.yaml"
BEGIN = "  schemas:\n"
MODELS = (
    messages.ScaleRequest,
    messages.Placement,
    messages.Progress,
    messages.Resources,
    messages.Run,
    messages.PlacementStatus,
)


def schemas() -> dict[str, Any]:
    _, document = models_json_schema(
        [(model, "validation") for model in MODELS], ref_template="#/components/schemas/{model}"
    )
    found: dict[str, Any] = document["$defs"]
    return found


def written() -> str:
    """What the file should be."""
    head = FILE.read_text(encoding="utf-8").partition(BEGIN)[0]
    yaml = YAML()
    yaml.width = 116
    text = io.StringIO()
    yaml.dump(schemas(), text)
    return head + BEGIN + "".join(f"    {line}\n" for line in text.getvalue().splitlines())


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
