"""From the configuration to a captured teacher: how its word is stored, and whether the files are what was captured.

A dataset that `distillkit capture` made has a manifest, which says how; what the YAML says must not contradict it.
Datasets that others published have none: there the YAML says how, or the columns are plain.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distillkit.compression import Codec, build_codec
from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError, shown
from distillkit.config.section import Section
from distillkit.config.teacher import DatasetTeacherConfig
from distillkit.data import collate, tokenizer_hash
from distillkit.data.signals import TensorRows
from distillkit.data.sources import load_source
from distillkit.models.vocabulary import check_same_tokenizer
from distillkit.shards import Manifest, read_background, read_background_file, read_manifest, verify_shards
from distillkit.teacher.captured import CapturedTeacher
from distillkit.teacher.captured_tokenizer import read_tokenizer

logger = logging.getLogger(__name__)

PLAIN = ("token_ids", "top_values")


def manifest_of(source: DatasetSource) -> Manifest | None:
    """The manifest of a captured dataset on disk; None for any other dataset."""
    return None if source.disk_path is None else read_manifest(Path(source.disk_path))


def open_captured(
    config: DatasetTeacherConfig, source: DatasetSource, key: str = "dataset.train_dataset"
) -> CapturedTeacher:
    """The teacher whose word the training dataset holds.

    key: the key of the YAML that holds the source, for error messages.

    Raises `UserError` where nothing says how it is stored, or the YAML and the manifest contradict one another.
    """
    manifest = manifest_of(source)
    named = {
        name: section
        for name in ("logprob_compressor", "legacy_logit_compression")
        if (section := getattr(config, name)) is not None
    }
    if manifest is not None:
        codec = build_codec(manifest.codec_kind, manifest.codec_config)
        for kind, section in named.items():
            _refuse_contradiction(kind, section, codec, key)
    elif named:
        codec = build_codec(*next(iter(named.items())))
    else:
        codec = _plain(config, source, key)
    if config.vocab_size not in (None, codec.vocabulary_size):
        raise UserError(
            "teacher.vocab_size",
            f"is {config.vocab_size}, but the outputs of {key} are over {codec.vocabulary_size} tokens; remove it",
        )
    if config.background is not None:
        return CapturedTeacher(codec, open_background(config.background, codec.vocabulary_size))
    folder = Path(source.disk_path or "")
    return CapturedTeacher(codec, read_background(folder, manifest))


def open_held_out(
    taught: CapturedTeacher, training: DatasetSource, student: PreTrainedTokenizerBase, source: DatasetSource, key: str
) -> CapturedTeacher | None:
    """The teacher whose word a held-out dataset holds; None where it holds text alone.

    taught: the teacher of the training dataset, whose format a dataset without a manifest is taken to have.
    training: the training dataset.
    student: the student's tokenizer.

    Raises `UserError` where its tokens are not the student's, or its vocabulary is not that of the training dataset;
    warns where its teacher is another.
    """
    manifest = manifest_of(source)
    if manifest is None:
        return taught if set(taught.columns) <= set(load_source(source, key).column_names) else None
    captured_tokenizer(source, student, key)
    if manifest.vocabulary_size != taught.vocabulary_size:
        raise UserError(
            key,
            f"was captured over {manifest.vocabulary_size} tokens, but dataset.train_dataset over "
            f"{taught.vocabulary_size}; capture both from one teacher",
        )
    trained_on = manifest_of(training)
    others = {} if trained_on is None else trained_on.teacher
    different = [
        f"{name} {manifest.teacher.get(name)!r}, not {value!r}"
        for name, value in others.items()
        if manifest.teacher.get(name) != value
    ]
    if different:
        logger.warning(
            "%s: its teacher, which the student is measured against, is not that of dataset.train_dataset: %s",
            key,
            "; ".join(different),
        )
    return CapturedTeacher(build_codec(manifest.codec_kind, manifest.codec_config))


def captured_tokenizer(
    source: DatasetSource, student: PreTrainedTokenizerBase, key: str = "dataset.train_dataset"
) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher that was captured: the student's, unless the dataset says otherwise.

    Where the two number tokens differently, that which lies in the dataset tells whether they agree on all tokens that
    both have.

    Raises `UserError` where they do not, or that cannot be told.
    """
    manifest = manifest_of(source)
    if manifest is None or manifest.tokenizer_sha256 in (None, tokenizer_hash(student)):
        return student
    teacher = read_tokenizer(Path(source.disk_path or ""), manifest)
    if teacher is None:
        raise UserError(
            "model",
            f"its tokenizer is not the one that {key} was captured with, that of "
            f"{manifest.teacher.get('path', '')!r}; use a student of the teacher's family, or capture with the "
            "student's tokenizer",
        )
    check_same_tokenizer(teacher, student, key)
    return teacher


def open_background(path: str, vocabulary_size: int, key: str = "teacher.background") -> Float[Tensor, " vocab"]:
    """The background of a captured dataset, or in a file of its own. Raises `UserError` where there is none."""
    folder = Path(path)
    logprobs = read_background(folder, read_manifest(folder)) if folder.is_dir() else read_background_file(folder)
    if logprobs is None:
        raise UserError(key, f"{path!r} has no background; name a dataset that distillkit capture made")
    if len(logprobs) != vocabulary_size:
        raise UserError(
            key,
            f"covers {len(logprobs)} tokens, but the teacher's vocabulary has {vocabulary_size}; it is of "
            "another teacher",
        )
    return logprobs


def refuse_damage(source: DatasetSource, key: str) -> None:
    """Raises `UserError` where a shard of a captured dataset is not what was captured. Reads all of them."""
    manifest = manifest_of(source)
    if manifest is None:
        return
    folder = Path(source.disk_path or "")
    problems = verify_shards(folder, manifest)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        captured_here = (folder / "plan.json").is_file()
        goes_on = "capture goes on there" if captured_here else "pack, of the same dataset to the same folder, mends it"
        raise UserError(f"{key}.disk_path", f"{problems[0]}{more}; delete such files, and distillkit {goes_on}")


def refuse_other_format(teacher: CapturedTeacher, rows: Dataset, key: str) -> None:
    """Raises `UserError` where the first row cannot have been stored as is said: other widths, tokens that are none."""
    batch = collate([TensorRows(rows, teacher.columns)[0]], pad_token_id=0, signal_columns=teacher.columns)
    try:
        said = teacher.codec.decode({name: batch[name].flatten(0, 1) for name in teacher.columns})
    except UserError as error:
        raise UserError(key, f"{error}") from None
    largest = int(said.ids.max())
    if largest >= teacher.vocabulary_size or bool(said.logprobs.isnan().any()):
        raise UserError(
            key,
            f"read as {teacher.codec.kind}, its first row says nonsense (token {largest} of "
            f"{teacher.vocabulary_size}); give the configuration that it was captured with",
        )


def _refuse_contradiction(kind: str, section: Section, codec: Codec, key: str) -> None:
    if kind != codec.kind:
        raise UserError(
            f"teacher.{kind}", f"{key} was captured with {codec.kind}; remove it, for the manifest says how"
        )
    ours, theirs = section.model_dump(), codec.config.model_dump()
    for name in ours:
        if ours[name] != theirs[name]:
            raise UserError(
                f"teacher.{kind}.{name}",
                f"is {shown(ours[name])}, but {key} was captured with "
                f"{shown(theirs[name])}; remove {kind}, for the manifest says how",
            )


def _plain(config: DatasetTeacherConfig, source: DatasetSource, key: str) -> Codec:
    rows = load_source(source, key)
    if not set(PLAIN) <= set(rows.column_names):
        raise UserError(
            "teacher.logprob_compressor",
            f"is missing: {key} has no manifest that says how its outputs are compressed; "
            "give logprob_compressor or legacy_logit_compression as it was captured",
        )
    if config.vocab_size is None:
        raise UserError("teacher.vocab_size", f"is missing: the size of the vocabulary that {key} was captured over")
    first: Mapping[str, Any] = rows[0]
    if not first["token_ids"]:
        raise UserError(key, "its first row is empty; remove it")
    return build_codec("plain", {"k": len(first["token_ids"][0]), "vocab_size": config.vocab_size})
