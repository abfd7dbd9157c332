"""docs/results.md from the files in benchmarks/results, so that no number is typed.

    python benchmarks/tables.py

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is rewritten each time from NAME.json, and is empty as
long as there is no such file. What stands outside stays. Pictures go to docs/pictures, each for light pages and for
dark ones.
"""

import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from cells import Json, Part, grid, number, source
from distillkit.reporting import numbers
from distillkit.reporting.colours import paint, series
from distillkit.reporting.document import Picture
from distillkit.reporting.plots import Axis, Series, line_chart
from frame import RESULTS, ROOT
from outcomes import by_length
from replicated import TITLES, replication

PAGE = ROOT / "docs" / "results.md"
PICTURES = "pictures"

LABELS = {"row": "step", "variant": "start", "error": "", "file": "measured in", "training_seconds": "seconds"}
"""Headers of columns that are not named as in the files."""
UNITS = {"_per_second": "/s", "_gib": " GiB", "_mib": " MiB", "kl_": "KL ", "_": " "}
"""Parts of names as headers have them."""


def label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    for part, shown in UNITS.items():
        name = name.replace(part, shown)
    return name


def flat(*columns: str, key: str = "rows") -> Callable[[Json], list[Part]]:
    """Some columns of the rows under a key, or all."""

    def table(content: Json) -> list[Part]:
        names = columns or [*content[key][0]]
        rows = [[number(row.get(name)) for name in names] for row in content[key]]
        return [grid([*map(label, names)], rows)]

    return table


def throughput(content: Json) -> list[Part]:
    """Steps, and where the time of each goes, in shares of the step."""
    rate = content.get("matmul_tflops")
    shapes = f"Shapes: {content['shape']}, {content['layers'] or 'all'} layers"
    shapes += f"; one large bf16 product runs at {rate:,.0f} TFLOP/s." if rate else "."
    first = next((row.get("tokens_per_second") for row in content["rows"] if row["row"] == "reference"), None)
    steps, times, kinds = [], [], []
    for row in content["rows"]:
        if "error" in row:
            steps.append([row["row"], row["error"], *[numbers.NOTHING] * 5])
            continue
        speed, share = row["tokens_per_second"], row.get("share_of_matmul_rate")
        rows = f"{row['batch']} {numbers.TIMES} {row['sequence_length']:,}"
        times_first = f"{numbers.TIMES}{speed / first:.2f}" if first else numbers.NOTHING
        sizes = (number(row.get(name)) for name in ("peak_gib", "gflop_per_token"))
        steps.append(
            [row["row"], rows, numbers.rate(speed), times_first, *sizes, numbers.shown(share, numbers.percent)]
        )
        if "kernel_seconds" in row:
            kinds = [*row["kernel_seconds"], "idle"]
            seconds = [*row["kernel_seconds"].values(), row["without_kernels_seconds"]]
            shares = (numbers.percent(max(each / sum(seconds), 0)) for each in seconds)
            times.append([row["row"], numbers.seconds(sum(seconds)), *shares])
    header = ["step", "rows", "tokens/s", "of the reference's", "peak GiB", "GFLOP/token", "of the matmul rate"]
    parts: list[Part] = [shapes, grid(header, steps)]
    if times:
        parts += ["Where a step's time goes, by the names of its kernels:", grid(["step", "time", *kinds], times)]
    return parts


def start_up(content: Json) -> list[Part]:
    header = ["shape", "Triton's cache", "first step", "second step", "first answer"]
    names = [f"{name.replace(' ', '_')}_seconds" for name in header[2:]]
    lines = []
    for row in content["rows"]:
        lines.append([row["shape"], row["triton_cache"], *(numbers.seconds(row[name]) for name in names)])
    return [grid(header, lines)]


def decoding(content: Json, name: str) -> list[Part]:
    """Tokens per second and bytes of cache, by context and model; and a picture of the first."""
    models = {
        TITLES.get(model, model): {row["context"]: row for row in found["rows"]}
        for model, found in content["models"].items()
    }
    contexts = sorted({context for rows in models.values() for context in rows})
    header = ["context", *(f"{model}, tokens/s" for model in models), *(f"{model}, cache" for model in models)]
    lines = []
    for context in contexts:
        rows = [found.get(context) for found in models.values()]
        speeds = [numbers.rate(row["decode_tokens_per_second"]) if row else numbers.NOTHING for row in rows]
        kept = [numbers.bytes_(row["kv_cache_bytes"] + row["state_bytes"]) if row else numbers.NOTHING for row in rows]
        lines.append([numbers.length(context), *speeds, *kept])
    drawn = []
    for position, (model, found) in enumerate(models.items()):
        speeds = [row["decode_tokens_per_second"] for row in found.values()]
        colour = "teacher" if model == "teacher" else series(position - 1)
        drawn.append(Series(model, [float(context) for context in found], speeds, colour))
    x_axis = Axis("tokens in the context", numbers.length, log2=True, ticks=[float(context) for context in contexts])
    y_axis = Axis("tokens per second", numbers.rate, from_zero=True)
    picture = line_chart(name, "Decoding, by tokens in the context", drawn, x_axis, y_axis)
    dtype = content["settings"]["dtype"]
    shown = f"{content['what'].capitalize()}; {dtype}. Cache is keys and values and the students' state."
    return [shown, grid(header, lines), picture]


def before_and_after(content: Json) -> list[Part]:
    """A single run of the product."""
    rows = (
        ("kl", "KL(teacher‖student), nats per token", numbers.decimals),
        ("agreement", "same likeliest token", numbers.percent),
        ("student_perplexity", "perplexity", numbers.decimals),
        ("teacher_perplexity", "the teacher's", numbers.decimals),
    )
    ends = content["divergence"]
    lines = [[label, *(form(ends[end][name]) for end in ("before", "after"))] for name, label, form in rows]
    tokens, seconds = content["training"]["tokens"], content["training"]["seconds"]
    trained = (
        f"{numbers.amount(tokens)} tokens in {numbers.seconds(seconds)}, {numbers.rate(tokens / seconds)} tokens/s."
    )
    return [grid(["", "after conversion", "after distillation"], lines), trained]


def alignment(content: Json) -> list[Part]:
    lines = [
        [name, numbers.amount(row["tokens"]), numbers.seconds(row["seconds"]), numbers.decimals(row["kl"])]
        for name, row in content["quality"]["results"].items()
        if isinstance(row, dict) and "kl" in row
    ]
    return [grid(["", "tokens", "time", "KL at the end"], lines)]


def needles(content: Json) -> list[Part]:
    found = by_length({task: measured["rows"] for task, measured in content["tasks"].items()})
    lines = [
        [task, numbers.length(int(length)), f"{sums['correct']:g} of {sums['total']:g}"]
        for task, lengths in found.items()
        for length, sums in lengths.items()
    ]
    return [grid(["task", "tokens", "found"], lines)]


def survival(content: Json) -> list[Part]:
    recipes = " and ".join(row["recipe"] for row in content["recipes"])
    weights = "those" if content["equal"] else "not those"
    kills = f"{content['kills']} kills at random moments of {recipes}"
    return [f"{kills}; the weights at the end are {weights} of undisturbed runs, bit for bit."]


def compression(content: Json) -> list[Part]:
    lines = []
    for row in content["rows"]:
        if rates := row.get("tokens_per_second"):
            speeds = (numbers.amount(rates[name]) for name in ("encode", "decode"))
            lines.append([row["name"], number(row["bytes_per_token"]), *speeds])
    return [grid(["codec", "bytes per token", "encoded tokens/s", "decoded tokens/s"], lines)]


STARTS = flat("variant", "kl_before", "kl_after", key="results")
SECTIONS: dict[str, Callable[[Json], list[Part]]] = {
    "parity": flat(),
    "replication": replication,
    "throughput": throughput,
    "throughput_policies": throughput,
    "throughput_all": throughput,
    "throughput_smollm2": throughput,
    "start_up": start_up,
    "decoding_afm": partial(decoding, name="decoding-afm"),
    "decoding": partial(decoding, name="decoding"),
    "smollm2_hybrid": before_and_after,
    "quickstart": before_and_after,
    "alignment": alignment,
    "initialization": flat(
        "short_convolution", "output_scale", "kl_before", "kl_after", "training_seconds", key="results"
    ),
    "initialization_memory": STARTS,
    "initialization_short": STARTS,
    "memory": flat("row", "estimated_gib", "measured_gib", "ratio", "tokens_per_second"),
    "plan_times": flat("step", "compiled", "planned_tokens_per_second", "measured_tokens_per_second", "ratio", "file"),
    "losses": flat("method", "tokens", "peak_mib", "seconds"),
    "attention": flat("attention", "tokens", "documents", "tokens_per_second", "peak_mib", "error"),
    "delta_rule": flat("form", "tokens", "peak_mib", "seconds"),
    "needles": needles,
    "survival": survival,
    "compression": compression,
}
"""What is shown of each result file."""

COMMANDS = {"alignment": "python benchmarks/alignment.py all"}
"""The command that wrote a file which does not contain it, if that is not the name of the benchmark alone."""

HEADINGS = {
    "parity": """## Parity on CUDA

All tests that need a GPU: the KDA layer with fla's kernels beside the PyTorch form and the recurrence in float64, in
bf16 and float32, packed, cached, heads of 64 and 128 (tests/student), and what else of the package runs on CUDA.""",
    "replication": """## The miniature replication

The KDA write-up ("Distilling Kimi Delta Attention into AFM-4.5B", December 2025) turned 4.5B parameters into three
students. Here SmolLM2-135M-Instruct becomes the same three, each with the same budget of tokens, and some more: RADLADS
from alignment on, grouped heads, RoPE kept in the layers of full attention. Needles are RULER's.""",
    "throughput": """## Throughput and memory

Steps of the one-phase recipe on random weights, teacher included. `reference` is a training loop as one writes it
first: all logits at once, eager, every layer checkpointed.""",
    "decoding_afm": """## Decoding at AFM-4.5B's shapes""",
    "decoding": """## Decoding of SmolLM2-135M""",
}
"""What stands above a section if its file is there."""


def section(name: str, results: Path) -> list[Part]:
    """What is shown of a result file; nothing if there is none."""
    file = results / f"{name}.json"
    if not file.exists():
        return []
    content: Any = json.loads(file.read_text())
    heading = [HEADINGS[name]] if name in HEADINGS else []
    note = [f"Note: {content['note']}."] if "note" in content else []
    command = COMMANDS.get(name, f"python benchmarks/{name}.py")
    return [*heading, *SECTIONS[name](content), *note, source(file.name, content, command)]


def markdown(part: Part) -> str:
    if not isinstance(part, Picture):
        return part
    path, alt = f"{PICTURES}/{part.name}", escape(part.alt)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
    return f'<picture>{dark}<img src="{path}.svg" alt="{alt}" width="{part.width}"></picture>'


SECTION = re.compile(r"<!-- (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)


def written(page: str, results: Path = RESULTS) -> tuple[str, list[Picture]]:
    """The page with all its sections rewritten, and their pictures. Raises `KeyError` for an unknown section."""
    pictures: list[Picture] = []

    def rewritten(match: re.Match[str]) -> str:
        parts = section(match[1], results)
        pictures.extend(part for part in parts if isinstance(part, Picture))
        return "\n\n".join([f"<!-- {match[1]} -->", *map(markdown, parts), f"<!-- end of {match[1]} -->"])

    return SECTION.sub(rewritten, page), pictures


if __name__ == "__main__":
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    page, pictures = written(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    folder = PAGE.parent / PICTURES
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        for end, mode in (("", "light"), ("-dark", "dark")):
            (folder / f"{picture.name}{end}.svg").write_text(paint(picture.svg, mode), encoding="utf-8")
    print(f"{PAGE} and {len(pictures)} pictures are written")
