"""How far a teacher's distribution moves when its linear layers are quantised, on real text.

    python benchmarks/quantization.py --teacher HuggingFaceTB/SmolLM2-135M --text valid.parquet
    python benchmarks/quantization.py --teacher … --text … --kinds float8 int8 --num_tokens 4096      # on a CPU

A row is a kind of `teacher.quantization`, compared with the teacher in bfloat16: KL(bfloat16 ‖ quantised) in nats per
token, the share of tokens where the likeliest next token is the same, and both perplexities.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from distillkit.config.data import DatasetSource
from distillkit.config.teacher import Quantization
from distillkit.data import build_dataset
from distillkit.evaluation import measure_divergence
from distillkit.evaluation.held_out import held_out_batches
from distillkit.models.float8 import exchange
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.models.quantization import quantization_arguments
from distillkit.teacher.live import LiveTeacher
from frame import DEVICE, Json, TeacherOptions, now, option, run


@dataclass(kw_only=True)
class QuantizationOptions(TeacherOptions):
    text: str = option(help="held-out text: a file, a folder or a pattern of files")
    kinds: list[str] = option(["float8"], choices=[*get_args(Quantization)])
    tokens: int = option(2048, "tokens per row")
    num_tokens: int = option(65536, "tokens measured")
    batch: int = option(4, "rows at a time")


def measure(options: QuantizationOptions) -> Iterator[Json]:
    tokenizer = load_tokenizer(options.teacher, **options.where)
    rows = build_dataset(DatasetSource(disk_path=options.text), tokenizer, options.tokens, seed=0)
    load = {"dtype": torch.bfloat16, **options.where}
    teacher = LiveTeacher(load_model(options.teacher, **load).to(DEVICE))
    for kind in options.kinds:
        began = now()
        if kind == "float8":
            model = load_model(options.teacher, **load).requires_grad_(False)
            exchange(model, "teacher.quantization", device=DEVICE)
            model.to(DEVICE)
        else:
            model = load_model(options.teacher, **load, **quantization_arguments(kind, torch.bfloat16, DEVICE))
        batches = held_out_batches(rows, options.batch)
        found = measure_divergence(teacher, model, batches, num_tokens=options.num_tokens).as_metrics()
        names = {"student_perplexity": "perplexity", "teacher_perplexity": "perplexity_in_bfloat16"}
        yield {
            "quantization": kind,
            **{names.get(name, name): round(value, 5) for name, value in found.items()},
            "seconds_in_all": round(now() - began, 1),
        }


def settings(options: QuantizationOptions, _: list[Json]) -> Json:
    return options.settings("teacher", "tokens", "num_tokens")


if __name__ == "__main__":
    run(QuantizationOptions, measure, "divergence of a quantised teacher from itself in bfloat16", more=settings)
