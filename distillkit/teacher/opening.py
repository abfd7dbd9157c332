"""From the configuration to a teacher.

The manifest of a dataset that `distillkit capture` made describes how a captured teacher's outputs are stored; the YAML
must not contradict it. Datasets published by others have no manifest: there the YAML describes it, or the columns are
plain.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.compression import Codec, build_codec
from distillkit.compression.plain import Plain
from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError, shown
from distillkit.config.run import RunConfig
from distillkit.config.section import Section
from distillkit.config.teacher import DatasetTeacherConfig, HFTeacherConfig, ServerTeacherConfig
from distillkit.data import tokenizer_hash
from distillkit.data.sources import load_source
from distillkit.models.decoder import head
from distillkit.models.vocabulary import check_same_tokenizer
from distillkit.shards import Manifest, read_background, read_background_file, read_manifest, verify_shards
from distillkit.shards.names import PLAN
from distillkit.teacher.aligned import AlignedTeacher
from distillkit.teacher.captured import CapturedTeacher
from distillkit.teacher.captured_tokenizer import read_tokenizer
from distillkit.teacher.live import LiveTeacher
from distillkit.teacher.served import open_served
from distillkit.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


def open_teacher(
    config: RunConfig, model: PreTrainedModel | None, student: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
) -> Teacher:
    """The teacher of a run, with the background distribution where a loss needs one.

    model: the loaded model of a live teacher. student, own: the tokenizers of the student and of the teacher.

    Raises UserError where a captured teacher cannot be read, a server cannot be the teacher, or a background is needed
    and missing.
    """
    positions = [
        position
        for position, loss in enumerate(config.loss_functions)
        if loss.missing_probability_handling == "background"
    ]
    path = config.teacher.background if positions else None
    if isinstance(config.teacher, HFTeacherConfig):
        assert model is not None
        if config.teacher.tokenizer == "own":
            assert config.teacher.top_k is not None
            return AlignedTeacher(model, student, own, config.teacher.top_k)
        return LiveTeacher(model, None if path is None else open_background(path, len(head(model)[0])))
    if isinstance(config.teacher, ServerTeacherConfig):
        background = None if path is None else functools.partial(open_background, path)
        return open_served(config.teacher, student, config.sequence_length, background)
    teacher = open_captured(config.teacher, config.dataset.train_dataset)
    if positions and teacher.background is None:
        raise UserError(
            f"loss_functions[{positions[0]}].missing_probability_handling",
            "background needs teacher.background, because dataset.train_dataset has none",
        )
    return teacher


def manifest_of(source: DatasetSource) -> Manifest | None:
    """The manifest of a captured dataset on disk; None for any other dataset."""
    return None if source.disk_path is None else read_manifest(Path(source.disk_path))


def named_formats(config: DatasetTeacherConfig) -> dict[str, Section]:
    """The format that the YAML gives for a captured teacher's outputs, by the name of its section, if it gives one."""
    sections = {name: getattr(config, name) for name in ("logprob_compressor", "legacy_logit_compression")}
    return {name: section for name, section in sections.items() if section is not None}


def open_captured(
    config: DatasetTeacherConfig, source: DatasetSource, key: str = "dataset.train_dataset"
) -> CapturedTeacher:
    """The teacher whose outputs the training dataset holds.

    key: the key of the YAML that holds the source, for error messages.

    Raises `UserError` where neither YAML nor manifest describes how they are stored, or the two contradict each other.
    """
    manifest = manifest_of(source)
    named = named_formats(config)
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
    teacher: Teacher, training: DatasetSource, student: PreTrainedTokenizerBase, source: DatasetSource, key: str
) -> Teacher | None:
    """The teacher that a student is compared with on a held-out dataset; None where a captured teacher's outputs are
    not in it.

    A live teacher is the one of the training. The outputs of a captured one must be in the held-out dataset too;
    without a manifest, in the format of the training dataset.

    training: the training dataset. student: the student's tokenizer.

    Raises `UserError` where the tokens are not the student's, or the vocabulary is not that of the training dataset;
    warns where the teacher is another one.
    """
    if not teacher.columns:
        return teacher
    manifest = manifest_of(source)
    if manifest is None:
        return teacher if set(teacher.columns) <= set(load_source(source, key).column_names) else None
    captured_tokenizer(source, student, key)
    if manifest.vocabulary_size != teacher.vocabulary_size:
        raise UserError(
            key,
            f"was captured over {manifest.vocabulary_size} tokens, but dataset.train_dataset over "
            f"{teacher.vocabulary_size}; capture both with the same teacher",
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
            "%s: its teacher, which the student is compared with, is not that of dataset.train_dataset: %s",
            key,
            "; ".join(different),
        )
    return CapturedTeacher(build_codec(manifest.codec_kind, manifest.codec_config))


def captured_tokenizer(
    source: DatasetSource, student: PreTrainedTokenizerBase, key: str = "dataset.train_dataset"
) -> PreTrainedTokenizerBase:
    """The tokenizer of the captured teacher: the student's, unless the manifest names another.

    Another one is read from the dataset and compared with the student's on all tokens that both have.

    Raises `UserError` where they disagree, or the dataset has no tokenizer.
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
    """The background in a captured dataset's folder or in a file. Raises `UserError` where there is none."""
    folder = Path(path)
    logprobs = read_background(folder, read_manifest(folder)) if folder.is_dir() else read_background_file(folder)
    if logprobs is None:
        raise UserError(key, f"{path!r} has no background; name a dataset that distillkit capture made")
    if len(logprobs) != vocabulary_size:
        raise UserError(
            key,
            f"covers {len(logprobs)} tokens, but the teacher's vocabulary has {vocabulary_size}; it belongs to "
            "another teacher",
        )
    return logprobs


def refuse_damage(source: DatasetSource, key: str) -> None:
    """Raises `UserError` for a damaged shard of a captured dataset. Reads all of them."""
    manifest = manifest_of(source)
    if manifest is None:
        return
    folder = Path(source.disk_path or "")
    problems = verify_shards(folder, manifest)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        command = "capture" if (folder / PLAN).is_file() else "pack"
        remedy = f"delete these files and run the same distillkit {command} again, which makes them anew"
        raise UserError(f"{key}.disk_path", f"{problems[0]}{more}; {remedy}")


def _refuse_contradiction(kind: str, section: Section, codec: Codec, key: str) -> None:
    if kind != codec.kind:
        raise UserError(
            f"teacher.{kind}", f"{key} was captured with {codec.kind}, according to its manifest; remove {kind}"
        )
    ours, theirs = section.model_dump(), codec.config.model_dump()
    for name in ours:
        if ours[name] != theirs[name]:
            raise UserError(
                f"teacher.{kind}.{name}",
                f"is {shown(ours[name])}, but {key} was captured with "
                f"{shown(theirs[name])}, according to its manifest; remove {kind}",
            )


def _plain(config: DatasetTeacherConfig, source: DatasetSource, key: str) -> Codec:
    rows = load_source(source, key)
    if not set(Plain.columns) <= set(rows.column_names):
        raise UserError(
            "teacher.logprob_compressor",
            f"is missing: {key} has no manifest that describes how its outputs are compressed; "
            "give the logprob_compressor or legacy_logit_compression that it was captured with",
        )
    if config.vocab_size is None:
        raise UserError("teacher.vocab_size", f"is missing: the size of the vocabulary that {key} was captured over")
    first: Mapping[str, Any] = rows[0]
    if not first["token_ids"]:
        raise UserError(key, "its first row is empty; remove it")
    return build_codec("plain", {"k": len(first["token_ids"][0]), "vocab_size": config.vocab_size})
