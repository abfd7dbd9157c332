"""`distillkit evaluate`: how far a student is from its teacher, as a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distillkit.config import DatasetSource
from distillkit.data import build_dataset, collate
from distillkit.data.signals import TensorRows
from distillkit.evaluation.divergence import Divergence, measure_divergence
from distillkit.pretrained import load_model, load_tokenizer
from distillkit.teacher.decoder import check_head
from distillkit.teacher.vocabulary import check_known_tokens, common_vocabulary, load_students_tokenizer
from distillkit.varlen_attention import use_varlen_attention


def evaluate(
    teacher: str,
    student: str,
    data: DatasetSource,
    *,
    num_tokens: int = 16384,
    sequence_length: int = 2048,
    trust_remote_code: bool = False,
    console: Console | None = None,
    **teacher_kwargs: Any,
) -> Divergence:
    """Measure `student` against `teacher` on the first `num_tokens` tokens of `data`, and print the result.

    Args:
        teacher, student: folders, hub ids or .gguf files. Each computes in the dtype of its checkpoint, on the
            accelerator if there is one.
        data: held-out text, which the student's tokenizer reads, as in a run; its documents are packed into rows of
            `sequence_length` tokens.
        teacher_kwargs: keyword arguments of `from_pretrained` for the teacher, such as `gguf_file`.

    Raises:
        UserError: a model or the data cannot be read, the models do not share a tokenizer, or the text holds a token
            that one of them does not know.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    teacher_model = load_model(teacher, key="teacher", trust_remote_code=trust_remote_code, **teacher_kwargs).to(device)
    student_model = load_model(student, key="student", trust_remote_code=trust_remote_code).to(device)
    for model in (teacher_model, student_model):
        use_varlen_attention(model, model.dtype)
    where = {name: teacher_kwargs[name] for name in ("gguf_file", "revision") if name in teacher_kwargs}
    teachers = load_tokenizer(teacher, key="teacher", trust_remote_code=trust_remote_code, **where)
    tokenizer = load_students_tokenizer(student, teachers, "student", trust_remote_code=trust_remote_code)
    vocabulary_size = common_vocabulary(teacher_model, student_model, tokenizer, teachers)
    check_head(teacher_model, "teacher")
    check_head(student_model, "student")
    rows = build_dataset(data, tokenizer, sequence_length, key="data")
    check_known_tokens(rows, vocabulary_size, tokenizer, "data")
    measured = measure_divergence(
        teacher_model,
        student_model,
        held_out_batches(rows),
        num_tokens=num_tokens,
        vocabulary_size=vocabulary_size,
    )
    (console or Console()).print(divergence_table({Path(student).name: measured}))
    return measured


def held_out_batches(
    rows: Dataset, batch_size: int = 1, pad_token_id: int = 0, signal_columns: Sequence[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """The rows in their order, in batches."""
    read = TensorRows(rows, signal_columns)
    for start in range(0, len(rows), batch_size):
        chosen = read.__getitems__(list(range(start, min(start + batch_size, len(rows)))))
        yield collate(chosen, pad_token_id=pad_token_id, signal_columns=signal_columns)


def divergence_table(columns: dict[str, Divergence]) -> Table:
    """One column per measurement, under its name."""
    table = Table(title="divergence from the teacher, on held-out text", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, cells in _rows(list(columns.values())):
        table.add_row(label, *cells)
    return table


def _rows(measured: Sequence[Divergence]) -> Iterator[tuple[str, list[str]]]:
    yield "KL(teacher‖student), nats per token", [_shown(each.kl, ".4f") for each in measured]
    yield "same likeliest token", [_shown(each.agreement, ".1%") for each in measured]
    yield "perplexity, student", [_shown(each.student_perplexity, ".2f") for each in measured]
    yield "perplexity, teacher", [_shown(each.teacher_perplexity, ".2f") for each in measured]
    yield "tokens measured", [f"{each.tokens:,}" for each in measured]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
