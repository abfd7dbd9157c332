"""`distillkit capture CONFIG.yaml`: a teacher's outputs on a text, stored once.

Rows are prepared and divided into shards (`plan.json`). Each shard is made by itself: teacher → top k → bytes → file.
It does not depend on which process makes it, or when. A process that finds all shards complete writes the manifest. So
a capture may be killed at any moment, shared among machines, and started again; it always ends in the same files.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import pyarrow as pa
import torch
import transformers
from rich.console import Console
from torch import Tensor

from distillkit.capture.engines import Engine, Row
from distillkit.capture.preparation import Capture, check_vocabulary, prepare, remove_prepared
from distillkit.capture.progress import CaptureProgress
from distillkit.capture.summary import CaptureSummary, measure_fidelity, print_summary
from distillkit.capture.transformers_engine import TransformersEngine, load_teacher
from distillkit.compression import Codec
from distillkit.config.capture import CaptureConfig, check_capture_ready
from distillkit.config.errors import UserError
from distillkit.config.sharing import Share, find_share
from distillkit.config.yaml_files import as_section
from distillkit.console import INTERRUPTED, print_line
from distillkit.models.decoder import check_head
from distillkit.models.varlen_attention import use_varlen_attention
from distillkit.runs.writing import full_disk_errors, remove_leftovers
from distillkit.shards import fitted_background, signal_table, write_background, write_manifest, write_shard
from distillkit.shards.names import BACKGROUND
from distillkit.teacher.captured_tokenizer import write_tokenizer


def capture(
    config: CaptureConfig | Mapping[str, Any] | str | os.PathLike[str],
    shard: str | None = None,
    console: Console | None = None,
) -> CaptureSummary:
    """Capture the missing shards of a dataset, all of them or one share, into `output_path`.

    config: the path of a YAML file, its content as a mapping, or a configuration.
    shard: `i/n`, the i-th of n processes that share the shards; by default torchrun's, or all shards.

    Raises:
        UserError: the configuration is wrong, or the disk or memory is full; the line names key and remedy.
        SystemExit: with code 130, after Ctrl-C.
    """
    config = as_section(CaptureConfig, config)
    share = find_share(shard)
    if config.engine == "vllm" and shard is None and share.count > 1:
        raise UserError(
            "engine",
            "vllm chooses GPUs by itself, so torchrun's processes would use the same ones; start one process with "
            "teacher.kwargs.tensor_parallel_size, or several with CUDA_VISIBLE_DEVICES and --shard i/n",
        )
    check_capture_ready(config)
    console = console or Console()
    console.quiet = shard is None and share.index > 0  # of torchrun's processes only the first one prints
    transformers.utils.logging.disable_progress_bar()
    if not console.is_terminal:
        datasets.disable_progress_bars()
    beside = f"beside {config.output_path!r}, where the prepared rows are written"
    with full_disk_errors(lambda: f"{beside}; free some space, or name another dataset.prepared_dataset_path"):
        planned = prepare(config)
    with _errors_of_capture(planned, console):
        remove_leftovers(planned.folder)
        done = planned.records()
        missing = [index for index in range(len(planned.plan.shards)) if share.has(index) and index not in done]
        _print_plan(planned, share, len(done), len(missing), console)
        engine = load_engine(planned) if missing else None
        tokens, seconds = (0, 0.0) if engine is None else _make_shards(planned, engine, missing, console)
        summary = _finish(planned, engine, tokens, seconds)
    console.quiet = console.quiet and not summary.complete
    print_summary(console, summary)
    return summary


def load_engine(planned: Capture) -> Engine:
    """The engine with the teacher loaded. Raises `UserError` where the teacher does not fit the configuration."""
    config = planned.config
    if config.engine == "vllm":
        from distillkit.capture.vllm_engine import VLLMEngine

        engine: Engine = VLLMEngine(
            config.teacher, planned.codec.k, config.sequence_length, trust_remote_code=config.trust_remote_code
        )
    else:
        options = {"trust_remote_code": config.trust_remote_code, **config.teacher.kwargs}
        model = load_teacher(config.teacher.path, options)
        if config.teacher.kwargs.get("attn_implementation") != "sdpa":
            use_varlen_attention(model, model.dtype)
        check_head(model, "teacher.path")
        engine = TransformersEngine(model, config.tokens_per_batch)
    check_vocabulary(config, engine.vocabulary_size)
    return engine


def shard_table(
    engine: Engine,
    codec: Codec,
    rows: Sequence[Row],
    *,
    labels: bool,
    outside: Tensor | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> pa.Table:
    """The rows, and the teacher's distributions for them as the codec stores them.

    labels: whether to store labels too.
    outside: the teacher's probability outside the top k is added to it, per token of the vocabulary.
    advance: called with the number of tokens after each batch.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    encoded: dict[int, dict[str, Tensor]] = {}
    for batch in engine.top_k(rows, codec.k, outside):
        columns = {name: values.cpu() for name, values in codec.encode(batch.distribution).items()}
        batch_lengths = [lengths[index] for index in batch.rows]
        split = {name: values.split(batch_lengths) for name, values in columns.items()}
        for place, index in enumerate(batch.rows):
            encoded[index] = {name: values[place] for name, values in split.items()}
        advance(sum(batch_lengths))
    signal = {name: torch.cat([encoded[index][name] for index in range(len(rows))]) for name in codec.columns}
    kept = ("input_ids", "labels", "seq_lengths") if labels else ("input_ids", "seq_lengths")
    plain = {name: pa.array([row[name] for row in rows], pa.list_(pa.int32())) for name in kept}
    table = signal_table(signal, lengths)
    return pa.table({**plain, **dict(zip(table.column_names, table.columns, strict=True))})


def _make_shards(planned: Capture, engine: Engine, missing: Sequence[int], console: Console) -> tuple[int, float]:
    """Make the missing shards, unless other processes have made them meanwhile; returns tokens and seconds.

    While the teacher runs on one shard, the one before is compressed and written; errors of that are raised here.
    """
    total = sum(planned.plan.tokens[shard] for shard in missing)
    with CaptureProgress(console, total) as progress, ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for shard in missing:
            if planned.record(shard) is None:
                write = _make_shard(planned, engine, shard, progress.advance)
                if written is not None:
                    written.result()
                written = writer.submit(write)
        if written is not None:
            written.result()
    return progress.tokens, progress.seconds


def _make_shard(planned: Capture, engine: Engine, shard: int, advance: Callable[[int], None]) -> Callable[[], None]:
    """Run the teacher on a shard's rows; returns the function that writes the shard, the first with the background."""
    outside = None
    if shard == 0 and planned.plan.background:
        outside = torch.zeros(engine.vocabulary_size, dtype=torch.float64, device=engine.device)
    rows, start, stop = planned.shard_rows(shard), *planned.plan.shards[shard]
    read = partial(shard_table, engine, planned.codec, labels=planned.plan.labels, advance=advance)
    fitted = planned.fitted_rows
    if outside is None or fitted == len(rows):
        table = read(rows, outside=outside)
    else:
        table = pa.concat_tables([read(rows[:fitted], outside=outside), read(rows[fitted:])])

    def write() -> None:
        if outside is not None:
            write_background(planned.folder, fitted_background(outside), planned.plan.sha256)
        write_shard(planned.folder, shard, table, (start, stop), planned.plan.sha256)

    return write


def _finish(planned: Capture, engine: Engine | None, tokens: int, seconds: float) -> CaptureSummary:
    """Write the tokenizer and the manifest if all shards are complete, and summarise."""
    records, fidelity = planned.records(), None
    if len(records) == len(planned.plan.shards):
        background = planned.folder / BACKGROUND if planned.plan.background else None
        shards = list(records.values())
        tokenizer_files = write_tokenizer(planned.folder, planned.tokenizer)
        write_manifest(planned.folder, planned.plan.manifest(shards, background, tokenizer_files))
        if isinstance(engine, TransformersEngine):
            fidelity = measure_fidelity(planned, engine)
        remove_prepared(planned.config)
    return CaptureSummary(
        planned.folder,
        shards=len(records),
        shards_planned=len(planned.plan.shards),
        rows=len(planned.rows),
        tokens=sum(record.tokens for record in records.values()),
        bytes=sum(record.bytes for record in records.values()),
        captured_tokens=tokens,
        seconds=seconds,
        fidelity=fidelity,
    )


def _print_plan(planned: Capture, share: Share, done: int, missing: int, console: Console) -> None:
    line = f"{len(planned.rows):,} rows, {sum(planned.plan.tokens):,} tokens, {len(planned.plan.shards)} shards"
    if done:
        line += f"; {done} are complete already"
    if share.count > 1:
        line += f"; this is share {share.index + 1} of {share.count}"
    print_line(console, f"{line}; {missing} to make" if missing else f"{line}; nothing to make")


@contextmanager
def _errors_of_capture(planned: Capture, console: Console) -> Iterator[None]:
    """A full disk or memory is a `UserError`, Ctrl-C a `SystemExit`; the line counts shards and names the remedy."""

    def so_far() -> str:
        return f"{len(planned.records())} of {len(planned.plan.shards)} shards are complete"

    remedy = "free some space, and run the same command again for the others"
    try:
        with full_disk_errors(lambda: f"at {str(planned.folder)!r}: {so_far()}; {remedy}"):
            yield
    except KeyboardInterrupt:
        print_line(console, f"interrupted: {so_far()}; the same command makes the others")
        raise SystemExit(INTERRUPTED) from None
    except torch.OutOfMemoryError as error:
        tokens = planned.config.tokens_per_batch
        raise UserError(
            "tokens_per_batch",
            f"the device has no memory for the teacher and {tokens} tokens at a time: {so_far()}; "
            "give less, and run the same command again for the others",
        ) from error
