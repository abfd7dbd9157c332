"""The students of the miniature replication, as YAML: what each changes in a recipe of recipes/smollm2/."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from frame import ROOT, Json
from steps import ALIGNMENT, KL

SEED = 42
BEST_ALIGNMENT_SHARE = 5 / 85
"""Of the tokens of `best` in short rows, as in recipes/smollm2/closest.yaml."""

Options = Any
"""The `ReplicationOptions` of benchmarks/replication.py, which imports this file."""


def phase(name: str, tokens: int, losses: list[Json] | None = None, **training: Any) -> Json:
    changes: Json = {} if losses is None else {"loss_functions": losses}
    return {"name": name, "tokens": tokens, **changes, **({"training_args": training} if training else {})}


def long_phase(options: Options, losses: list[Json], learning_rate: float = 1e-4, **changes: Any) -> Json:
    """As many tokens per step in longer rows, at a lower learning rate than the recipe's."""
    batch = max(1, options.batch * options.sequence_length // options.long_sequence_length)
    training = {"per_device_train_batch_size": batch, "learning_rate": learning_rate}
    long = phase("long", options.long_tokens, losses, **training)
    return {**long, "sequence_length": options.long_sequence_length, **changes}


def one_phase(options: Options) -> list[Json]:
    """The recipe of the KDA write-up, then longer rows: every parameter trains, without hidden states."""
    losses = [{"function": "cross_entropy", "weight": 0.5}, {"function": "kl", "weight": 0.5, "temperature": 2.0}]
    return [phase("short", options.tokens), long_phase(options, losses, frozen_res=[])]


def aligned(options: Options) -> list[Json]:
    """Alignment of attention first, out of the budget of the one-phase recipe."""
    alignment = max(1, round(options.alignment_share * options.tokens))
    _, *long = one_phase(options)
    return [phase("alignment", alignment, ALIGNMENT), phase("short", max(1, options.tokens - alignment)), *long]


def radlads(options: Options) -> list[Json]:
    """Alignment, distillation and longer rows (arXiv 2505.03005), out of the same budget as one phase."""
    alignment = max(1, round(options.alignment_share * options.tokens))
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    return [
        phase("alignment", alignment, ALIGNMENT, **schedule),
        phase("short", max(1, options.tokens - alignment), KL, learning_rate=3e-4),
        long_phase(options, KL),
    ]


def best(options: Options) -> list[Json]:
    """recipes/smollm2/closest.yaml: a short alignment, then every parameter by KL and a little of the hidden states."""
    alignment = max(1, round(BEST_ALIGNMENT_SHARE * options.tokens))
    losses = [*KL, {"function": "hs_cosine", "weight": 0.2}]
    return [
        phase("alignment", alignment, ALIGNMENT),
        phase("short", max(1, options.tokens - alignment), losses),
        long_phase(options, KL, learning_rate=3e-4),
    ]


ALL_TRAIN: Json = {"frozen_res": [], "training_args": {"adam_beta2": 0.95}}
VARIANTS: dict[str, tuple[str, Json, Callable[[Options], list[Json]]]] = {
    "hybrid": ("hybrid.yaml", {}, one_phase),
    "front_loaded": ("front_loaded.yaml", {}, one_phase),
    "kda_only": ("kda_only.yaml", {}, one_phase),
    "aligned": ("hybrid.yaml", {}, aligned),
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


def run_of(name: str, folder: Path, options: Options) -> Json:
    """The whole YAML of a variant's run, into `folder`/run; rows of one length are prepared once for all variants."""
    recipe, changes, phases_of = VARIANTS[base(name)]
    phases = [each for each in phases_of(options) if each["name"] != "long" or options.long_tokens]
    for position, each in enumerate(phases):
        length = each.get("sequence_length", options.sequence_length)
        prepared = Path(options.work) / "prepared" / f"{length}-{SEED + position}"
        each["dataset"] = {"seed": SEED + position, "prepared_dataset_path": str(prepared)}
    if options.go_on:
        phases, changes = phases[-1:], {**changes, "student": None, "model": options.go_on}
    return {
        "extends": str(ROOT / "recipes" / "smollm2" / recipe),
        "project_name": f"replication-{name.replace('_', '-')}",
        "output_path": str(folder / "run"),
        "teacher": {"kind": "hf", **options.teacher_model},
        "sequence_length": options.sequence_length,
        "dataset": {"train_dataset": {"disk_path": options.data}, "eval_dataset": {"disk_path": options.eval}},
        **changes,
        "training_args": {
            "per_device_train_batch_size": options.batch,
            "logging_steps": options.logging_steps,
            "eval_strategy": "steps",
            "eval_steps": 0.1,  # of a phase's steps: the curve of the divergence
            "save_steps": 0.25,
            "save_total_limit": 1,
            **changes.get("training_args", {}),
        },
        "evaluation": {"num_tokens": options.held_out_tokens},
        "phases": phases,
    }


def evaluations_of(folder: Path, students: dict[str, Path], options: Options) -> dict[str, Json]:
    """The YAML of each evaluation by file: divergences in rows of either length, and needles."""
    named = {name: {"path": str(path), "kwargs": {"dtype": options.dtype}} for name, path in students.items()}
    evaluations: dict[str, Json] = {}
    for length in (options.sequence_length, options.long_sequence_length):
        divergence: Json = {"num_tokens": options.held_out_tokens, "sequence_length": length, "layers": False}
        divergence["dataset"] = {"disk_path": options.eval}
        models = {"teacher": options.teacher_model, "students": named}
        evaluations[f"divergence-{length}"] = {**models, "divergence": divergence}
    evaluations["needles"] = {"students": named, "needles": needles(options)}
    return {f"{name}.yaml": {"output_path": str(folder / name), **each} for name, each in evaluations.items()}


def evaluation_of_teacher(folder: Path, options: Options) -> dict[str, Json]:
    evaluation = {"teacher": options.teacher_model, "needles": needles(options)}
    return {"needles.yaml": {"output_path": str(folder / "needles"), **evaluation}}


def needles(options: Options) -> Json:
    return {
        "tasks": options.needle_tasks,
        "lengths": options.needle_lengths,
        "depths": options.needle_depths,
        "samples": options.needle_samples,
        "haystack": {"disk_path": options.haystack},
        "batch_size": options.needle_batch,
        "prefill_tokens": options.needle_prefill_tokens,
    }
