"""How should a KDA layer start? KL to the teacher right after conversion, and after equal small training.

    python recipes/quickstart_inputs.py
    python benchmarks/initialization.py

measures every variant on the inputs of the quickstart, on the CPU; on a GPU, with more of everything:

    python benchmarks/initialization.py --device cuda --teacher … --train … --held-out … \\
        --steps 300 --batch 16 --tokens 2048 --evaluation-tokens 65536

A variant is a student of some `StudentConfig.initialization`, or changed by a function here: those are ideas that were
tried and gave no reason for an option. All are trained alike: MLPs, embeddings and norms frozen, 0.2 cross-entropy,
0.2 KL at temperature 2, 0.6 cosine over all layers' outputs, AdamW.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, provenance
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.config import DatasetSource, LossConfig, StudentConfig
from distillkit.conversion import build_student
from distillkit.conversion.convert import fit_output_scales
from distillkit.data import build_dataset, collate
from distillkit.evaluation.divergence import measure_divergence
from distillkit.losses.labels import counted_rows
from distillkit.losses.objective import ModelShape, Objective
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.student.mixers.kda.initialize import set_memory
from distillkit.student.network import KDAHybridForCausalLM, KimiDeltaAttention
from distillkit.teacher.live import LiveTeacher
from distillkit.training.distiller import Distiller
from distillkit.training.freezing import freeze
from distillkit.training.precision import cast_for_training

INPUTS = Path("runs/quickstart/inputs")
FROZEN = ["embed_tokens", r"norm\.weight", r"\.mlp\."]
LOSSES = [
    LossConfig(function="cross_entropy", weight=0.2),
    LossConfig(function="kl", weight=0.2, temperature=2.0),
    LossConfig(function="hs_cosine", weight=0.6),
]
Batch = dict[str, Tensor]
Change = Callable[[KimiDeltaAttention], None]


def unchanged(kda: KimiDeltaAttention) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """`options` of the initialisation, and changes of each KDA layer before and after its output is fitted."""

    options: dict[str, Any] = field(default_factory=dict)
    before_fit: Change = unchanged
    after_fit: Change = unchanged


def open_gate(kda: KimiDeltaAttention) -> None:
    """sigmoid(4) = 0.98."""
    nn.init.constant_(kda.g_proj.get_parameter("1.bias"), 4.0)


def decay_of_fla(kda: KimiDeltaAttention) -> None:
    """Each channel at a rate of its own, log-uniformly between 2 and 200 tokens: fla's range under the safe gate."""
    set_memory(kda, 2 * 100 ** torch.rand(kda.dt_bias.shape, generator=torch.Generator().manual_seed(0)))


def one_scale(kda: KimiDeltaAttention) -> None:
    """The fitted scales of a layer's channels, replaced by their mean; the gate half open."""
    bias = kda.g_proj.get_parameter("1.bias")
    kda.o_norm.weight.data.mul_(2 * bias.sigmoid().mean())
    nn.init.zeros_(bias)


def scale_in_projection(kda: KimiDeltaAttention) -> None:
    """The fitted scales in the columns of o_proj, and norm and gate as in fla."""
    bias = kda.g_proj.get_parameter("1.bias")
    kda.o_proj.weight.data.mul_(2 * bias.sigmoid() * kda.o_norm.weight.repeat(kda.num_heads))
    nn.init.zeros_(bias)
    nn.init.ones_(kda.o_norm.weight)


VARIANTS = {
    "ours": Variant(),
    "convolution the identity": Variant({"short_convolution": "identity"}),
    "convolution as in fla": Variant({"short_convolution": "default"}),
    "output scale as in fla": Variant({"output_scale": "default"}),
    "memory spread": Variant({"memory": "spread"}),
    "decay as in fla": Variant(before_fit=decay_of_fla),
    "all as in fla": Variant({"short_convolution": "default", "output_scale": "default"}, before_fit=decay_of_fla),
    "output scale as in fla, gate open": Variant({"output_scale": "default"}, before_fit=open_gate),
    "one output scale per layer": Variant(after_fit=one_scale),
    "output scale in o_proj": Variant(after_fit=scale_in_projection),
}


def make_student(teacher: PreTrainedModel, variant: Variant, seed: int, dtype: torch.dtype) -> KDAHybridForCausalLM:
    """The variant's student, apart from the teacher, with float32 masters of what trains."""
    options = {"output_scale": "fitted", **variant.options}
    unfitted = StudentConfig.parse({"seed": seed, "initialization": {**options, "output_scale": "default"}})
    student = copy.deepcopy(build_student(teacher, unfitted))
    layers = [module for module in student.modules() if isinstance(module, KimiDeltaAttention)]
    for kda in layers:
        variant.before_fit(kda)
    if options["output_scale"] == "fitted":
        fit_output_scales(teacher, student, torch.Generator().manual_seed(seed))
    for kda in layers:
        variant.after_fit(kda)
    freeze(student, FROZEN)
    cast_for_training(student, dtype)
    return student


def train(student: KDAHybridForCausalLM, teacher: PreTrainedModel, batches: list[Batch], args: argparse.Namespace):
    """One optimizer step per batch; returns each step's loss."""
    shape = ModelShape(student.config.hidden_size, student.config.num_hidden_layers)
    objective = Objective(LOSSES, "all", shape, shape)
    online = LiveTeacher(teacher, objective.teacher_layers, final_norm=objective.taps_final_norm)
    distiller = Distiller(student, objective).train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, len(batches))
        signal = online.signal(batch)
        enabled = args.dtype != torch.float32
        with torch.autocast(batch["input_ids"].device.type, args.dtype, enabled=enabled):
            output = distiller(**batch, normalizer=torch.tensor(len(counted_rows(batch["labels"]))), signal=signal)
        output["loss"].backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(output["loss"].item(), 3))
    return losses


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: up over the first eighth, then down as a cosine."""
    warmup = max(1, steps // 8)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup + 1) / (steps - warmup + 1)))


def load_batches(path: str, tokenizer: Any, args: argparse.Namespace) -> list[Batch]:
    """The rows of a file in batches, in an order that is the same for every variant."""
    rows = list(build_dataset(DatasetSource(disk_path=path), tokenizer, args.tokens, seed=0))
    groups = [rows[start : start + args.batch] for start in range(0, len(rows), args.batch)]
    batches = [collate(group, pad_token_id=0, sequence_length=args.tokens) for group in groups]
    return [{name: tensor.to(args.device) for name, tensor in batch.items()} for batch in batches]


def measure(variant: str, teacher: PreTrainedModel, data: dict[str, list[Batch]], args: argparse.Namespace) -> dict:
    """One row of the result."""
    student = make_student(teacher, VARIANTS[variant], args.seed, args.dtype)
    options = {"num_tokens": args.evaluation_tokens, "student_autocast": args.dtype}
    row: dict[str, Any] = {"variant": variant}
    before = measure_divergence(teacher, student, data["held_out"], **options)
    started = time.perf_counter()
    losses = train(student, teacher, data["train"][: args.steps], args)
    seconds = time.perf_counter() - started
    after = measure_divergence(teacher, student, data["held_out"], **options)
    row |= {"kl_before": before.kl, "agreement_before": before.agreement}
    row |= {"kl_after": after.kl, "agreement_after": after.agreement}
    row |= {"first_loss": losses[0], "last_loss": losses[-1], "training_seconds": seconds}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(next(INPUTS.glob("teacher/*.gguf"), INPUTS / "teacher")))
    parser.add_argument("--train", default=str(INPUTS / "train.jsonl"))
    parser.add_argument("--held-out", default=str(INPUTS / "valid.jsonl"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="tokens per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluation-tokens", type=int, default=2048)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--output", type=Path, default=RESULTS / "initialization.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.dtype = torch.bfloat16
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    teacher = load_model(args.teacher, dtype=args.dtype).to(args.device)
    tokenizer = load_tokenizer(args.teacher)
    data = {
        name: load_batches(path, tokenizer, args) for name, path in (("train", args.train), ("held_out", args.held_out))
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for variant in args.variants:
        rows.append(measure(variant, teacher, data, args))
        print(json.dumps(rows[-1]), flush=True)
        result = {**provenance("distillkit"), "settings": {**settings, "dtype": "bfloat16"}, "results": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
