"""docs/results.md, and tables of other pages, from the files in benchmarks/results, so that no number is typed.

    python benchmarks/tables.py

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is rewritten each time from NAME.json, and is empty as
long as there is no such file; `conclusions` comes from several files, `contents` from the page's headings. What stands
outside stays: prose without measured numbers. Pictures go to docs/pictures, each for light pages and for dark ones.
"""

import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from cells import Json, Part, grid, named_now, number, source
from conclusions import conclusions
from distillkit.reporting import numbers
from distillkit.reporting.colours import paint, series
from distillkit.reporting.comparison import LEGEND, comparison
from distillkit.reporting.document import Picture
from distillkit.reporting.document import table as markdown_table
from distillkit.reporting.evaluated import merge_models, the_teacher
from distillkit.reporting.plots import Axis, Series, line_chart
from distillkit.reporting.reading import Evaluation
from distillkit.reporting.shares import main_metric, share_of_teacher
from frame import GIB, RESULTS, ROOT
from replicated import TITLES, replication, title

PAGES = [ROOT / "docs" / name for name in ("results.md", "several_gpus.md")]
PICTURES = "pictures"

LABELS = {"row": "step", "file": "measured in", "kl_before": "KL before training", "kl_after": "KL after training"}
"""Headers of columns that are not named as in the files."""
UNITS = {"_per_second": "/s", "_gib": " GiB", "_mib": " MiB", "_": " "}
"""Parts of names as headers have them."""


def label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    for part, shown in UNITS.items():
        name = name.replace(part, shown)
    return name


def flat(*columns: str, key: str = "rows", shown: Callable[[Any], str] = number) -> Callable[[Json], list[Part]]:
    """Some columns of the rows under a key, or all. An error stands in the first column that it leaves empty."""

    def cells(row: Json, names: Sequence[str]) -> list[str]:
        empty = next((name for name in names if row.get(name) is None), "")
        return [shown(row["error"] if name == empty and "error" in row else row.get(name)) for name in names]

    def table(content: Json) -> list[Part]:
        names = columns or [*content[key][0]]
        return [grid([*map(label, names)], [cells(row, names) for row in content[key]])]

    return table


def throughput(content: Json) -> list[Part]:
    """Steps, and where the time of each goes, in shares of the step."""
    rate = content.get("matmul_tflops")
    shapes = f"Shapes: {content['shape']}, {content['layers'] or 'all'} layers"
    shapes += f"; one large bf16 product runs at {rate:,.0f} TFLOP/s." if rate else "."
    first = next((row.get("tokens_per_second") for row in content["rows"] if row["row"] == "reference"), None)
    steps, times = [], []
    for row in content["rows"]:
        if "error" in row:
            steps.append([row["row"], row["error"], *[numbers.NOTHING] * 4])
            continue
        speed, share = row["tokens_per_second"], row.get("share_of_matmul_rate")
        rows = f"{row['batch']} {numbers.TIMES} {row['sequence_length']:,}"
        times_first = f"{numbers.TIMES}{speed / first:.2f}" if first else numbers.NOTHING
        ends = [number(row.get("peak_gib")), numbers.shown(share, numbers.percent)]
        steps.append([row["row"], rows, numbers.rate(speed), times_first, *ends])
        if "kernel_seconds" in row:
            kinds = dict(row["kernel_seconds"])
            others = kinds.pop("other") + kinds.pop("optimizer")
            seconds = [*(kinds[kind] for kind in KERNELS), others, row["without_kernels_seconds"]]
            times.append([row["row"], *(numbers.percent(max(each / sum(seconds), 0)) for each in seconds)])
    header = ["step", "rows", "tokens/s", "of the reference's", "peak GiB", "of the matmul rate"]
    parts: list[Part] = [shapes, grid(header, steps)]
    if times:
        header = ["step", *KERNELS, "optimizer and other", "no kernel"]
        parts += ["Shares of a step's time, by the names of its kernels:", grid(header, times)]
    return parts


KERNELS = ("attention", "kda", "matmul")
"""Kinds of kernels with a column of their own."""
STATES = {
    "kept": "filled by an earlier process",
    "what smollm2-135m left": "filled by smollm2-135m only",
    "tuned elsewhere": "empty; results of the package",
}
"""States of Triton's cache that are named otherwise in the file."""


def start_up(content: Json) -> list[Part]:
    header = ["shapes", "Triton's cache", "first step", "second step", "first generation"]
    names = [f"{name}_seconds" for name in ("first_step", "second_step", "first_answer")]
    lines = []
    for row in content["rows"]:
        state = STATES.get(row["triton_cache"], row["triton_cache"])
        lines.append([row["shape"], state, *(numbers.seconds(row[name]) for name in names)])
    return [grid(header, lines)]


def decoding(content: Json, name: str) -> list[Part]:
    """Speed, memory and time to read a prompt, by context and model; and a picture of the first."""
    models = {
        TITLES.get(model, model): {row["context"]: row for row in found["rows"]}
        for model, found in content["models"].items()
    }
    contexts = sorted({context for rows in models.values() for context in rows})

    def table(cell: Callable[[Json], str]) -> str:
        found = {at: [rows.get(at) for rows in models.values()] for at in contexts}
        lines = [
            [numbers.length(at), *(cell(row) if row else numbers.NOTHING for row in rows)] for at, rows in found.items()
        ]
        return grid(["context", *models], lines)

    drawn = []
    for position, (model, found) in enumerate(models.items()):
        speeds = [row["decode_tokens_per_second"] for row in found.values()]
        colour = "teacher" if model == "teacher" else series(position - 1)
        drawn.append(Series(model, [float(context) for context in found], speeds, colour))
    x_axis = Axis("tokens in the context", numbers.length, log2=True, ticks=[float(context) for context in contexts])
    y_axis = Axis("tokens per second", numbers.rate, from_zero=True)
    picture = line_chart(name, "Decoding, by tokens in the context", drawn, x_axis, y_axis)
    return [
        f"One row, {content['settings']['dtype']}. Tokens generated per second, by tokens in the context:",
        table(lambda row: numbers.rate(row["decode_tokens_per_second"])),
        picture,
        "Memory of keys, values and KDA states:",
        table(lambda row: numbers.bytes_(row["kv_cache_bytes"] + row["state_bytes"])),
        "Time to read a prompt of that length:",
        table(lambda row: numbers.seconds(row["time_to_first_token_seconds"])),
    ]


def batches(content: Json) -> list[Part]:
    """Decoding of many rows at a time."""
    header = ["model", "context", "rows", "tokens/s", "cache of a row", "GiB in all"]
    lines = []
    for model, found in content["models"].items():
        for row in found["rows"]:
            rows = row.get("rows", content["settings"]["batch_size"])
            each = row.get("cache_bytes_per_row") or (row["kv_cache_bytes"] + row["state_bytes"]) / rows
            sizes = [numbers.bytes_(each), number(row["peak_bytes"] / GIB)]
            speed = numbers.rate(row["decode_tokens_per_second"])
            lines.append([TITLES.get(model, model), numbers.length(row["context"]), f"{rows:,}", speed, *sizes])
    return [grid(header, lines)]


def served_speed(content: Json) -> list[Part]:
    """vLLM with one sequence and with as many as it ran at a time."""
    header = ["context", "model", "tokens/s, one sequence", "sequences that fit", "tokens/s, sequences", "a sequence"]
    lines = []
    for context in content["settings"]["contexts"]:
        for model in ("teacher", "hybrid", "kda_only"):
            rows = [row for row in content["rows"] if (row["model"], row["context"]) == (model, context)]
            one, most = rows[0], rows[-1]
            many = f"{numbers.rate(most['tokens_per_second'])}, {most['sequences']:,}"
            ends = [f"{one['fitting_sequences']:,}", many, f"{one['mib_per_sequence']:,.0f} MiB"]
            lines.append([numbers.length(context), TITLES.get(model, model), number(one["tokens_per_second"]), *ends])
    return [grid(header, lines)]


WRITE_UP = {"mmlu": (25, 63.1, 55.8), "arc_challenge": (25, 55.6, 49.9), "hellaswag": (25, 78.0, 74.3)}
WRITE_UP["gsm8k"] = (0, 52.1, 26.8)
"""Percent by guessing, of AFM-4.5B and of AFM-4.5B-Base-KDA-Only, as its model card has them (December 2025)."""


def answers(content: Json) -> list[Part]:
    """Runs; the report's own comparison; four benchmarks beside what was published."""
    models = merge_models([Evaluation(Path(), each) for each in content["evaluations"]])
    table, teacher = comparison(models), the_teacher(models)
    assert table is not None and teacher is not None
    students = [model for model in models if not model.is_teacher]
    runs = []
    for name, run in content["runs"].items():
        held_out = numbers.nats(run["phases"][-1]["divergence"]["after"]["kl"])
        seconds = [numbers.seconds(each) for each in (run["seconds"], run["clock"]["total"])]
        runs.append([name, run["recipe"], numbers.count(run["tokens"]), *seconds, held_out])
    lines = []
    for task, (chance, theirs, ours) in WRITE_UP.items():
        cells = [f"{ours - theirs:+.1f}, {numbers.percent((ours - chance) / (theirs - chance))}"]
        metric = main_metric(teacher.benchmarks[task])
        for student in students:
            ends = [each.benchmarks[task]["metrics"][metric]["value"] for each in (teacher, student)]
            share = share_of_teacher(student, teacher, [task]).value
            kept = "teacher at chance" if share is None else numbers.percent(share)
            cells.append(f"{100 * (ends[1] - ends[0]):+.1f}, {kept}")
        lines.append([task, *cells])
    others = {task: found["note"] for task, found in teacher.benchmarks.items() if "note" in found}
    header = ["student", "recipe", "tokens", "training", "from command to end", "KL in its last rows"]
    return [
        grid(header, runs, words=True),
        markdown_table(table),
        LEGEND,
        "Points that are lost, and the share of the teacher's score above chance that is left:",
        grid(["benchmark", "AFM-4.5B, KDA only", *(student.name for student in students)], lines, words=True),
        "Local files that differ from the hub's: "
        + "; ".join(f"{task}: {note}" for task, note in others.items())
        + ".",
    ]


def before_and_after(content: Json) -> list[Part]:
    """A single run of the product."""
    rows = (
        ("kl", "KL(teacher‖student), nats per token", numbers.decimals),
        ("agreement", "same likeliest token", numbers.percent),
        ("student_perplexity", "perplexity of the student", numbers.decimals),
        ("teacher_perplexity", "perplexity of the teacher", numbers.decimals),
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


def compression(content: Json) -> list[Part]:
    lines = []
    for row in content["rows"]:
        if rates := row.get("tokens_per_second"):
            speeds = (numbers.amount(rates[name]) for name in ("encode", "decode"))
            lines.append([row["name"], number(row["bytes_per_token"]), *speeds])
    return [grid(["codec", "bytes per token", "tokens/s, encoding", "tokens/s, decoding"], lines)]


def starts(content: Json) -> list[Part]:
    names = {"ours": "`memory: attended` (default)", "memory spread": "`memory: spread`"}
    rows = [{**row, "start": names[row["variant"]]} for row in content["results"]]
    return flat("start", "kl_before", "kl_after")({"rows": rows})


def plan_times(content: Json) -> list[Part]:
    """Steps of the replication are named by the student and its phase."""

    def step(name: str) -> str:
        return re.sub(r"(?<=: )best[\w-]*", lambda variant: title(variant[0]), name)

    columns = ("step", "compiled", "planned_tokens_per_second", "measured_tokens_per_second", "ratio", "file")
    return flat(*columns)({"rows": [{**row, "step": step(row["step"])} for row in content["rows"]]})


def divided(content: Json) -> list[Part]:
    """Speed and what is sent, and the memory of those with short rows, by kind."""
    names = {"afm-4.5b": "AFM-4.5B", "qwen3-14b": "Qwen3-14B"}
    speeds, sent, memory = [], [], {}
    for row in content["rows"]:
        parallel, hosts = row["parallel"], f"{row['nodes']} hosts" if row["nodes"] > 1 else "1 host"
        shard = 1 if parallel is None else parallel.get("shard", row["gpus"])
        copies = "whole models" if parallel is None else f"a copy on {shard}"
        copies += f", a row on {parallel['context']}" if parallel and "context" in parallel else ""
        case = [names[row["models"]], f"{row['rows']} {numbers.TIMES} {numbers.length(row['tokens'])}"]
        case.append(f"{hosts}, {copies}")
        memory_of_gpu = number(row["total_gib"]) + ("" if row["fits"] else ", does not fit")
        speeds.append([*case, memory_of_gpu, number(row["step_seconds"]), numbers.rate(row["tokens_per_second"])])
        traffic = (row[f"sent_{where}_gib"] for where in ("inside", "between"))
        busy = [row["computed_seconds"], row["communicated_seconds"], row["alone_seconds"]]
        sent.append([", ".join(case), *map(number, [*traffic, *busy])])
        if row["tokens"] == 2048 and row["nodes"] == 1:
            memory[f"{case[0]}, {copies}"] = row["memory_gib"]
    kinds = dict.fromkeys(kind for each in memory.values() for kind in each)
    by_kind = [[kind, *(number(each.get(kind)) for each in memory.values())] for kind in kinds]
    header = ["GiB sent in a host", "between hosts", "s computed", "s communicated", "of these alone"]
    return [
        grid(
            ["models", "rows of a GPU", f"{content['planned_for']}s", "GiB per GPU", "s per step", "tokens/s"], speeds
        ),
        "What a GPU sends in a step (and receives as much), and how long that takes beside computing; a part of it "
        "while there is nothing to compute:",
        grid(["", *header], sent),
        "Memory of a GPU by kind, GiB, on one host with rows of 2k:",
        grid(["", *memory], by_kind),
    ]


def served_text(content: Json) -> list[Part]:
    """Of vLLM beside transformers; what `vllm serve` answered is for the reader of the file."""
    rows = [row for row in content["rows"] if row["step"] == "parity"]
    for row in rows:
        if "error" not in row:
            row["equal_texts"] = f"{row['equal_prompts']} of {row['prompts']}"
    names = ("model", "dtype", "equal_texts", "largest_gap_in_roundings", "largest_difference", "mean_difference")
    return flat(*names)({"rows": rows})


SECTIONS: dict[str, Callable[[Json], list[Part]]] = {
    "parity": flat(),
    "replication": replication,
    "throughput": throughput,
    "throughput_policies": throughput,
    "throughput_all": throughput,
    "throughput_float8": throughput,
    "quantization": flat("quantization", "kl", "agreement", "perplexity_in_bfloat16", "perplexity", "tokens"),
    "throughput_smollm2": throughput,
    "start_up": start_up,
    "decoding_afm": partial(decoding, name="decoding-afm"),
    "decoding": partial(decoding, name="decoding"),
    "smollm2_hybrid": before_and_after,
    "quickstart": before_and_after,
    "alignment": alignment,
    "decoding_batch": batches,
    "decoding_filled": batches,
    "serving_afm": served_speed,
    "serving_parity": served_text,
    "answers": answers,
    "initialization": flat("short_convolution", "output_scale", "decay", "kl_before", "kl_after", key="results"),
    "initialization_memory": starts,
    "initialization_short": starts,
    "memory": flat("row", "estimated_gib", "measured_gib", "ratio", "tokens_per_second"),
    "plan_times": plan_times,
    "divided": divided,
    "losses": flat("method", "tokens", "peak_mib", "seconds"),
    "attention": flat("attention", "tokens", "tokens_per_second", "peak_mib"),
    "delta_rule": flat("form", "tokens", "peak_mib", "seconds"),
    "kills": flat("what", "kills", "ends", "equal"),
    "kills_divided": flat("what", "kills", "ends", "equal"),
    "compression": compression,
}
"""What is shown of each result file."""

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMMANDS = {
    "decoding": f"--teacher {SMOLLM2} --decode-tokens 32 --repeats 1",
    "losses": "",
}
"""The options, from its settings, of the benchmark that wrote a file which does not contain its command. Without
them no command is shown."""


def section(name: str, results: Path) -> list[Part]:
    """What is shown of a result file; nothing if there is none."""
    file = results / f"{name}.json"
    if not file.exists():
        return []
    content: Any = json.loads(file.read_text())
    note = [f"Note: {content['note']}."] if "note" in content else []
    command = f"python benchmarks/{name}.py {COMMANDS[name]}".strip() if name in COMMANDS else ""
    parts = [*SECTIONS[name](content), *note, source(file.name, content, command)]
    return [named_now(part) if isinstance(part, str) else part for part in parts]


HEADING = re.compile(r"^(##+) (.*)$", re.MULTILINE)


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def contents(page: str) -> str:
    """A list of links to all headings."""
    lines = [f"{'  ' * (len(level) - 2)}- [{name}](#{anchor(name)})" for level, name in HEADING.findall(page)]
    return "\n".join(line for line in lines if line != "- [Contents](#contents)")


def markdown(part: Part) -> str:
    if not isinstance(part, Picture):
        return part
    path, alt = f"{PICTURES}/{part.name}", escape(part.alt)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
    return f'<picture>{dark}<img src="{path}.svg" alt="{alt}" width="{part.width}"></picture>'


SECTION = re.compile(r"<!-- (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)
CONTENTS = re.compile(r"<!-- contents -->.*?<!-- end of contents -->", re.DOTALL)


def block(name: str, parts: Sequence[Part]) -> str:
    return "\n\n".join([f"<!-- {name} -->", *map(markdown, parts), f"<!-- end of {name} -->"])


def written(page: str, results: Path = RESULTS) -> tuple[str, list[Picture]]:
    """The page with all its sections rewritten, and their pictures. Raises `KeyError` for an unknown section."""
    pictures: list[Picture] = []

    def rewritten(match: re.Match[str]) -> str:
        name = match[1]
        if name == "contents":  # is made of all the others
            return match[0]
        parts = conclusions(results) if name == "conclusions" else section(name, results)
        pictures.extend(part for part in parts if isinstance(part, Picture))
        return block(name, parts)

    page = SECTION.sub(rewritten, page)
    return CONTENTS.sub(lambda _: block("contents", [contents(page)]), page), pictures


if __name__ == "__main__":
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    folder = ROOT / "docs" / PICTURES
    folder.mkdir(exist_ok=True)
    for path in PAGES:
        page, pictures = written(path.read_text(encoding="utf-8"))
        path.write_text(page, encoding="utf-8")
        for picture in pictures:
            for end, mode in (("", "light"), ("-dark", "dark")):
                (folder / f"{picture.name}{end}.svg").write_text(paint(picture.svg, mode), encoding="utf-8")
        print(f"{path} and {len(pictures)} pictures are written")
