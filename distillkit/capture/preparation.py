"""From a configuration to a capture that can begin: checked against the teacher, rows prepared, plan written."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distillkit.capture.engines import Row
from distillkit.capture.plan import Plan, described_without_rows, make_plan, refuse_other_capture, settle_plan
from distillkit.compression import Codec, build_codec
from distillkit.config.capture import CaptureConfig, check_shard_size
from distillkit.config.errors import UserError
from distillkit.data import build_datasets
from distillkit.models.loading import load_pretrained_config, load_tokenizer, weights_sha256, where
from distillkit.shards import ShardRecord, read_record
from distillkit.shards.background import background_is_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capture:
    """A capture that can begin: plan, folder, rows and codec."""

    config: CaptureConfig
    folder: Path
    plan: Plan
    rows: Dataset
    codec: Codec
    tokenizer: PreTrainedTokenizerBase

    @property
    def fitted_rows(self) -> int:
        """Number of rows, from the first, that the background is fitted on: the first shard, or half of the only one.

        Its quality is measured on the other rows.
        """
        first = self.plan.shards[0][1]
        return first if len(self.plan.shards) > 1 else (first + 1) // 2

    def record(self, shard: int) -> ShardRecord | None:
        """The record of a complete shard. The first one also needs the background, which is made with it.

        Raises `UserError` for a shard of another capture, which is never replaced.
        """
        if shard == 0 and self.plan.background and not background_is_of(self.folder, self.plan.sha256):
            return None
        found, rows = read_record(self.folder, shard), tuple(self.plan.shards[shard])
        if found is not None and (found.plan, found.rows) != (self.plan.sha256, rows):
            raise UserError(
                "output_path",
                f"{self.folder / found.file} belongs to another capture; remove it and its .json, and "
                "run the same command again",
            )
        return found

    def records(self) -> dict[int, ShardRecord]:
        """The records of all complete shards, in order."""
        records = {shard: self.record(shard) for shard in range(len(self.plan.shards))}
        return {shard: record for shard, record in records.items() if record is not None}

    def shard_rows(self, shard: int) -> list[Row]:
        """The rows of a shard, in order."""
        start, stop = self.plan.shards[shard]
        columns = self.rows[start:stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def prepare(config: CaptureConfig) -> Capture:
    """Check, tokenise and plan. Raises `UserError` where the capture is not possible, or not in `output_path`."""
    codec = build_codec(config.compression.kind, config.compression.config)
    check_shard_size(config, codec.bytes_per_token)
    teacher = config.teacher
    options = {"key": "teacher.path", "trust_remote_code": config.trust_remote_code, **where(teacher.kwargs)}
    pretrained = load_pretrained_config(teacher.path, **options)
    text = pretrained.get_text_config()
    check_vocabulary(config, text.vocab_size)
    _warn_of_long_rows(config, text)
    tokenizer = load_tokenizer(teacher.path, **options)
    folder, weights = Path(config.output_path), weights_sha256(teacher.path, teacher.kwargs)
    described = described_without_rows(config, codec, pretrained, weights, tokenizer, text.vocab_size)
    refuse_other_capture(folder, described)
    kept = {"prepared_dataset_path": config.dataset.prepared_dataset_path or str(_prepared_beside(config))}
    rows, _ = build_datasets(config.dataset.model_copy(update=kept), tokenizer, config.sequence_length)
    plan = make_plan(config, codec, described, rows, text.vocab_size)
    settled = settle_plan(folder, plan)
    if settled.versions != plan.versions:
        then = ", ".join(f"{name} {number}" for name, number in settled.versions.items())
        logger.warning("the capture in %s began with %s; new shards may differ in the last bits", folder, then)
    begun_with = settled.capture["tokens_per_batch"]
    if begun_with != config.tokens_per_batch:
        logger.warning(
            "tokens_per_batch: is %d, but was %d when the capture in %s began; new shards may differ in the last bits",
            config.tokens_per_batch,
            begun_with,
            folder,
        )
    return Capture(config, folder, settled, rows, codec, tokenizer)


def remove_prepared(config: CaptureConfig) -> None:
    """Delete the prepared rows of a complete capture, unless the configuration names a folder for them."""
    folder = _prepared_beside(config)
    if config.dataset.prepared_dataset_path is None and folder.exists():
        with FileLock(folder / ".train.lock"):  # another process may be loading them
            shutil.rmtree(folder, ignore_errors=True)


def _prepared_beside(config: CaptureConfig) -> Path:
    """Folder of the prepared rows until the capture is complete, so that text is tokenised once."""
    folder = Path(config.output_path).resolve()
    return folder.with_name(f"{folder.name}.prepared")


def check_vocabulary(config: CaptureConfig, width: int) -> None:
    """Raises `UserError` where the codec's vocabulary is not as wide as the teacher's head."""
    compression = config.compression
    given = getattr(compression.config, compression.vocabulary_key)
    if given != width:
        key = f"compression.{compression.kind}.{compression.vocabulary_key}"
        raise UserError(
            key,
            f"is {given}, but the teacher's head has {width} columns, and all of them are captured, including those "
            f"without a token in the tokenizer; give {width}",
        )


def _warn_of_long_rows(config: CaptureConfig, teacher: PreTrainedConfig) -> None:
    longest = getattr(teacher, "max_position_embeddings", None)  # missing where positions are unlimited
    if longest is not None and config.sequence_length > longest:
        logger.warning(
            "sequence_length: is %d, but the teacher was trained on at most %d tokens; its outputs beyond are poor",
            config.sequence_length,
            longest,
        )
