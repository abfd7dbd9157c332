"""Result files as `distillkit evaluate` and runs write them, with invented numbers."""

import json
import math
from pathlib import Path

HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 7 + ["linear_attention"] * 2
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
TASKS = ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue"]
PROVENANCE = {
    "versions": {"python": "3.12.3", "distillkit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "364fbb9c0ffee",
    "machine": {"system": "Linux x86_64", "device": "NVIDIA H100 80GB HBM3"},
}


def model(role="student", path="runs/hybrid", layers=None, trained_length=2048):
    return {
        "role": role,
        "path": path,
        "parameters": 134515008 if role == "teacher" else 148387342,
        "model_type": "llama" if role == "teacher" else "kda_hybrid",
        "layers": layers,
        "trained_length": trained_length,
    }


def divergence(kl=0.6336, agreement=0.6189):
    edges = [0, 128, 512, 1024, 2048, 4096]
    return {
        "kl": kl,
        "reverse_kl": 1.31 * kl,
        "jsd": 0.19 * kl,
        "agreement": agreement,
        "agreement_top5": 0.94,
        "teacher_perplexity": 16.417,
        "student_perplexity": 16.417 * math.exp(0.48 * kl),
        "teacher_ece": 0.012,
        "student_ece": 0.021,
        "tokens": 98304,
        "standard_errors": {"kl": 0.0042, "agreement": 0.0016},
        "positions": [
            {
                "from": start,
                "to": stop,
                "tokens": 16384,
                "kl": kl * (0.7 + 0.08 * index**1.5),
                "agreement": agreement - 0.012 * index,
                "student_perplexity": 33 - 4 * index * (1 - 0.09 * index),
                "teacher_perplexity": 25 - 3.4 * index * (1 - 0.05 * index),
            }
            for index, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))
        ],
        "layers": [{"layer": layer, "cosine": 0.999 - 0.0006 * kl * layer**1.5} for layer in range(30)],
    }


def needles(skill, trained=2048):
    """Rows of every task; skill falls beyond the trained length and in the middle of the text."""

    def row(task, length, depth):
        beyond = max(0.0, math.log2(length / trained))
        share = skill - 0.22 * beyond - 0.35 * (depth * (1 - depth)) * math.log2(length / 256) / 4 - 0.05 * task
        return {"length": length, "depth": depth, "correct": round(8 * min(max(share, 0), 1), 2), "total": 8}

    return {
        name: [
            {**row(task, length, depth), "prompt_tokens_mean": length - 3.5} for length in LENGTHS for depth in DEPTHS
        ]
        for task, name in enumerate(TASKS)
    }


def long_context(skill, student):
    """Documents of 16k tokens, and last words at up to 4k tokens."""
    edges = [0, 1024, 2048, 4096, 8192, 16384]
    compared = {"kl": 1 - skill, "agreement": skill} if student else {}
    return {
        "documents": {
            "documents": 8,
            "tokens": 8 * 16383,
            "positions": [
                {
                    "from": start,
                    "to": stop,
                    "tokens": 8 * (stop - start) - (8 if start == 0 else 0),
                    "perplexity": 15 / skill - index,
                    **compared,
                    "standard_errors": dict.fromkeys(("perplexity", *compared), 0.01),
                }
                for index, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))
            ],
        },
        "last_word": [
            {
                "distance": distance,
                "passages": 200,
                "prompt_tokens_mean": 80.0 + distance,
                "accuracy": skill / (2 + index),
                "accuracy_without": 0.01,
                "log_probability": -4.0 - index,
                "log_probability_without": -10.0,
                "gain": 6.0 - index,
                "standard_errors": {"accuracy": 0.03, "gain": 0.2},
            }
            for index, distance in enumerate((0, 256, 1024, 4096))
        ],
    }


def speed(full_layers, fast):
    return [
        {
            "context": context,
            "prefill_tokens_per_second": fast * 90000 / (1 + full_layers * context / 4e5),
            "time_to_first_token_seconds": 0.02 + context * (1 + full_layers * context / 4e5) / (fast * 90000),
            "decode_tokens_per_second": fast * 62 / (1 + full_layers * context / 1.2e6),
            "weights_bytes": 269 * 2**20,
            "kv_cache_bytes": full_layers * context * 768,
            "state_bytes": 0 if full_layers == 30 else (30 - full_layers) * 9 * 64 * 64 * 4,
            "peak_bytes": 400 * 2**20 + full_layers * context * 1500,
        }
        for context in (256, 1024, 4096, 16384, 65536)
    ]


def scored(acc, acc_norm, samples=1172):
    def metric(value):
        return {"value": value, "standard_error": math.sqrt(value * (1 - value) / samples)}

    return {
        "metrics": {"acc,none": metric(acc), "acc_norm,none": metric(acc_norm)},
        "samples": samples,
        "version": 1.0,
        "higher_is_better": {"acc": True, "acc_norm": True},
    }


def evaluation(students=("hybrid", "kda-only"), **changes):
    """One evaluation: a teacher, students, most suites."""
    worse = {name: index for index, name in enumerate(students)}
    content = {
        "kind": "distillkit-evaluation",
        "format": 1,
        "started": "2026-11-22T03:00:00+0000",
        "finished": "2026-11-22T03:41:10+0000",
        "command": "distillkit evaluate evaluation.yaml",
        **PROVENANCE,
        "config": {
            "output_path": "runs/evaluation",
            "needles": {"seed": 7, "samples": 8},
            "benchmarks": {"seed": 1234},
        },
        "models": {
            "SmolLM2-135M": model("teacher", "inputs/teacher", None, 8192),
            **{
                name: model(path=f"runs/{name}", layers=["linear_attention"] * 30 if worse[name] % 2 else HYBRID)
                for name in students
            },
        },
        "divergence": {name: divergence(0.6336 * 1.7 ** worse[name], 0.6189 - 0.08 * worse[name]) for name in students},
        "benchmarks": {
            "SmolLM2-135M": {"arc_easy": scored(0.584, 0.562), "hellaswag": scored(0.331, 0.409, 10042)},
            **{
                name: {
                    "arc_easy": scored(0.551 - 0.02 * worse[name], 0.538),
                    "hellaswag": scored(0.335, 0.391 - 0.01 * worse[name], 10042),
                }
                for name in students
            },
        },
        "needles": {
            "SmolLM2-135M": needles(1.05, 8192),
            **{name: needles(0.95 - 0.25 * worse[name]) for name in students},
        },
        "long_context": {
            "SmolLM2-135M": long_context(1.0, student=False),
            **{name: long_context(0.9 - 0.2 * worse[name], student=True) for name in students},
        },
        "speed": {
            "SmolLM2-135M": speed(30, 1.0),
            **{name: speed(0 if worse[name] % 2 else 7, 0.92 - 0.05 * worse[name]) for name in students},
        },
        "failures": [],
    }
    return {**content, **changes}


def loss_functions(**weights):
    return [{"function": name, "weight": weight, "temperature": None} for name, weight in weights.items()]


def run_config(**changes):
    return {
        "project_name": "smollm2-hybrid",
        "model": None,
        "student": {"layout": "hybrid"},
        "teacher": {
            "kind": "hf",
            "path": "/srv/someone/secret/SmolLM2-135M-Instruct",
            "kwargs": {"dtype": "bfloat16"},
        },
        "output_path": "/srv/someone/runs/hybrid",
        "sequence_length": 2048,
        "dataset": {"train_dataset": {"disk_path": "/srv/someone/data/train.parquet"}, "seed": 42},
        "loss_functions": loss_functions(kl=0.5, hs_cosine=0.5),
        "layer_mapping": "all",
        "training_args": {"learning_rate": 0.001, "max_steps": 60},
        **changes,
    }


def measured(kl, agreement, perplexity):
    return {
        "kl": kl,
        "agreement": agreement,
        "teacher_perplexity": 16.4,
        "student_perplexity": perplexity,
        "tokens": 98304,
    }


def results(**changes):
    return {
        "divergence": {"before": measured(3.5695, 0.1803, 597.39), "after": measured(0.6336, 0.6189, 22.3)},
        "training": {"step": 60, "tokens": 1966080, "seconds": 34.2},
        "losses": {"loss": 0.21, "kl": 0.39, "hs_cosine": 0.05},
        "parameters": {"trained": 40412943, "frozen": 107974400},
        "samples": [{"prompt": "The theory of relativity states that", "continuation": " space and time are one."}],
        "seeds": {"training": 42, "data": 42, "samples": 0},
        **PROVENANCE,
        "config": run_config(),
        **changes,
    }


def metrics(steps=60, start=3.5, end=0.6, tokens_per_step=32768, names=("kl", "hs_cosine")):
    lines = []
    for step in range(1, steps + 1):
        kl = end + (start - end) * math.exp(-step / (steps / 6)) + 0.04 * math.sin(1.7 * step)
        line = {"step": step, "loss": 0.5 * kl, "learning_rate": 1e-3 * (1 - step / steps), "grad_norm": 1 + kl}
        line |= {name: kl * (1 if name == "kl" else 0.1) for name in names}
        line |= {"tokens": step * tokens_per_step, "tokens_per_second": 58000.0, "seconds": 0.57 * step}
        lines.append(line)
    return lines


def write_run(folder, content, lines):
    """A run's folder; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"started": "2026-11-22T02:00:00+0000", "config": content["config"]}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_phases(folder):
    """A run with two phases; returns its folder."""
    folder = Path(folder)
    first = run_config(sequence_length=512, loss_functions=loss_functions(attn_cosine=1.0))
    second = run_config(training_args={"learning_rate": 0.0003})
    parts = [
        (
            "1-alignment",
            first,
            measured(3.57, 0.18, 597.4),
            measured(1.4, 0.42, 61.0),
            metrics(30, 5, 2, names=("attn_cosine",)),
        ),
        ("2-distillation", second, measured(1.4, 0.42, 61.0), measured(0.63, 0.62, 22.3), metrics(60, 1.4, 0.6)),
    ]
    phases = []
    for name, config, before, after, lines in parts:
        training = {"step": len(lines), "tokens": lines[-1]["tokens"], "seconds": lines[-1]["seconds"]}
        content = results(config=config, training=training, divergence={"before": before, "after": after})
        write_run(folder / "phases" / name, content, lines)
        names = [loss["function"] for loss in config["loss_functions"]]
        phases.append(
            {
                "name": name.split("-")[1],
                "folder": f"phases/{name}",
                "tokens": training["tokens"],
                "steps": training["step"],
                "seconds": training["seconds"],
                "sequence_length": config["sequence_length"],
                "losses": {},
                "loss_functions": names,
                "divergence": {"before": before, "after": after},
            }
        )
    whole = results(
        phases=phases,
        config=run_config(project_name="two-phases", phases=[{"name": "alignment"}, {"name": "distillation"}]),
        divergence={"before": parts[0][2], "after": parts[1][3]},
        training={"step": 90, "tokens": sum(each["tokens"] for each in phases), "seconds": 51.3},
    )
    write_run(folder, whole, [])
    (folder / "metrics.jsonl").unlink()
    return folder


def write_evaluation(folder, content=None):
    """An evaluation's folder; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(evaluation() if content is None else content))
    return folder
