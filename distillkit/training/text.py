"""The rows of a run: what is trained on, what is measured on, and whose word comes with them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments

from distillkit.config import DatasetSource, RunConfig
from distillkit.data import build_datasets
from distillkit.data.prepared import file_states
from distillkit.models.vocabulary import check_known_tokens
from distillkit.runs.writing import read_json
from distillkit.teacher.captured import CapturedTeacher
from distillkit.teacher.opening import manifest_of, open_held_out, refuse_damage, refuse_other_format
from distillkit.training.processes import main_process_first
from distillkit.training.run_folder import RUN, RunFolder
from distillkit.training.setup import Models

PREPARED = "_prepared"
"""In a run's folder: the rows that its processes share, until it ends. What begins with _ is not pushed to the hub.

Captured rows that are packed already are not copied there: next to nothing is done to them, and they are large.
"""


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure on, and the teacher to measure against; None where its word on them is not known."""

    rows: Dataset
    teacher: PreTrainedModel | CapturedTeacher | None

    @property
    def signal_columns(self) -> tuple[str, ...]:
        return self.teacher.columns if isinstance(self.teacher, CapturedTeacher) else ()


def load_text(
    config: RunConfig, folder: RunFolder, arguments: TrainingArguments, models: Models
) -> tuple[Dataset, HeldOut | None]:
    """Training and held-out rows; the first process prepares them, the others find them prepared.

    Raises `UserError` for rows that cannot be learnt from, and for captured ones that are not as they were captured.
    """
    source, key = _held_out_source(config)
    captured = models.teacher if isinstance(models.teacher, CapturedTeacher) else None
    dataset = config.dataset
    if arguments.world_size > 1 and dataset.prepared_dataset_path is None and not (captured and dataset.prepacked):
        dataset = dataset.model_copy(update={"prepared_dataset_path": str(folder.path / PREPARED)})

    def build() -> tuple[Dataset, Dataset | None, PreTrainedModel | CapturedTeacher | None]:
        judge: PreTrainedModel | CapturedTeacher | None = models.teacher
        if captured is not None:
            if folder.main_process:
                _verify(folder, config.model, config.dataset.train_dataset, "dataset.train_dataset")
                if source is not None:
                    _verify(folder, config.model, source, key)
            judge = None
            if source is not None:
                judge = open_held_out(captured, config.dataset.train_dataset, models.tokenizer, source, key)
        train_rows, rows = build_datasets(
            dataset,
            models.tokenizer,
            config.sequence_length,
            None if config.evaluation is None else config.evaluation.dataset,
            signal_columns=() if captured is None else captured.columns,
            eval_signal_columns=judge.columns if isinstance(judge, CapturedTeacher) else (),
        )
        return train_rows, rows, judge

    train_rows, rows, judge = main_process_first(arguments, build)
    held_out = None if rows is None else HeldOut(rows, judge)
    for teacher, each, name in ((captured, train_rows, "dataset.train_dataset"), (judge, rows, key)):
        if each is not None:
            check_known_tokens(each, models.vocabulary_size, models.tokenizer, name)
            if isinstance(teacher, CapturedTeacher):
                refuse_other_format(teacher, each, name)
    return train_rows, held_out


def _verify(folder: RunFolder, model: str | None, source: DatasetSource, key: str) -> None:
    """Hold a captured dataset to its manifest, unless its files are those that were held to it when the run started.

    They are taken for the same by their sizes and times of change: there may be terabytes of them.

    model: where the student comes from; what the run that trained it, as the phase before did, has held need not be.
    """
    if manifest_of(source) is None:
        return
    files = hashlib.sha256(json.dumps(file_states(source.disk_path or "")).encode()).hexdigest()
    verified = folder.noted("verified") or {}
    if verified.get(key) == files:
        return
    before = {} if model is None else read_json(Path(model) / RUN).get("verified", {})
    if before.get(key) != files:
        refuse_damage(source, key)
    folder.note("verified", {**verified, key: files})


def _held_out_source(config: RunConfig) -> tuple[DatasetSource | None, str]:
    """Where held-out text is, and the key of the YAML that says so."""
    if config.evaluation is not None and config.evaluation.dataset is not None:
        return config.evaluation.dataset, "evaluation.dataset"
    return config.dataset.eval_dataset, "dataset.eval_dataset"
