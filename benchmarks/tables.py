"""docs/results.md from the files in benchmarks/results, so that no number is typed.

    python benchmarks/tables.py

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is a section of the file that is named here: written
anew each time, and empty as long as there is no such file. What stands outside stays. Pictures go to docs/pictures,
each for light pages and for dark ones.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from measuring import RESULTS
from outcomes import by_length
from replicated import TITLES, replication
from tabled import Json, Part, grid, number, source

from distillkit.reporting import numbers
from distillkit.reporting.colours import paint, series
from distillkit.reporting.document import Picture
from distillkit.reporting.plots import Axis, Series, line_chart

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
PICTURES = "pictures"


def parity(content: Json) -> list[Part]:
    """Of `rows`, files of tests."""
    rows = content["rows"]
    header = list(rows[0])
    return [
        grid([name.replace("_", " ") for name in header], [[number(row.get(name)) for name in header] for row in rows])
    ]


def throughput(content: Json) -> list[Part]:
    """Steps, and where the time of each goes, in shares of the step."""
    shapes = f"Shapes: {content['shape']}, {content['layers'] or 'all'} layers"
    rate = content.get("matmul_tflops")
    shapes += f"; one large bf16 product runs at {rate:,.0f} TFLOP/s." if rate else "."
    first = next((row.get("tokens_per_second") for row in content["rows"] if row["row"] == "reference"), None)
    steps, times = [], []
    for row in content["rows"]:
        if "error" in row:
            steps.append([row["row"], row["error"], *[numbers.NOTHING] * 5])
            continue
        speed = row["tokens_per_second"]
        share = row.get("share_of_matmul_rate")
        steps.append(
            [
                row["row"],
                f"{row['batch']} {numbers.TIMES} {row['sequence_length']:,}",
                numbers.rate(speed),
                numbers.NOTHING if not first else f"{numbers.TIMES}{speed / first:.2f}",
                number(row.get("peak_gib")),
                number(row.get("gflop_per_token")),
                numbers.NOTHING if share is None else numbers.percent(share),
            ]
        )
        if "kernel_seconds" in row:
            parts = {**row["kernel_seconds"], "idle": row["without_kernels_seconds"]}
            whole = sum(parts.values())
            times.append((row["row"], whole, {name: value / whole for name, value in parts.items()}))
    header = ["step", "rows", "tokens/s", "of the reference's", "peak GiB", "GFLOP/token", "of the matmul rate"]
    told: list[Part] = [shapes, grid(header, steps)]
    if times:
        kinds = list(times[0][2])
        lines = [
            [name, numbers.seconds(whole), *(numbers.percent(max(shares[kind], 0)) for kind in kinds)]
            for name, whole, shares in times
        ]
        told += ["Where a step's time goes, by the names of its kernels:", grid(["step", "time", *kinds], lines)]
    return told


def start_up(content: Json) -> list[Part]:
    header = ["shape", "Triton's cache", "first step", "second step", "first answer"]
    names = ("first_step_seconds", "second_step_seconds", "first_answer_seconds")
    rows = [
        [row["shape"], row["triton_cache"], *(numbers.seconds(row[name]) for name in names)] for row in content["rows"]
    ]
    return [grid(header, rows)]


def decoding(content: Json, name: str) -> list[Part]:
    """Tokens per second and what is remembered, by context and model; and a picture of the first."""
    models = {
        TITLES.get(model, model): {row["context"]: row for row in found["rows"]}
        for model, found in content["models"].items()
    }
    contexts = sorted({context for rows in models.values() for context in rows})
    header = ["context", *(f"{model}, tokens/s" for model in models), *(f"{model}, cache" for model in models)]
    lines = []
    for context in contexts:
        rows = [found.get(context) for found in models.values()]
        speeds = [numbers.NOTHING if row is None else numbers.rate(row["decode_tokens_per_second"]) for row in rows]
        held = [
            numbers.NOTHING if row is None else numbers.bytes_(row["kv_cache_bytes"] + row["state_bytes"])
            for row in rows
        ]
        lines.append([numbers.length(context), *speeds, *held])
    drawn = [
        Series(
            model,
            [float(context) for context in rows],
            [row["decode_tokens_per_second"] for row in rows.values()],
            "teacher" if model == "teacher" else series(position - 1),
        )
        for position, (model, rows) in enumerate(models.items())
    ]
    ticks = [float(context) for context in contexts]
    picture = line_chart(
        name,
        "Decoding, by tokens in the context",
        drawn,
        Axis("tokens in the context", numbers.length, log2=True, ticks=ticks),
        Axis("tokens per second", numbers.rate, from_zero=True),
    )
    settings = content["settings"]
    shown = f"{content['what'].capitalize()}; {settings['dtype']}. Cache is keys and values and the students' state."
    return [shown, grid(header, lines), picture]


def flat(content: Json, columns: dict[str, str], key: str = "rows") -> list[Part]:
    """Some columns of the flat rows under a key: their names in the file → headers."""
    return [grid(list(columns.values()), [[number(row.get(name)) for name in columns] for row in content[key]])]


def before_and_after(content: Json) -> list[Part]:
    """A single run of the product."""
    ends = content["divergence"]
    lines = [
        [label, *(form(ends[end][name]) for end in ("before", "after"))]
        for name, label, form in (
            ("kl", "KL(teacher‖student), nats per token", numbers.decimals),
            ("agreement", "same likeliest token", numbers.percent),
            ("student_perplexity", "perplexity", numbers.decimals),
            ("teacher_perplexity", "the teacher's", numbers.decimals),
        )
    ]
    training = content["training"]
    speed = numbers.rate(training["tokens"] / training["seconds"])
    told = f"{numbers.amount(training['tokens'])} tokens in {numbers.seconds(training['seconds'])}, {speed} tokens/s."
    return [grid(["", "after conversion", "after distillation"], lines), told]


def alignment(content: Json) -> list[Part]:
    results = content["quality"]["results"]
    lines = [
        [name, numbers.amount(row["tokens"]), numbers.seconds(row["seconds"]), numbers.decimals(row["kl"])]
        for name, row in results.items()
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
    return [
        f"{content['kills']} kills at random moments of {recipes}; the weights at the end are {weights} of undisturbed "
        "runs, bit for bit."
    ]


def compression(content: Json) -> list[Part]:
    lines = [
        [
            row["name"],
            number(row["bytes_per_token"]),
            numbers.amount(row["tokens_per_second"]["encode"]),
            numbers.amount(row["tokens_per_second"]["decode"]),
        ]
        for row in content["rows"]
        if "tokens_per_second" in row
    ]
    return [grid(["codec", "bytes per token", "encoded tokens/s", "decoded tokens/s"], lines)]


MEMORY = {
    "row": "step",
    "estimated_gib": "estimated GiB",
    "measured_gib": "measured GiB",
    "ratio": "ratio",
    "tokens_per_second": "tokens/s",
}
PLAN_TIMES = {
    "step": "step",
    "compiled": "compiled",
    "planned_tokens_per_second": "planned tokens/s",
    "measured_tokens_per_second": "measured tokens/s",
    "ratio": "ratio",
    "file": "measured in",
}
LOSSES = {"method": "method", "tokens": "tokens", "peak_mib": "peak MiB", "seconds": "seconds"}
ATTENTION = {
    "attention": "attention",
    "tokens": "tokens",
    "documents": "documents",
    "tokens_per_second": "tokens/s",
    "peak_mib": "peak MiB",
    "error": "",
}
DELTA_RULE = {"form": "form", "tokens": "tokens", "peak_mib": "peak MiB", "seconds": "seconds"}
INITIALIZATION = {
    "short_convolution": "short convolution",
    "output_scale": "output scale",
    "kl_before": "KL before",
    "kl_after": "KL after",
    "training_seconds": "seconds",
}
INITIAL_MEMORY = {"variant": "start", "kl_before": "KL before", "kl_after": "KL after"}

SECTIONS: dict[str, tuple[str, str, Callable[[Json], list[Part]]]] = {
    "parity": ("parity.json", "pytest -m gpu", parity),
    "replication": ("replication.json", "python benchmarks/replication.py", replication),
    "throughput": ("throughput.json", "python benchmarks/throughput.py", throughput),
    "throughput_policies": ("throughput_policies.json", "python benchmarks/throughput.py", throughput),
    "throughput_all": ("throughput_all.json", "python benchmarks/throughput.py", throughput),
    "throughput_smollm2": ("throughput_smollm2.json", "python benchmarks/throughput.py", throughput),
    "start_up": ("start_up.json", "python benchmarks/start_up.py", start_up),
    "decoding_afm": (
        "decoding_afm.json",
        "python benchmarks/decoding.py --shapes afm-4.5b",
        partial(decoding, name="decoding-afm"),
    ),
    "decoding": ("decoding.json", "python benchmarks/decoding.py", partial(decoding, name="decoding")),
    "smollm2_hybrid": ("smollm2_hybrid.json", "distillkit recipes/smollm2/hybrid.yaml", before_and_after),
    "quickstart": ("quickstart.json", "scripts/quickstart", before_and_after),
    "alignment": ("alignment.json", "python benchmarks/alignment.py all", alignment),
    "initialization": (
        "initialization.json",
        "python benchmarks/initialization.py",
        partial(flat, columns=INITIALIZATION, key="results"),
    ),
    "initialization_memory": (
        "initialization_memory.json",
        "python benchmarks/initialization.py",
        partial(flat, columns=INITIAL_MEMORY, key="results"),
    ),
    "initialization_short": (
        "initialization_short.json",
        "python benchmarks/initialization.py",
        partial(flat, columns=INITIAL_MEMORY, key="results"),
    ),
    "memory": ("memory.json", "python benchmarks/memory.py", partial(flat, columns=MEMORY)),
    "plan_times": ("plan_times.json", "python benchmarks/plan_times.py", partial(flat, columns=PLAN_TIMES)),
    "losses": ("losses.json", "python benchmarks/losses.py", partial(flat, columns=LOSSES)),
    "attention": ("attention.json", "python benchmarks/attention.py", partial(flat, columns=ATTENTION)),
    "delta_rule": ("delta_rule.json", "python benchmarks/delta_rule.py", partial(flat, columns=DELTA_RULE)),
    "needles": ("needles.json", "python benchmarks/needles.py", needles),
    "survival": ("survival.json", "python benchmarks/survival.py", survival),
    "compression": ("compression.json", "python benchmarks/compression.py", compression),
}
"""Name → the result file, the command that wrote it where the file does not say, and what is shown of it."""


HEADINGS = {
    "parity": """## Parity on CUDA

All tests that need a GPU: the KDA layer with fla's kernels beside the PyTorch form and the recurrence in float64, in
bf16 and float32, packed, cached, with heads of 64 and 128 (tests/model), and what else of the package runs on CUDA.""",
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
"""What stands above a section only where there is one."""


def section(name: str, results: Path) -> list[Part]:
    """What is shown of a result file; nothing where there is none."""
    file, command, shown = SECTIONS[name]
    if not (results / file).exists():
        return []
    content: Any = json.loads((results / file).read_text())
    heading = [HEADINGS[name]] if name in HEADINGS else []
    note = [f"Note: {content['note']}."] if "note" in content else []
    return [*heading, *shown(content), *note, source(file, content, command)]


def markdown(part: Part) -> str:
    if not isinstance(part, Picture):
        return part
    path, alt = f"{PICTURES}/{part.name}", escape(part.alt)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
    return f'<picture>{dark}<img src="{path}.svg" alt="{alt}" width="{part.width}"></picture>'


SECTION = re.compile(r"<!-- (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)


def written(page: str, results: Path = RESULTS) -> tuple[str, list[Picture]]:
    """The page with all its sections anew, and their pictures. Raises `KeyError` for a section unknown here."""
    pictures: list[Picture] = []

    def anew(match: re.Match[str]) -> str:
        name = match[1]
        parts = section(name, results)
        pictures.extend(part for part in parts if isinstance(part, Picture))
        return "\n\n".join([f"<!-- {name} -->", *map(markdown, parts), f"<!-- end of {name} -->"])

    return SECTION.sub(anew, page), pictures


def main() -> None:
    page, pictures = written(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    folder = PAGE.parent / PICTURES
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.svg").write_text(paint(picture.svg, "light"), encoding="utf-8")
        (folder / f"{picture.name}-dark.svg").write_text(paint(picture.svg, "dark"), encoding="utf-8")
    print(f"{PAGE} and {len(pictures)} pictures are written")


if __name__ == "__main__":
    main()
