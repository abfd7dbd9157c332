"""The published toolkit's losses on fixed inputs: values and gradient norms (tests/golden/losses)."""

import json
from pathlib import Path

from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "golden" / "losses"
INPUTS = load_file(FOLDER / "inputs.safetensors")
MASK = INPUTS["mask"].bool().flatten()
ROWS = json.loads((FOLDER / "expected.json").read_text())["expected"]
OPTIONS = ("temperature", "missing_probability_handling", "margin")


def row_id(row):
    return "-".join(str(row[key]) for key in ("function", "teacher", *OPTIONS) if key in row)


def options(row):
    return {key: row[key] for key in OPTIONS if key in row}
