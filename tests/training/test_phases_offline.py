"""Phases that learn from a captured teacher."""

import json

from distillkit.training import text as module
from tests.training.captures import captured, configuration, run
from tests.training.tiny import save_llama, save_text


def test_captured_files_are_held_to_their_manifest_once(tmp_path, monkeypatch):
    """There may be terabytes of them."""
    held, refuse_damage = [], module.refuse_damage

    def noted(source, key):
        held.append(key)
        refuse_damage(source, key)

    monkeypatch.setattr(module, "refuse_damage", noted)
    teacher = save_llama(tmp_path / "teacher", 0)
    data = captured(teacher, save_text(tmp_path / "train.jsonl"), tmp_path / "captured")
    student = save_llama(tmp_path / "student", 1)
    phases = [{"name": name} for name in ("one", "two", "three")]
    run(configuration(student, data, tmp_path / "run", phases=phases))
    assert held == ["dataset.train_dataset"]
    for path in (tmp_path / "run").glob("phases/*/run.json"):
        files = json.loads(path.read_text())["origins"]["data"]["dataset.train_dataset"]["files"]
        assert f"{data}/manifest.json" in files
