"""Files that a run writes: JSON that every program reads."""

import json
import math

from distillkit.runs.metrics import append_metrics, read_metrics
from distillkit.runs.writing import read_json, write_json


def refuse(constant):
    raise AssertionError(constant)


def test_json_is_json_also_where_a_number_is_not_finite(tmp_path):
    content = {"kl": math.nan, "a": [{"perplexity": math.inf}, (-math.inf, 1.5)], "loss": 0.1, "n": 3, "no": None}
    write_json(tmp_path / "results.json", content)
    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    expected = {"kl": None, "a": [{"perplexity": None}, [None, 1.5]], "loss": 0.1, "n": 3, "no": None}
    assert read_json(tmp_path / "results.json") == expected
    append_metrics(tmp_path, {"step": 1, "loss": math.nan})
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]
