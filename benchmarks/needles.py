"""What a model finds again in a long text: RULER's single needles by length and depth.

    python benchmarks/needles.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/needles.py --model … --haystack prose.parquet --lengths 1024 4096 8192 --output long.json

The haystack of `niah_single_2` is a given text, or else the language reference that every CPython carries. The prompt
is plain text, without a chat template.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from distillkit.config.evaluate import NeedlesConfig
from distillkit.evaluation.needles import measure_needles
from distillkit.models.loading import load_model, load_tokenizer
from frame import DEVICE, Json, TeacherOptions, now, option, parse, save, show


@dataclass(kw_only=True)
class NeedlesOptions(TeacherOptions):
    teacher: str = option(help="the model: a folder, a hub id or a .gguf file", aliases=["--model"])
    dtype: str = option("bfloat16")
    tasks: list[str] = option(["niah_single_1", "niah_single_2"])
    lengths: list[int] = option([1024, 2048])
    depths: int = option(5)
    samples: int = option(4)
    batch_size: int = option(8, "prompts that are answered together")
    haystack: str | None = option(None, "text that is the haystack: a .txt, .jsonl or .parquet file")


SETTINGS = ("lengths", "depths", "samples", "batch_size")


def measure(options: NeedlesOptions, haystack: str) -> Json:
    """By task: its rows, and the seconds that they took."""
    given = {**options.settings("tasks", *SETTINGS), "haystack": {"disk_path": haystack}}
    settings = NeedlesConfig.parse(given)
    model = load_model(options.teacher, dtype=options.dtype, **options.where).eval().to(DEVICE)
    tokenizer = load_tokenizer(options.teacher, **options.where)
    results = {}
    for task in settings.tasks:
        start = now()
        rows = measure_needles(model, tokenizer, settings, task, progress=lambda done, total: print(done, "/", total))
        results[task] = {"rows": rows, "seconds": round(now() - start)}
        for row in rows:
            show({"task": task, **row})
    return results


if __name__ == "__main__":
    options = parse(NeedlesOptions)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "language_reference.txt"
        reference.write_text("\n\n".join(topics[name] for name in sorted(topics)))
        tasks = measure(options, options.haystack or str(reference))
    names = {"model": options.teacher, "haystack": options.haystack or "Python's language reference"}
    settings = {name: Path(value).name for name, value in names.items()} | options.settings("dtype", *SETTINGS)
    what = "RULER's needles: sum of scores by length and depth, greedy answers"
    save(options, {"what": what, "settings": settings, "tasks": tasks})
