"""`distillkit inspect`: what a captured dataset is, whether it is whole, what the teacher said, how much of it is kept.

Only the manifest and the first rows are read, unless every byte is to be verified.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as parquet
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from distillkit.capture.fidelity import Fidelity, FidelityMeter
from distillkit.capture.transformers_engine import TransformersEngine
from distillkit.compression import Codec, build_codec
from distillkit.config import UserError
from distillkit.console import print_line
from distillkit.data import tokenizer_hash
from distillkit.distribution import SparseDistribution
from distillkit.models.decoder import check_head
from distillkit.models.loading import WHERE, load_model, load_tokenizer, where
from distillkit.shards import Manifest, read_background, read_manifest, signal_tensor, verify_shards
from distillkit.teacher.captured_tokenizer import read_tokenizer

ALTERNATIVES = 5
TOKENS_COMPARED = 4096
"""With a live teacher."""

Lines = list[tuple[str, str]]


@dataclass(frozen=True)
class StoredRow:
    """One row of the dataset, decoded."""

    input_ids: list[int]
    seq_lengths: list[int]
    distribution: SparseDistribution


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
    """Print what a captured dataset is; False where `verify` finds that it is not whole.

    Args:
        verify: read every shard and hold it to the manifest.
        tokens: how many tokens are shown with what the teacher expected there.
        teacher: a live teacher (a folder, a hub id or a .gguf file) that the stored distributions are compared with.
        teacher_kwargs: keyword arguments of `from_pretrained` for it, such as `gguf_file`. Without them the captured
            teacher is loaded as it was then, any other in the dtype of its checkpoint.

    Raises:
        UserError: the folder holds no captured dataset, or the teacher is not the one that was captured.
    """
    console = console or Console()
    manifest = _manifest(folder)
    if manifest is None and (verify or teacher is not None):
        raise UserError(
            "DATASET", f"{folder} has no manifest.json that it could be held to; inspect it without options"
        )
    if manifest is None:
        _print_pairs(console, describe_published(folder))
        return True
    codec = build_codec(manifest.codec_kind, manifest.codec_config)
    _print_pairs(console, describe(manifest, codec))
    problems = verify_shards(folder, manifest) if verify else []
    for line in problems:
        print_line(console, line)
    if verify and not problems:
        print_line(console, "\nevery shard is what was captured")
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
    """What the manifest says, for people."""
    options = ", ".join(f"{name} {_short(value)}" for name, value in manifest.codec_config.items())
    on_disk = manifest.bytes / max(manifest.tokens, 1)
    packed = "no: a row is a document, or a piece of one" if manifest.packed_to is None else None
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
    """What the parquet files of a folder without a manifest say of themselves."""
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
        ("codec", "not known, as there is no manifest; the YAML of a distillation has to name it"),
        ("columns", ", ".join(columns)),
        ("rows", f"{counted:,}"),
        ("tokens", "none: there is no column input_ids" if tokens is None else f"{tokens:,}"),
        ("files", f"{len(files):,}"),
        ("size", f"{sum(path.stat().st_size for path in files) / 2**20:,.1f} MiB"),
    ]


def stored_rows(folder: Path, manifest: Manifest, codec: Codec) -> Iterator[StoredRow]:
    """All rows, one at a time, decoded on the CPU."""
    names = ["input_ids", "seq_lengths", *codec.columns]
    for record in manifest.shards:
        try:
            with pq.ParquetFile(folder / record.file) as file:
                for batch in file.iter_batches(batch_size=1, columns=names):
                    yield _decoded(pa.table(batch), codec)
        except (OSError, pa.ArrowException) as error:
            raise UserError(record.file, f"cannot be read; inspect --verify tells what is wrong ({error})") from error


def compare(folder: Path, manifest: Manifest, codec: Codec, engine: TransformersEngine) -> Fidelity:
    """How much of what a live teacher says is in what was stored, from the last shard backwards.

    The background is fitted on the first one, where it would look better than it is.

    Raises `UserError` where the teacher has another vocabulary.
    """
    if engine.vocabulary_size != manifest.vocabulary_size:
        raise UserError(
            "--teacher",
            f"its head has {engine.vocabulary_size} columns, that of the captured one "
            f"{manifest.vocabulary_size}; it is another model",
        )
    meter = FidelityMeter(read_background(folder, manifest))
    compared = 0
    for row in stored_rows(folder, replace(manifest, shards=manifest.shards[::-1]), codec):
        start = 0
        for dense in engine.whole(
            [{"input_ids": row.input_ids, "labels": row.input_ids, "seq_lengths": row.seq_lengths}]
        ):
            chunk = slice(start, start + len(dense.logits))
            stored = SparseDistribution(row.distribution.ids[chunk], row.distribution.logprobs[chunk])
            meter.add(dense, SparseDistribution(stored.ids.to(engine.device), stored.logprobs.to(engine.device)))
            start = chunk.stop
        compared += start
        if compared >= TOKENS_COMPARED:
            break
    return meter.result()


def _manifest(folder: Path) -> Manifest | None:
    """None for a dataset that was published by others."""
    if not folder.is_dir():
        raise UserError("DATASET", f"no such folder: {str(folder)!r}")
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    shards = len(list(folder.glob("shard-*.json")))
    if (folder / "plan.json").is_file():
        raise UserError(
            "DATASET",
            f"{folder} is a capture that has not ended ({shards} shards are there); start it again with the "
            "same configuration",
        )
    if next(folder.rglob("*.parquet"), None) is None:
        raise UserError("DATASET", f"{folder} is no captured dataset: it has no manifest.json and no parquet files")
    return None


def _as_captured(manifest: Manifest, teacher: str | None) -> dict[str, Any]:
    """What to load the teacher with, where it is the captured one."""
    captured = str(manifest.teacher.get("path", ""))
    if teacher is None or os.path.abspath(teacher) != os.path.abspath(captured):
        return {}
    kept = ("dtype", "torch_dtype", *WHERE)
    return {name: value for name, value in manifest.teacher.get("kwargs", {}).items() if name in kept}


def _decoded(table: pa.Table, codec: Codec) -> StoredRow:
    columns = {name: signal_tensor(table[name], name) for name in codec.columns}
    return StoredRow(table["input_ids"][0].as_py(), table["seq_lengths"][0].as_py(), codec.decode(columns))


def _tokenizer(
    folder: Path, manifest: Manifest, teacher: str | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The live teacher's, or the one that was captured."""
    if teacher is None:
        return read_tokenizer(folder, manifest)
    found = load_tokenizer(teacher, key="--teacher", **options)
    if manifest.tokenizer_sha256 not in (None, tokenizer_hash(found)):
        raise UserError("--teacher", "its tokenizer is not the one that the dataset was captured with")
    return found


def _print_tokens(console: Console, row: StoredRow, tokens: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Some consecutive tokens of a row's first document, and what the teacher expected after each."""

    def text(token: int) -> str:
        return str(token) if tokenizer is None else repr(tokenizer.decode([token]))

    length = row.seq_lengths[0]
    first = min(max(length - tokens, 0), tokens)  # not the very first, of which little can be expected
    header = ("after", "came", "kept", "the teacher expected")
    lines = []
    for position in range(first, min(first + tokens, length)):
        ids, probabilities = row.distribution.ids[position], row.distribution.logprobs[position].exp()
        pairs = zip(ids.tolist(), probabilities.tolist(), strict=True)
        expected = "  ".join(f"{text(token)} {p:.1%}" for token, p in list(pairs)[:ALTERNATIVES] if p > 0)
        came = text(row.input_ids[position + 1]) if position + 1 < length else ""
        lines.append((text(row.input_ids[position]), came, f"{probabilities.sum():.2%}", expected))
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
        ("teacher's mass kept", f"{fidelity.top_k_mass:.4%}"),
        ("KL(teacher‖stored), rest uniform", f"{fidelity.kl_uniform:.6f} nats per token"),
        ("KL(teacher‖stored), rest as background", background),
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
