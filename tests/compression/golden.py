"""Bytes that the published toolkit made of SmolLM2's log-probabilities on real text (tests/golden/compression)."""

import json
from pathlib import Path

from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "golden" / "compression"
CONFIGURATIONS = json.loads((FOLDER / "manifest.json").read_text())


def load(name):
    """(inputs and decoded values by name, stored columns by name)."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    columns = {key.removeprefix("row."): value for key, value in tensors.items() if key.startswith("row.")}
    return tensors, columns
