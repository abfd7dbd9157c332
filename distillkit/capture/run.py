"""`distillkit capture CONFIG.yaml`: a teacher's outputs on a text, stored once.

Rows are prepared and planned (`plan.json`), then each shard is made by itself: teacher → top k → bytes → file. Which
process makes a shard, and when, does not change it. Whoever finds all shards there writes the manifest. So a capture
may be killed at any moment, shared among machines, and started again until it is done; it ends in the same files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import datasets
import pyarrow as pa
import torch
import transformers
from rich.console import Console
from torch import Tensor

from distillkit.capture.engines import Engine, Row
from distillkit.capture.preparation import Capture, check_vocabulary, prepare, remove_prepared
from distillkit.capture.progress import CaptureProgress
from distillkit.capture.sharing import Share, find_share
from distillkit.capture.summary import CaptureSummary, measure_fidelity, print_summary
from distillkit.capture.transformers_engine import TransformersEngine
from distillkit.compression import Codec
from distillkit.config.capture import CaptureConfig
from distillkit.config.errors import UserError
from distillkit.console import INTERRUPTED, print_line
from distillkit.models.decoder import check_head
from distillkit.models.loading import load_model
from distillkit.models.varlen_attention import use_varlen_attention
from distillkit.runs.writing import remove_leftovers
from distillkit.shards import fitted_background, signal_table, write_background, write_manifest, write_shard
from distillkit.shards.background import BACKGROUND
from distillkit.teacher.captured_tokenizer import write_tokenizer

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def capture(config: CaptureConfig, share: str | None = None, console: Console | None = None) -> CaptureSummary:
    """Capture what is missing of a dataset, all of it or one share, into `output_path`.

    share: `i/n`, the i-th of n processes that share the shards; by default torchrun's, or all shards.

    Raises:
        UserError: something in the configuration cannot be, or there is no room; the line says what helps.
        SystemExit: with code 130, after Ctrl-C.
    """
    ours = find_share(share)
    if config.engine == "vllm" and share is None and ours.count > 1:
        raise UserError(
            "engine",
            "vllm runs on GPUs of its own choice, so torchrun's processes would meet on them; start one with "
            "teacher.kwargs.tensor_parallel_size, or several with CUDA_VISIBLE_DEVICES and --shard i/n",
        )
    console = console or Console()
    console.quiet = share is None and ours.index > 0  # of torchrun's processes the first one tells how far they are
    transformers.utils.logging.disable_progress_bar()
    if not console.is_terminal:
        datasets.disable_progress_bars()
    with _told_of_no_room(config):
        planned = prepare(config)
    with _told_how_to_go_on(planned, console):
        remove_leftovers(planned.folder)
        done = planned.records()
        missing = [shard for shard in range(len(planned.plan.shards)) if ours.has(shard) and shard not in done]
        _say_what_is_left(planned, ours, len(done), len(missing), console)
        engine = load_engine(planned) if missing else None
        tokens, seconds = (0, 0.0) if engine is None else _make_shards(planned, engine, missing, console)
        summary = _finish(planned, engine, tokens, seconds)
    console.quiet = console.quiet and not summary.complete
    print_summary(console, summary)
    return summary


def load_engine(planned: Capture) -> Engine:
    """What runs the teacher. Raises `UserError` where the teacher is not as its configuration says."""
    config = planned.config
    if config.engine == "vllm":
        from distillkit.capture.vllm_engine import VLLMEngine

        engine: Engine = VLLMEngine(
            config.teacher, planned.codec.k, config.sequence_length, trust_remote_code=config.trust_remote_code
        )
    else:
        options = {"trust_remote_code": config.trust_remote_code, **config.teacher.kwargs}
        model = load_model(config.teacher.path, key="teacher.path", **options)
        if "device_map" not in config.teacher.kwargs and torch.cuda.is_available():
            model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
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
    """The rows, and what the teacher says about them as the codec stores it.

    labels: whether to keep their labels, too.
    outside: the teacher's probability outside the top k is added to it, per token of the vocabulary.
    advance: told how many more tokens are done.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    encoded: dict[int, dict[str, Tensor]] = {}
    for answer in engine.top_k(rows, codec.k, outside):
        columns = {name: values.cpu() for name, values in codec.encode(answer.distribution).items()}
        of_the_answer = [lengths[index] for index in answer.rows]
        split = {name: values.split(of_the_answer) for name, values in columns.items()}
        for place, index in enumerate(answer.rows):
            encoded[index] = {name: values[place] for name, values in split.items()}
        advance(sum(of_the_answer))
    signal = {name: torch.cat([encoded[index][name] for index in range(len(rows))]) for name in codec.columns}
    kept = ("input_ids", "labels", "seq_lengths") if labels else ("input_ids", "seq_lengths")
    plain = {name: pa.array([row[name] for row in rows], pa.list_(pa.int32())) for name in kept}
    table = signal_table(signal, lengths)
    return pa.table({**plain, **dict(zip(table.column_names, table.columns, strict=True))})


def _make_shards(planned: Capture, engine: Engine, missing: Sequence[int], console: Console) -> tuple[int, float]:
    """The missing shards that others have not made meanwhile; tokens and seconds that they took.

    While the teacher reads for a shard, the one before is compressed and written; what that raises is raised here.
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
    """What the teacher says on a shard's rows; the answer writes it, and before the first shard the background."""
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
    """Write the tokenizer and the manifest if all shards are there, and take stock."""
    records, fidelity = planned.records(), None
    if len(records) == len(planned.plan.shards):
        background = planned.folder / BACKGROUND if planned.plan.background else None
        shards = list(records.values())
        write_tokenizer(planned.folder, planned.tokenizer)
        write_manifest(planned.folder, planned.plan.manifest(shards, background))
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


def _say_what_is_left(planned: Capture, ours: Share, done: int, missing: int, console: Console) -> None:
    line = f"{len(planned.rows):,} rows, {sum(planned.plan.tokens):,} tokens, {len(planned.plan.shards)} shards"
    if done:
        line += f"; {done} are there already"
    if ours.count > 1:
        line += f"; this is share {ours.index + 1} of {ours.count}"
    print_line(console, f"{line}; {missing} to make" if missing else f"{line}; nothing to make")


@contextmanager
def _told_of_no_room(config: CaptureConfig) -> Iterator[None]:
    """A disk that is full before the first shard."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            "output_path",
            f"no room left beside {config.output_path!r} for the prepared rows; make room, or name "
            "another dataset.prepared_dataset_path",
        ) from error


@contextmanager
def _told_how_to_go_on(planned: Capture, console: Console) -> Iterator[None]:
    """A full disk and Ctrl-C end a capture with a line that says how far it is, and what to do."""

    def so_far() -> str:
        return f"{len(planned.records())} of {len(planned.plan.shards)} shards are there"

    try:
        yield
    except KeyboardInterrupt:
        print_line(console, f"interrupted: {so_far()}; the same command goes on with the others")
        raise SystemExit(INTERRUPTED) from None
    except torch.OutOfMemoryError as error:
        tokens = planned.config.tokens_per_batch
        raise UserError(
            "tokens_per_batch",
            f"the device has no memory for the teacher and {tokens} tokens at a time: {so_far()}; "
            "give less, and the same command goes on with the others",
        ) from error
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        room = "make room, and the same command goes on with the others"
        raise UserError("output_path", f"no room left in {str(planned.folder)!r}: {so_far()}; {room}") from error
