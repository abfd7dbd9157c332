"""The students of the miniature replication, as YAML: what each changes in a recipe of recipes/smollm2/."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent.parent / "recipes" / "smollm2"
SEED = 42

BEST_ALIGNMENT_SHARE = 5 / 85
"""Of the tokens of `best` in short rows, as in recipes/smollm2/closest.yaml."""

Json = dict[str, Any]

KL = [{"function": "kl", "weight": 1.0}]
ALIGNMENT = [{"function": "attn_mse", "weight": 1.0}]


def one_phase(args: argparse.Namespace) -> list[Json]:
    """The recipe of the KDA write-up, then longer rows: every parameter trains, without hidden states."""
    losses = [{"function": "cross_entropy", "weight": 0.5}, {"function": "kl", "weight": 0.5, "temperature": 2.0}]
    return [
        {"name": "short", "tokens": args.tokens},
        {"name": "long", "tokens": args.long_tokens, "frozen_res": [], "loss_functions": losses, **_longer(args)},
    ]


def radlads(args: argparse.Namespace) -> list[Json]:
    """Alignment, distillation and longer rows (arXiv 2505.03005), out of the same budget as one phase."""
    alignment, distillation = _shares(args.tokens, args.alignment_share)
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    return [
        {"name": "alignment", "tokens": alignment, "loss_functions": ALIGNMENT, "training_args": schedule},
        {"name": "short", "tokens": distillation, "loss_functions": KL, "training_args": {"learning_rate": 3e-4}},
        {"name": "long", "tokens": args.long_tokens, "loss_functions": KL, **_longer(args)},
    ]


def best(args: argparse.Namespace) -> list[Json]:
    """recipes/smollm2/closest.yaml: a short alignment, then every parameter by KL and a little of the hidden states."""
    alignment, distillation = _shares(args.tokens, BEST_ALIGNMENT_SHARE)
    return [
        {"name": "alignment", "tokens": alignment, "loss_functions": ALIGNMENT},
        {"name": "short", "tokens": distillation, "loss_functions": [*KL, {"function": "hs_cosine", "weight": 0.2}]},
        {"name": "long", "tokens": args.long_tokens, "loss_functions": KL, **_longer(args, learning_rate=3e-4)},
    ]


def _longer(args: argparse.Namespace, learning_rate: float = 1e-4) -> Json:
    """As many tokens per step in longer rows, at a lower learning rate than the recipe's."""
    batch = max(1, args.batch * args.sequence_length // args.long_sequence_length)
    training = {"per_device_train_batch_size": batch, "learning_rate": learning_rate}
    return {"sequence_length": args.long_sequence_length, "training_args": training}


def _shares(tokens: int, share: float) -> tuple[int, int]:
    alignment = max(1, round(share * tokens))
    return alignment, max(1, tokens - alignment)


ALL_TRAIN: Json = {"frozen_res": [], "training_args": {"adam_beta2": 0.95}}
VARIANTS: dict[str, tuple[str, Json, Callable[[argparse.Namespace], list[Json]]]] = {
    "hybrid": ("hybrid.yaml", {}, one_phase),
    "front_loaded": ("front_loaded.yaml", {}, one_phase),
    "kda_only": ("kda_only.yaml", {}, one_phase),
    "radlads": ("radlads.yaml", {}, radlads),
    "hybrid_grouped": ("hybrid.yaml", {"student": {"kv_heads": "grouped"}}, one_phase),
    "hybrid_rope": ("hybrid.yaml", {"student": {"keep_rope": True}}, one_phase),
    "best": ("hybrid.yaml", ALL_TRAIN, best),
    "best_kda_only": ("kda_only.yaml", ALL_TRAIN, best),
}
"""Name → recipe, what differs from it at the top level, and the phases."""


def base(name: str) -> str:
    """The variant that `best-a` is a trial of, beside `best` itself: its own folder, its own --set."""
    return name.partition("-")[0]


def run_of(name: str, folder: Path, args: argparse.Namespace) -> Json:
    """The whole YAML of a variant's run, into `folder`/run; rows of one length are prepared once for all variants."""
    recipe, changes, phases_of = VARIANTS[base(name)]
    phases = [phase for phase in phases_of(args) if phase["name"] != "long" or args.long_tokens]
    for position, phase in enumerate(phases):
        length = phase.get("sequence_length", args.sequence_length)
        prepared = Path(args.work) / "prepared" / f"{length}-{SEED + position}"
        phase["dataset"] = {"seed": SEED + position, "prepared_dataset_path": str(prepared)}
    if args.go_on:
        phases, changes = phases[-1:], {**changes, "student": None, "model": args.go_on}
    return {
        "extends": str(RECIPES / recipe),
        "project_name": f"replication-{name.replace('_', '-')}",
        "output_path": str(folder / "run"),
        "teacher": args.teacher_section,
        "sequence_length": args.sequence_length,
        "dataset": {"train_dataset": {"disk_path": args.data}, "eval_dataset": {"disk_path": args.eval}},
        **{key: value for key, value in changes.items() if key != "training_args"},
        "training_args": {
            "per_device_train_batch_size": args.batch,
            "logging_steps": args.logging_steps,
            "eval_strategy": "steps",
            "eval_steps": 0.1,  # of a phase's steps: the curve of the divergence
            "save_steps": 0.25,
            "save_total_limit": 1,
            **changes.get("training_args", {}),
        },
        "evaluation": {"num_tokens": args.held_out_tokens},
        "phases": phases,
    }


def evaluations_of(folder: Path, students: dict[str, Path], args: argparse.Namespace) -> dict[str, Json]:
    """The YAML of each evaluation, by name: divergences in rows of either length, needles by student and task."""
    named = {name: {"path": str(path), "kwargs": {"dtype": args.dtype}} for name, path in students.items()}
    told: dict[str, Json] = {}
    for length in dict.fromkeys((args.sequence_length, args.long_sequence_length)):
        told[f"divergence-{length}"] = {
            "teacher": {key: value for key, value in args.teacher_section.items() if key != "kind"},
            "students": named,
            "divergence": {
                "dataset": {"disk_path": args.eval},
                "num_tokens": args.held_out_tokens,
                "sequence_length": length,
                "layers": False,
            },
        }
    for name, student in named.items():
        for task in args.needle_tasks:
            told[f"needles-{name}-{task}"] = {"students": {name: student}, "needles": needles_of(args, [task])}
    return {name: {"output_path": str(folder / name), **evaluation} for name, evaluation in told.items()}


def evaluation_of_teacher(folder: Path, args: argparse.Namespace) -> dict[str, Json]:
    teacher = {key: value for key, value in args.teacher_section.items() if key != "kind"}
    needles = needles_of(args, args.needle_tasks)
    return {"needles": {"output_path": str(folder / "needles"), "teacher": teacher, "needles": needles}}


def needles_of(args: argparse.Namespace, tasks: list[str]) -> Json:
    return {
        "tasks": tasks,
        "lengths": args.needle_lengths,
        "depths": args.needle_depths,
        "samples": args.needle_samples,
        "haystack": {"disk_path": args.haystack},
        "batch_size": args.needle_batch,
        "prefill_tokens": args.needle_prefill_tokens,
    }
