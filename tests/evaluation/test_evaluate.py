"""`distillkit evaluate` measures what a run measures, and says it."""

import io

import pytest
from rich.console import Console

from distillkit.config import DatasetSource, UserError
from distillkit.data import build_dataset
from distillkit.evaluation import evaluate, measure_divergence
from distillkit.evaluation.evaluate import held_out_batches
from distillkit.pretrained import load_model
from tests.training.tiny import BYTES, llama, save_llama, save_text, tokenizer


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


def test_text_is_read_with_the_students_tokenizer_and_held_to_what_both_know(tmp_path):
    """As in a run: here a token of the student's own, which the teacher's tokenizer would read as seven bytes."""
    teacher, student = save_llama(tmp_path / "teacher", 0), str(tmp_path / "student")
    llama(1, vocab=BYTES + 1).save_pretrained(student)
    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<think>"]})
    more.save_pretrained(student)
    text = tmp_path / "held_out.txt"
    text.write_text("One is known to both, <think>and one is not.")
    line = rf"^data: holds token {BYTES} \('<think>'\), which the teacher and the student do not both know"
    with pytest.raises(UserError, match=line):
        evaluate(teacher, student, DatasetSource(disk_path=str(text)))
