"""The summary of a capture: sizes, speed, and how much of the teacher distribution was lost."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from distillkit.capture.fidelity import Fidelity, measure, stored_rows
from distillkit.capture.preparation import Capture
from distillkit.capture.transformers_engine import TransformersEngine
from distillkit.console import print_line
from distillkit.shards import read_background, read_manifest

SAMPLE_TOKENS = 2048


@dataclass(frozen=True)
class CaptureSummary:
    """The content of the folder now, and what this process added."""

    folder: Path
    shards: int
    shards_planned: int
    rows: int
    tokens: int
    bytes: int
    captured_tokens: int
    """By this process, in `seconds`."""
    seconds: float
    fidelity: Fidelity | None
    """Of the complete dataset; None for an incomplete one, or where transformers did not run the teacher here."""

    @property
    def complete(self) -> bool:
        return self.shards == self.shards_planned


def measure_fidelity(planned: Capture, engine: TransformersEngine) -> Fidelity:
    """On rows of the last shard, read back from disk; the background was fitted on other rows, where there are any."""
    manifest = read_manifest(planned.folder)
    assert manifest is not None
    skipped = planned.fitted_rows if len(manifest.shards) == 1 and len(planned.rows) > 1 else 0
    rows = stored_rows(planned.folder, replace(manifest, shards=manifest.shards[-1:]), planned.codec)
    return measure(engine, islice(rows, skipped, None), read_background(planned.folder, manifest), SAMPLE_TOKENS)


def print_summary(console: Console, summary: CaptureSummary) -> None:
    if summary.captured_tokens:
        rate = summary.captured_tokens / max(summary.seconds, 1e-9)
        print_line(
            console, f"captured {summary.captured_tokens:,} tokens in {summary.seconds:,.0f} s ({rate:,.0f} tokens/s)"
        )
    if not summary.complete:
        print_line(
            console,
            f"{summary.folder}: {summary.shards} of {summary.shards_planned} shards are complete; the process that "
            "makes the last one, or one that is started later, writes the manifest",
        )
        return
    print_line(
        console,
        f"{summary.folder}: {summary.tokens:,} tokens in {summary.rows:,} rows and {summary.shards} shards, "
        f"{summary.bytes / 1e6:,.1f} MB, {summary.bytes / max(summary.tokens, 1):,.1f} bytes per token on disk",
    )
    if summary.fidelity is not None:
        print_line(console, _fidelity_line(summary.fidelity, same_rows=summary.rows == 1))


def _fidelity_line(fidelity: Fidelity, *, same_rows: bool) -> str:
    line = (
        f"the stored tokens hold {100 * fidelity.top_k_mass:.2f} % of the teacher's probability; KL(teacher ‖ stored) "
        f"is {fidelity.kl_uniform:.5f} with the rest spread uniformly"
    )
    if fidelity.kl_background is not None:
        line += f", {fidelity.kl_background:.5f} with the rest like the background"
        line += ", which was fitted on the same rows" if same_rows else ""
    return f"{line} ({fidelity.tokens:,} tokens)"
