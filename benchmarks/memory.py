"""Peak memory of real training steps beside what `distillkit plan` says of the same run.

    python benchmarks/memory.py                                   # a GPU: all rows; a CPU: those that fit there
    python benchmarks/memory.py --rows smollm2-16x2048 afm12-4x2048 --output memory_some.json
    python benchmarks/memory.py --list

A row is a shape, a batch and what differs from the one-phase recipe (frozen MLPs, embeddings, head and norms; 0.2
cross-entropy, 0.2 KL, 0.6 cosine of all layers; bf16 autocast over float32 masters). Teacher and hybrid student have
random weights, made on the device; the steps are the product's trainer's, on random tokens, one document per row.

On CUDA the peak is `torch.cuda.max_memory_allocated`, all rows in one process (kernels are tuned once per head size),
and the estimate what the plan says is allocated, without CUDA's context. On a CPU the peak is the resident size above
that before the models were made and after steps of a tiny one, each row in a process of its own, where glibc gives
freed blocks back at once. The ratio is estimate / measured; the file is written after every row.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, in_own_process, peak_memory, provenance
from steps import AFM, ALIGNMENT, FROZEN, ONE_PHASE, SMOLLM2, random_models, run_config, trainer_of
from transformers.utils import logging as transformers_logging

from distillkit.config import RunConfig
from distillkit.planning import plan_run
from distillkit.training.arguments import build_training_arguments
from distillkit.training.precision import compute_dtype
from distillkit.training.setup import checkpoint_layers

GIB = 2**30
STEPS = 3

SMALL = {**SMOLLM2, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 8192}
TINY = {**SMALL, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "vocab_size": 512}

KL = [{"function": "kl", "weight": 1.0}]


def row(shape: dict[str, Any], batch: int, tokens: int, **changes: Any) -> dict[str, Any]:
    """The YAML of a row, without places; `arguments` are training_args, `layers` a smaller depth."""
    arguments = {"per_device_train_batch_size": batch, "bf16": True, "learning_rate": 1e-6, "max_steps": STEPS}
    arguments |= changes.pop("arguments", {})
    shape = {**shape, "num_hidden_layers": changes.pop("layers", shape["num_hidden_layers"])}
    run = {"sequence_length": tokens, "loss_functions": ONE_PHASE, "layer_mapping": "all", "frozen_res": FROZEN}
    return {"shape": shape, "run": {**run, **changes, "training_args": arguments}}


CHECKPOINTED = {"gradient_checkpointing": True}
ON_GPU = {
    "smollm2-16x2048": row(SMOLLM2, 16, 2048),
    "smollm2-1x32768": row(SMOLLM2, 1, 32768),
    "smollm2-16x2048-alignment": row(SMOLLM2, 16, 2048, loss_functions=ALIGNMENT),
    "smollm2-8x2048-all-trained": row(SMOLLM2, 8, 2048, loss_functions=KL, frozen_res=[]),
    "afm12-4x2048": row(AFM, 4, 2048, layers=12),
    "afm12-4x2048-checkpointing": row(AFM, 4, 2048, layers=12, arguments=CHECKPOINTED),
    "afm12-4x2048-accumulated": row(AFM, 4, 2048, layers=12, arguments={"gradient_accumulation_steps": 2}),
    "afm12-4x2048-8bit": row(AFM, 4, 2048, layers=12, arguments={"optim": "adamw_torch_8bit"}),
    "afm12-4x2048-bfloat16": row(AFM, 4, 2048, layers=12, frozen_res=[], trained_weights="bfloat16"),
    "afm-4x2048-checkpointing": row(AFM, 4, 2048, arguments=CHECKPOINTED),
    "afm-4x2048-alignment": row(AFM, 4, 2048, loss_functions=ALIGNMENT),
    "afm-1x32768-checkpointing": row(AFM, 1, 32768, arguments=CHECKPOINTED),
}
ON_CPU = {
    "small-4x512": row(SMALL, 4, 512),
    "small-8x512-checkpointing": row(SMALL, 8, 512, arguments=CHECKPOINTED),
    "small-8x512-alignment": row(SMALL, 8, 512, loss_functions=ALIGNMENT),
    "small-4x512-float32": row(SMALL, 4, 512, arguments={"bf16": False}, frozen_res=["embed_tokens"]),
    "smollm2-2x512": row(SMOLLM2, 2, 512),
    "smollm2-2x512-checkpointing": row(SMOLLM2, 2, 512, arguments=CHECKPOINTED),
}
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}


def main() -> None:
    on_cuda = torch.cuda.is_available()
    rows = ON_GPU if on_cuda else ON_CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ON_GPU, *ON_CPU], default=list(rows))
    parser.add_argument("--gpu", default="H100" if on_cuda else "cpu", help="as for distillkit plan")
    parser.add_argument("--list", action="store_true", help="print the rows and do nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / ("memory.json" if on_cuda else "memory_cpu.json"))
    parser.add_argument("--one", help="measure this row in this process and print it")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if arguments.list:
        print("\n".join(arguments.rows))
    elif arguments.one:
        print(json.dumps(measured(arguments.one, arguments.gpu)))
    else:
        measure_all(arguments, on_cuda)


def measure_all(arguments: argparse.Namespace, on_cuda: bool) -> None:
    """Every row, and the file anew after each."""
    result: dict[str, Any] = {
        "benchmark": "peak memory of training steps beside the plan's estimate",
        "command": f"python benchmarks/memory.py {' '.join(sys.argv[1:])}".strip(),
        **provenance("flash-linear-attention", "torchao"),
        "rows": [],
    }
    os.environ.update(GLIBC)
    for name in arguments.rows:
        if on_cuda:
            found = measured(name, arguments.gpu)
            print(json.dumps(found), flush=True)
        else:
            found = in_own_process(__file__, "--one", name, "--gpu", arguments.gpu)
        result["rows"].append(found)
        ratios = [each["ratio"] for each in result["rows"] if each.get("ratio")]
        if ratios:
            result["summary"] = {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measured(name: str, gpu: str) -> dict[str, Any]:
    """A row with the plan's estimate and the peak, in GiB."""
    described = {**ON_GPU, **ON_CPU}[name]
    with tempfile.TemporaryDirectory() as folder:
        config = described_run(described, Path(folder))
        started = time.perf_counter()
        cost = plan_run(config, gpu=gpu).phases[0].cost
        assert cost is not None
        planned = time.perf_counter() - started
        found = {
            "row": name,
            "layers": described["shape"]["num_hidden_layers"],
            "estimated_gib": round(cost.allocated / GIB, 3),
            "estimated": {kind: round(size / GIB, 3) for kind, size in cost.memory.items()},
            "moment": cost.moment,
            "plan_seconds": round(planned, 1),
        }
        if not torch.cuda.is_available():
            warm_up()
        gc.collect()
        return found | compared(config, Path(folder), cost.allocated)


def warm_up() -> None:
    """Steps of a tiny model: code that is loaded when first used takes resident memory, too."""
    with tempfile.TemporaryDirectory() as folder:
        train(described_run(row(TINY, 1, 64), Path(folder)), Path(folder))


def compared(config: RunConfig, folder: Path, estimate: float) -> dict[str, Any]:
    """The measured peak and the ratio; or that it did not fit."""
    started = time.perf_counter()
    try:
        peak, tokens_per_second = train(config, folder)
    except torch.OutOfMemoryError:
        return {"error": "does not fit into the device's memory"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "measured_gib": round(peak / GIB, 3),
        "ratio": round(estimate / peak, 3),
        "tokens_per_second": tokens_per_second,
        "seconds": round(time.perf_counter() - started, 1),
    }


def described_run(described: dict[str, Any], folder: Path) -> RunConfig:
    """The row as a run whose teacher is a folder with a config.json."""
    (folder / "config.json").write_text(json.dumps(described["shape"]))
    return run_config(folder, described["run"])


def train(config: RunConfig, folder: Path) -> tuple[int, int]:
    """(peak bytes, tokens per second) of the steps of a run; weights are part of the peak."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {**config.training_args, "use_cpu": device.type == "cpu", "logging_steps": 1}
    arguments, techniques = build_training_arguments(given, folder / "run", uses_logits=True)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    teacher, student = random_models(config, compute_dtype(arguments), device)
    if techniques.gradient_checkpointing:
        checkpoint_layers(student, dict(techniques.gradient_checkpointing_kwargs))
    trainer = trainer_of(config, arguments, teacher, student)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    speeds = [line["tokens_per_second"] for line in trainer.state.log_history if "tokens_per_second" in line]
    return peak - before, round(speeds[-1])


def resident() -> int:
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
