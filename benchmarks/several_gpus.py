"""Training steps on one to several GPUs of a host: models and rows divided, tokens per second and memory of each GPU.

    python benchmarks/several_gpus.py                                     # all rows for which there are GPUs
    python benchmarks/several_gpus.py --rows "4: float32" "4: row of 131072" --output some.json
    python benchmarks/several_gpus.py --tiny --rows "2: float32" "2: row of 32768"      # a try: two processes of a CPU

A row is a run of torchrun with so many processes, one for each GPU; the first one's numbers are kept, and of memory the
largest. Teacher and hybrid student have random weights that never exist as a whole; tokens are random, one document
per row. Each row is the median of some steps after those in which kernels are tuned. `per_gpu` is tokens per second and
GPU; `loss` is the first step's, of the same weights whatever the number of GPUs. Beside the peak of memory stands what
`distillkit plan` expects to be allocated on each GPU (`ratio`).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distillkit.config import RunConfig
from distillkit.planning import plan_run
from distillkit.planning.meta_models import read_config, student_config, student_model, teacher_on_meta
from distillkit.teacher.live import LiveTeacher
from distillkit.training.arguments import build_training_arguments
from distillkit.training.compilation import compiled_step
from distillkit.training.context import context_of, divide_rows_of
from distillkit.training.distiller import Distiller
from distillkit.training.freezing import freeze
from distillkit.training.parallel import divide, mesh_of, place_teacher
from distillkit.training.precision import cast_for_training, compute_dtype
from distillkit.training.setup import checkpoint_layers
from distillkit.training.wiring import objective_of
from frame import DEVICE, GIB, Json, Options, option, parse, peak_memory, run, start_peak
from steps import KL, SHAPES, StepClock, one_phase_run, random_rows, run_config, trainer_of

CHECKPOINTED = {"gradient_checkpointing": True}
WHOLE = {"frozen_res": [], "loss_functions": KL, "layer_mapping": None}
"""All parameters are trained."""
IN_BF16 = {**WHOLE, "trained_weights": "bfloat16"}


@dataclass(frozen=True)
class Row:
    """processes: of torchrun. batch, tokens: of each process's rows. changes: of the one-phase recipe's YAML."""

    processes: int
    model: str
    batch: int
    tokens: int
    changes: Json
    compiled: bool = True


def rows() -> dict[str, Row]:
    made = {}
    for number in (1, 2, 4):
        divided = {} if number == 1 else {"parallel": {}}
        made[f"{number}: bf16 weights"] = Row(number, "afm-4.5b", 4, 2048, {**IN_BF16, **divided})
        if number > 1:
            made[f"{number}: float32"] = Row(number, "afm-4.5b", 4, 2048, {**WHOLE, **divided})
    for number, tokens in ((1, 32768), (2, 32768), (4, 32768), (4, 131072), (4, 262144)):
        divided = {} if number == 1 else {"parallel": {"context": number}}
        made[f"{number}: row of {tokens}"] = Row(number, "afm-4.5b", 1, tokens, divided)
    made["4: 14B, 2048"] = Row(4, "qwen3-14b", 2, 2048, {**WHOLE, "parallel": {}})
    made["4: 14B, 32768"] = Row(4, "qwen3-14b", 1, 32768, {**WHOLE, "parallel": {"context": 4}})
    return made


ROWS = rows()


@dataclass(kw_only=True)
class SeveralOptions(Options):
    rows: list[str] = option([*ROWS], choices=[*ROWS])
    tiny: bool = option(False, "models of two layers and short rows")
    warm_up: int = option(2, "steps that are not counted, at least 1")
    steps: int = option(4)
    gpu: str = option("H100", "as for distillkit plan")
    row: str | None = option(None, "this process is one of torchrun's for that row; it writes the row into --output")


def described(name: str, options: SeveralOptions, folder: Path) -> RunConfig:
    row = ROWS[name]
    tokens, model = (min(row.tokens, 256), "tiny") if options.tiny else (row.tokens, row.model)
    arguments = {**CHECKPOINTED, "torch_compile": row.compiled and not options.tiny, "logging_steps": 1}
    arguments |= {"max_steps": options.warm_up + options.steps, "optim": "adamw_torch", "bf16": True}
    return run_config(folder, one_phase_run(row.batch, tokens, arguments, **row.changes), SHAPES[model])


def measure(options: SeveralOptions) -> Iterator[Json]:
    there = torch.cuda.device_count() if DEVICE.type == "cuda" else 2
    for name in options.rows:
        if ROWS[name].processes <= there:
            yield launched(name, options)


def launched(name: str, options: SeveralOptions) -> Json:
    """The row, measured by processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        words = ["--row", name, "--output", str(file), "--warm_up", str(options.warm_up), "--steps", str(options.steps)]
        words += ["--tiny", str(options.tiny), "--gpu", options.gpu]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ROWS[name].processes)]
        ended = subprocess.run([sys.executable, *start, __file__, *words], stderr=subprocess.PIPE, text=True)
        if not file.exists():
            lines = [line for line in ended.stderr.splitlines() if "Error" in line]
            return {"row": name, "error": (lines or [f"exit code {ended.returncode}"])[0][:300]}
        found: Json = json.loads(file.read_text())
        config = described(name, options, Path(folder))
        plan = plan_run(config, gpu=options.gpu, gpus=ROWS[name].processes).phases[0]
    if plan.cost is not None and DEVICE.type == "cuda":
        found["estimated_gib"] = round(plan.cost.allocated / GIB, 2)
        found["ratio"] = round(found["estimated_gib"] / found["peak_gib"], 3)
    return found


def take_row(options: SeveralOptions) -> None:
    """The part of one of torchrun's processes."""
    assert options.row is not None and options.output is not None
    row, clock = ROWS[options.row], StepClock()
    with tempfile.TemporaryDirectory() as folder:
        config = described(options.row, options, Path(folder))
        given = {**config.training_args, "use_cpu": DEVICE.type == "cpu"}
        arguments, techniques = build_training_arguments(given, Path(config.output_path), uses_logits=True)
        device, dtype = arguments.device, compute_dtype(arguments)
        mesh = mesh_of(config.parallel, arguments.world_size, device)
        context = context_of(config.parallel, arguments)
        shape = read_config(config.teacher.path, "teacher.path", {}, False)
        teacher = teacher_on_meta(shape, config.teacher, False)
        student = student_model(config, student_config(config, shape))
        freeze(student, config.frozen_res)
        cast_for_training(student, dtype, torch.bfloat16 if config.trained_weights == "bfloat16" else torch.float32)
        if context is not None:
            divide_rows_of(teacher, "teacher.path")
            divide_rows_of(student, "model")
        if techniques.gradient_checkpointing:
            checkpoint_layers(student, dict(techniques.gradient_checkpointing_kwargs))
        teacher.get_output_embeddings().to_empty(device=device)
        if mesh is not None:
            teacher = place_teacher(teacher, device, mesh)
        fill(teacher, device, seed=0)
        live = LiveTeacher(teacher)
        objective = objective_of(config, student, live, student.config.vocab_size)
        distiller = divide(Distiller(student, objective), device, mesh)
        fill(distiller, device, seed=1)
        groups = 1 if context is None else context.size
        number = row.batch * arguments.max_steps * arguments.world_size // groups
        text = random_rows(number, config.sequence_length, student.config.vocab_size, 0)
        trainer = trainer_of(config, arguments, live, distiller, text, [clock], context)
        start_peak(device)
        with compiled_step(student, teacher, distiller.objective, techniques.compilation):
            trainer.train()
    seconds = clock.seconds(options.warm_up, options.warm_up + options.steps)
    tokens = row.batch * config.sequence_length * arguments.world_size // groups
    peak = torch.tensor(float(peak_memory(device)), device=device)
    if arguments.world_size > 1:
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    if arguments.process_index == 0:
        per_second = tokens / median(seconds)
        found = {
            "row": options.row,
            "processes": arguments.world_size,
            "batch": row.batch,
            "sequence_length": config.sequence_length,
            "tokens_per_second": round(per_second),
            "per_gpu": round(per_second / arguments.world_size),
            "step_seconds": round(median(seconds), 4),
            "slowest_step_seconds": round(max(seconds), 4),
            "peak_gib": round(float(peak) / GIB, 2),
            "loss": next(line["loss"] for line in trainer.state.log_history if "loss" in line),
        }
        options.output.write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fill(model: nn.Module, device: torch.device, seed: int) -> None:
    """Random weights, the same for any number of processes, for a model that has none."""
    model.to_empty(device=device)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator(device).manual_seed(1000 * seed + index)
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            whole.normal_(std=0.02, generator=generator)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)
        for buffer in model.buffers():
            buffer.fill_(0.1)  # rotary frequencies


if __name__ == "__main__":
    if "--row" in sys.argv:
        take_row(parse(SeveralOptions))
    else:
        title = "training steps on several GPUs: models and rows divided"
        run(SeveralOptions, measure, title, "flash-linear-attention", "triton")
