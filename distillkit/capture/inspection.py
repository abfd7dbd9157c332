"""`distillkit inspect`: what a captured dataset holds, whether it is complete, and how much of the teacher is lost.

Only the manifest and the first rows are read, unless every byte is to be verified.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as parquet
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from distillkit.capture.fidelity import Fidelity, StoredRow, measure, stored_rows
from distillkit.capture.transformers_engine import TransformersEngine
from distillkit.compression import Codec, build_codec
from distillkit.config import UserError
from distillkit.console import print_line
from distillkit.data import tokenizer_hash
from distillkit.models.decoder import check_head
from distillkit.models.loading import WHERE, load_model, load_tokenizer, where
from distillkit.shards import Manifest, read_background, read_manifest, verify_shards
from distillkit.shards.names import MANIFEST, PLAN, SHARD
from distillkit.teacher.captured_tokenizer import read_tokenizer

ALTERNATIVES = 5
TOKENS_COMPARED = 4096
"""Number of tokens on which a live teacher is compared with the dataset."""

Lines = list[tuple[str, str]]


def inspect_dataset(
    folder: Path,
    *,
    verify: bool = False,
    tokens: int = 12,
    teacher: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
    **teacher_kwargs: Any,
) -> bool:
    """Print what a captured dataset holds; returns False where `verify` finds damage.

    Args:
        verify: check every byte of every shard against the manifest.
        tokens: number of tokens that are shown with the teacher's predictions.
        teacher: a live teacher (a folder, a hub id or a .gguf file), with which the stored distributions are compared.
        teacher_kwargs: keyword arguments of `from_pretrained` for it, such as `gguf_file`. By default the captured
            teacher is loaded as for the capture, any other in the dtype of its checkpoint.

    Raises:
        UserError: the folder holds no captured dataset, or the teacher is not the captured one.
    """
    console = console or Console()
    manifest = _manifest(folder)
    if manifest is None and (verify or teacher is not None):
        raise UserError("DATASET", f"{folder} has no {MANIFEST} to compare it with; inspect it without options")
    if manifest is None:
        _print_pairs(console, describe_published(folder))
        return True
    codec = build_codec(manifest.codec_kind, manifest.codec_config)
    _print_pairs(console, describe(manifest, codec))
    problems = verify_shards(folder, manifest) if verify else []
    for line in problems:
        print_line(console, line)
    if verify and not problems:
        print_line(console, "\nevery shard is as it was captured")
    if problems:
        return False
    teacher_kwargs = _as_captured(manifest, teacher) | {
        name: value for name, value in teacher_kwargs.items() if value is not None
    }
    options = {"trust_remote_code": trust_remote_code, **where(teacher_kwargs)}
    tokenizer = _tokenizer(folder, manifest, teacher, options)
    if tokens and manifest.tokens:
        _print_tokens(console, next(stored_rows(folder, manifest, codec)), tokens, tokenizer)
    if teacher is not None:
        model = load_model(teacher, key="--teacher", trust_remote_code=trust_remote_code, **teacher_kwargs)
        check_head(model, "--teacher")
        engine = TransformersEngine(model.to(torch.accelerator.current_accelerator() or "cpu"), TOKENS_COMPARED)
        _print_pairs(console, _fidelity_lines(compare(folder, manifest, codec, engine)))
    return True


def describe(manifest: Manifest, codec: Codec) -> Lines:
    """Label and value of each line that is printed about a manifest."""
    options = ", ".join(f"{name} {_short(value)}" for name, value in manifest.codec_config.items())
    on_disk = manifest.bytes / max(manifest.tokens, 1)
    packed = "no: a row is one document, or a piece of one" if manifest.packed_to is None else None
    return [
        ("teacher", str(manifest.teacher.get("path", "unknown"))),
        ("codec", f"{manifest.codec_kind} ({options})"),
        ("tokens kept", f"{codec.k} of a vocabulary of {manifest.vocabulary_size:,}"),
        ("background", "none" if manifest.background is None else manifest.background),
        ("packed", packed or f"to {manifest.packed_to:,} tokens per row"),
        ("rows", f"{manifest.rows:,}"),
        ("tokens", f"{manifest.tokens:,}"),
        ("shards", f"{len(manifest.shards):,}"),
        ("size", f"{manifest.bytes / 2**20:,.1f} MiB"),
        ("bytes per token", f"{codec.bytes_per_token} of signal; on disk {on_disk:.1f}, with the tokens"),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]


def describe_published(folder: Path) -> Lines:
    """Label and value of each line that is printed about a dataset without a manifest."""
    files = sorted(folder.rglob("*.parquet"))
    try:
        rows = parquet.dataset(files)
        columns = [f"{field.name} {field.type}" for field in rows.schema]
        tokens = None
        if "input_ids" in rows.schema.names:
            batches = rows.to_batches(columns=["input_ids"])
            tokens = sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() or 0 for batch in batches)
        counted = rows.count_rows()
    except (OSError, pa.ArrowException) as error:
        raise UserError("DATASET", f"{folder} cannot be read: {error}") from error
    return [
        ("codec", "unknown, because there is no manifest; the YAML of a distillation has to name it"),
        ("columns", ", ".join(columns)),
        ("rows", f"{counted:,}"),
        ("tokens", "none: there is no column input_ids" if tokens is None else f"{tokens:,}"),
        ("files", f"{len(files):,}"),
        ("size", f"{sum(path.stat().st_size for path in files) / 2**20:,.1f} MiB"),
    ]


def compare(folder: Path, manifest: Manifest, codec: Codec, engine: TransformersEngine) -> Fidelity:
    """How much of a live teacher's distributions is stored, from the last shard backwards.

    The background was fitted on the first shard, where it would look better than elsewhere.

    Raises `UserError` where the teacher has another vocabulary.
    """
    if engine.vocabulary_size != manifest.vocabulary_size:
        raise UserError(
            "--teacher",
            f"its head has {engine.vocabulary_size} columns, but that of the captured teacher "
            f"{manifest.vocabulary_size}; name the captured teacher",
        )
    rows = stored_rows(folder, replace(manifest, shards=manifest.shards[::-1]), codec)
    return measure(engine, rows, read_background(folder, manifest), TOKENS_COMPARED)


def _manifest(folder: Path) -> Manifest | None:
    """None for a dataset that was published by others."""
    if not folder.is_dir():
        raise UserError("DATASET", f"no such folder: {str(folder)!r}")
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    shards = len(list(folder.glob(f"{SHARD}*.json")))
    if (folder / PLAN).is_file():
        raise UserError(
            "DATASET",
            f"{folder} holds a capture that is not complete ({shards} shards so far); start it again with the "
            "same configuration",
        )
    if next(folder.rglob("*.parquet"), None) is None:
        raise UserError("DATASET", f"{folder} is not a captured dataset: it has no {MANIFEST} and no parquet files")
    return None


def _as_captured(manifest: Manifest, teacher: str | None) -> dict[str, Any]:
    """The keyword arguments that the captured teacher was loaded with; none for another teacher."""
    captured = str(manifest.teacher.get("path", ""))
    if teacher is None or os.path.abspath(teacher) != os.path.abspath(captured):
        return {}
    kept = ("dtype", "torch_dtype", *WHERE)
    return {name: value for name, value in manifest.teacher.get("kwargs", {}).items() if name in kept}


def _tokenizer(
    folder: Path, manifest: Manifest, teacher: str | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The live teacher's tokenizer, or the captured one."""
    if teacher is None:
        return read_tokenizer(folder, manifest)
    found = load_tokenizer(teacher, key="--teacher", **options)
    if manifest.tokenizer_sha256 not in (None, tokenizer_hash(found)):
        raise UserError(
            "--teacher", "its tokenizer is not the one that the dataset was captured with; name the captured teacher"
        )
    return found


def _print_tokens(console: Console, row: StoredRow, tokens: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Some consecutive tokens of a row's first document, and the teacher's predictions after each."""

    def text(token: int) -> str:
        return str(token) if tokenizer is None else repr(tokenizer.decode([token]))

    length = row.seq_lengths[0]
    first = min(max(length - tokens, 0), tokens)  # not the very first, which have too little context
    header = ("token", "next token", "stored", "teacher's likeliest next tokens")
    lines = []
    for position in range(first, min(first + tokens, length)):
        ids, probabilities = row.distribution.ids[position], row.distribution.logprobs[position].exp()
        pairs = zip(ids.tolist(), probabilities.tolist(), strict=True)
        likeliest = "  ".join(f"{text(token)} {p:.1%}" for token, p in list(pairs)[:ALTERNATIVES] if p > 0)
        following = text(row.input_ids[position + 1]) if position + 1 < length else ""
        lines.append((text(row.input_ids[position]), following, f"{probabilities.sum():.2%}", likeliest))
    print_line(console, "")
    if console.is_terminal:
        table = Table(*header)
        for line in lines:
            table.add_row(*map(Text, line))
        console.print(table)
    else:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        for line in (header, *lines):
            print_line(console, "  ".join(map(str.ljust, line, widths)).rstrip())


def _fidelity_lines(fidelity: Fidelity) -> Lines:
    background = "no background is stored" if fidelity.kl_background is None else f"{fidelity.kl_background:.6f}"
    return [
        ("tokens compared", f"{fidelity.tokens:,}"),
        ("teacher's probability stored", f"{fidelity.top_k_mass:.4%}"),
        ("KL(teacher‖stored), rest uniform", f"{fidelity.kl_uniform:.6f} nats per token"),
        ("KL(teacher‖stored), rest like background", background),
    ]


def _print_pairs(console: Console, pairs: Lines) -> None:
    width = max(len(label) for label, _ in pairs)
    print_line(console, "")
    for label, value in pairs:
        print_line(console, f"{label.ljust(width)}  {value}")


def _short(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, dict):
        return "/".join(map(_short, value.values()))
    return str(value)
