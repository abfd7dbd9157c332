"""`distillkit evaluate` measures what a run measures, and says it."""

import io

import pytest
from rich.console import Console

from distillkit.config import DatasetSource
from distillkit.data import build_dataset
from distillkit.evaluation import evaluate, measure_divergence
from distillkit.evaluation.evaluate import held_out_batches
from distillkit.pretrained import load_model
from tests.training.tiny import save_llama, save_text, tokenizer


def test_it_measures_two_folders_on_a_file(tmp_path):
    teacher, student = save_llama(tmp_path / "teacher", 0), save_llama(tmp_path / "student", 1)
    source = DatasetSource(disk_path=save_text(tmp_path / "held_out.jsonl"))
    said = io.StringIO()
    measured = evaluate(
        teacher, student, source, num_tokens=300, sequence_length=32, console=Console(file=said, width=120)
    )
    rows = build_dataset(source, tokenizer(), 32)
    expected = measure_divergence(load_model(teacher), load_model(student), held_out_batches(rows, 3), num_tokens=300)
    assert measured.as_metrics() == pytest.approx(expected.as_metrics(), rel=1e-5)
    assert measured.tokens == 300
    assert f"{measured.kl:.4f}" in said.getvalue()
