"""Measures a unit by the function of its suite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from distillkit.config.evaluate import TEACHER, EvaluateConfig
from distillkit.data import tokenizer_hash
from distillkit.data.sources import load_source
from distillkit.evaluation.comparison import compare
from distillkit.evaluation.held_out import KEY, held_out_batches, held_out_rows
from distillkit.evaluation.model_spec import LoadedModel
from distillkit.evaluation.units import CHOICES, DOCUMENTS, Unit
from distillkit.models.decoder import check_head, head
from distillkit.models.varlen_attention import use_varlen_attention
from distillkit.models.vocabulary import check_known_tokens, check_same_tokenizer, common_vocabulary

Progress = Callable[[int, int], None]
"""Called with how much is done, and the whole."""


def check_settings(config: EvaluateConfig) -> None:
    """Raises `UserError` for a text that cannot be read and a task that does not exist.

    Found now, they cost seconds; found at their turn, the hours of what is measured before.
    """
    if config.divergence is not None:
        load_source(config.divergence.dataset, KEY)
    if config.generation is not None:
        from distillkit.evaluation.choices import read_questions
        from distillkit.evaluation.continuations import check_text

        check_text(config.generation)
        read_questions(config.generation)
    if config.benchmarks is not None:
        from distillkit.evaluation.benchmarks import check_tasks

        check_tasks(config.benchmarks, config.benchmarks.tasks)
    if config.needles is not None:
        from distillkit.evaluation.needles import read_haystack

        read_haystack(config.needles.haystack, tokens=1)
    if config.long_context is not None:
        from distillkit.evaluation.long_context import check_texts

        check_texts(config.long_context)


def measure(
    unit: Unit, loaded: LoadedModel, teacher: Callable[[], LoadedModel], config: EvaluateConfig, progress: Progress
) -> Any:
    """The result of a unit, for JSON. `teacher` loads the teacher, where a unit needs it.

    Suites are imported where they run: lm-eval, for example, takes seconds and may not be installed.
    """
    if unit.suite == "model":
        return loaded.describe()
    if unit.suite == "divergence":
        return _divergence(loaded, teacher(), config, progress)
    if unit.suite == "generation":
        beside = teacher() if unit.beside_teacher and config.teacher is not None else None
        return _generation(unit, loaded, beside, config, progress)
    if unit.suite == "benchmarks":
        assert config.benchmarks is not None
        from distillkit.evaluation.benchmarks import run_benchmark, run_served_benchmark

        if (served := loaded.spec.served) is not None:
            return run_served_benchmark(served, config.benchmarks, unit.task, limit=config.limit, progress=progress)
        return run_benchmark(
            loaded.model, loaded.tokenizer, config.benchmarks, unit.task, limit=config.limit, progress=progress
        )
    if unit.suite == "needles":
        assert config.needles is not None
        from distillkit.evaluation.needles import measure_needles

        task, length = unit.task.split("@")
        needles = config.needles.model_copy(update={"lengths": [int(length)]})
        return measure_needles(loaded.model, loaded.tokenizer, needles, task, limit=config.limit, progress=progress)
    if unit.suite == "long_context":
        beside = teacher() if unit.beside_teacher and config.teacher is not None else None
        return _long_context(unit, loaded, beside, config, progress)
    assert config.speed is not None
    from distillkit.evaluation.speed import measure_speed

    return measure_speed(loaded.model, config.speed, int(unit.task))


def _divergence(
    student: LoadedModel, teacher: LoadedModel, config: EvaluateConfig, progress: Progress
) -> dict[str, Any]:
    """As in a run, the student's tokenizer encodes the text, and documents share rows."""
    assert config.divergence is not None
    settings = config.divergence
    check_same_tokenizer(teacher.tokenizer, student.tokenizer, teacher.spec.key)
    vocabulary_size = common_vocabulary(
        len(head(teacher.model)[0]), student.model, student.tokenizer, teacher.tokenizer
    )
    for each in (teacher, student):
        check_head(each.model, each.spec.key)
    prepared = Path(config.output_path) / "rows" / tokenizer_hash(student.tokenizer)[:16]
    rows = held_out_rows(settings, student.tokenizer, prepared)
    if config.limit is not None:
        rows = rows.select(range(min(config.limit, len(rows))))
    check_known_tokens(rows, vocabulary_size, student.tokenizer, KEY)
    with _varlen_attention(teacher.model), _varlen_attention(student.model):
        return compare(
            teacher.model,
            student.model,
            held_out_batches(rows),
            num_tokens=settings.num_tokens,
            sequence_length=settings.sequence_length,
            vocabulary_size=vocabulary_size,
            position_buckets=settings.position_buckets,
            layers=settings.layers,
            progress=progress,
        )


def _generation(
    unit: Unit, loaded: LoadedModel, teacher: LoadedModel | None, config: EvaluateConfig, progress: Progress
) -> dict[str, Any]:
    """teacher: where the model is a student that is compared with it."""
    assert config.generation is not None
    from distillkit.evaluation.choices import measure_choices
    from distillkit.evaluation.continuations import DATASET, measure_continuations, read_prompts, write

    settings = config.generation
    if unit.task == CHOICES:
        return measure_choices(loaded.model, loaded.tokenizer, settings, limit=config.limit, progress=progress)
    if teacher is not None:
        check_same_tokenizer(teacher.tokenizer, loaded.tokenizer, teacher.spec.key)
    judge = loaded if unit.model == TEACHER else teacher
    reference = judge or loaded
    columns = common_vocabulary(len(head(reference.model)[0]), loaded.model, loaded.tokenizer, reference.tokenizer)
    prompts = read_prompts(settings, loaded.tokenizer, config.limit)
    check_known_tokens(Dataset.from_dict({"input_ids": prompts}), columns, loaded.tokenizer, DATASET)
    teachers = None
    if judge is not None:
        key = (columns, str(prompts))
        if key not in judge.written:
            judge.written[key] = write(judge.model, prompts, settings, judge.model, columns, progress)
        teachers = judge.written[key]
        if judge is loaded:
            return measure_continuations(teachers, None, settings.new_tokens)
    written = write(loaded.model, prompts, settings, None if judge is None else judge.model, columns, progress)
    return measure_continuations(written, teachers, settings.new_tokens)


def _long_context(
    unit: Unit, loaded: LoadedModel, teacher: LoadedModel | None, config: EvaluateConfig, progress: Progress
) -> dict[str, Any]:
    """teacher: where the model is a student that is compared with it."""
    assert config.long_context is not None
    from distillkit.evaluation.long_context import DATASET, measure_documents, measure_last_words, read_documents

    settings, (task, _, distance) = config.long_context, unit.task.partition("@")
    if task != DOCUMENTS:
        return measure_last_words(
            loaded.model, loaded.tokenizer, settings, int(distance), limit=config.limit, progress=progress
        )
    reference = teacher or loaded
    check_same_tokenizer(reference.tokenizer, loaded.tokenizer, reference.spec.key)
    columns = common_vocabulary(len(head(reference.model)[0]), loaded.model, loaded.tokenizer, reference.tokenizer)
    for each in (reference, loaded):
        check_head(each.model, each.spec.key)
    documents = read_documents(settings, loaded.tokenizer, config.limit)
    check_known_tokens(Dataset.from_dict({"input_ids": documents}), columns, loaded.tokenizer, DATASET)
    beside = None if teacher is None else teacher.model
    return measure_documents(loaded.model, documents, settings, teacher=beside, columns=columns, progress=progress)


@contextmanager
def _varlen_attention(model: PreTrainedModel) -> Iterator[None]:
    """Only for packed documents: the other suites have single documents, with masks and caches."""
    exchanged = use_varlen_attention(model, model.dtype)
    try:
        yield
    finally:
        if exchanged:
            model.set_attn_implementation("sdpa")
