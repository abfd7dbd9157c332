"""The rows of a run: what is trained on, what is measured on, and the teacher that each is compared with."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import TrainingArguments

from distillkit.config import DatasetSource, RunConfig
from distillkit.data import build_datasets
from distillkit.data.dataset import TokenisedTexts
from distillkit.data.prepared import file_states
from distillkit.models.vocabulary import check_known_tokens
from distillkit.runs.folder import PhaseFolder
from distillkit.runs.names import PREPARED
from distillkit.runs.record import read_record
from distillkit.teacher import Teacher
from distillkit.teacher.opening import manifest_of, open_held_out, refuse_damage
from distillkit.training.budget import scan_rows
from distillkit.training.origins import settle
from distillkit.training.parallel import main_process_first
from distillkit.training.setup import Models


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure on, and the teacher to measure against; None where its outputs for them are not known."""

    rows: Dataset
    teacher: Teacher | None


def load_text(
    config: RunConfig,
    folder: PhaseFolder,
    arguments: TrainingArguments,
    models: Models,
    tokenised: TokenisedTexts | None,
) -> tuple[Dataset, HeldOut | None]:
    """Training and held-out rows; the first process prepares them, the others find them prepared.

    tokenised: keeps documents for the phases that come.

    Raises `UserError` for rows that cannot be learnt from, and for captured ones that are not as they were captured.
    """
    source, key = config.held_out_text
    teacher, dataset = models.teacher, config.dataset
    copied = not (teacher.columns and dataset.prepacked)
    if arguments.world_size > 1 and dataset.prepared_dataset_path is None and copied:
        dataset = dataset.model_copy(update={"prepared_dataset_path": str(folder.path / PREPARED)})

    def build() -> tuple[Dataset, HeldOut | None]:
        if teacher.columns and folder.main_process:
            _verify(folder, config.model, config.dataset.train_dataset, "dataset.train_dataset")
            if source is not None:
                _verify(folder, config.model, source, key)
        measured_against = None
        if source is not None:
            measured_against = open_held_out(teacher, config.dataset.train_dataset, models.tokenizer, source, key)
        train_rows, rows = build_datasets(
            dataset,
            models.tokenizer,
            config.sequence_length,
            None if config.evaluation is None else config.evaluation.dataset,
            signal_columns=teacher.columns,
            eval_signal_columns=() if measured_against is None else measured_against.columns,
            tokenised=tokenised,
        )
        return train_rows, None if rows is None else HeldOut(rows, measured_against)

    train_rows, held_out = main_process_first(arguments, build)
    _check_rows(train_rows, teacher, models, "dataset.train_dataset")
    if held_out is not None:
        _check_rows(held_out.rows, held_out.teacher, models, key)
        digest = scan_rows(held_out.rows, digested=True)[1] if folder.main_process else None
        main_process_first(arguments, lambda: settle(folder, key, "rows", digest))
    return train_rows, held_out


def _check_rows(rows: Dataset, teacher: Teacher | None, models: Models, key: str) -> None:
    check_known_tokens(rows, models.vocabulary_size, models.tokenizer, key)
    if teacher is not None:
        teacher.check_rows(rows, key)


def _verify(folder: PhaseFolder, model: str | None, source: DatasetSource, key: str) -> None:
    """Verify a captured dataset against its manifest, unless the same files were verified when the run started.

    They are taken for the same by their sizes and times of change: there may be terabytes of them.

    model: where the student comes from; what the run that trained it (the phase before) has verified is not read again.
    """
    if manifest_of(source) is None:
        return
    files = hashlib.sha256(json.dumps(file_states(source.disk_path or "")).encode()).hexdigest()
    verified = folder.record.verified or {}
    if verified.get(key) == files:
        return
    former = None if model is None else read_record(Path(model))
    if former is None or (former.verified or {}).get(key) != files:
        refuse_damage(source, key)
    folder.update_record(verified={**verified, key: files})
