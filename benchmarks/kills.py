"""Killed at random moments and started again, do captures and runs of tiny models end in the files of undisturbed ones?

    python benchmarks/kills.py
    python benchmarks/kills.py --capture-kills 4 --training-kills 4 --output small.json
    python benchmarks/kills.py --processes 4 --training-kills 20 --output kills_divided.json

A capture and a run of two phases (two layers, a tokenizer of bytes, float32 on the CPU) go to their end undisturbed,
then again and again with five SIGKILLs each at moments drawn evenly from their duration. Compared are all files of a
capture; of a run the weights of every phase, the losses of every step, and all results but times.

With `--processes` there is instead a run of so many processes, over which models are divided, and which write their
checkpoints in the background. All are killed at once; each time it goes on, on a number of processes that chance draws
from the divisors of that number, at the end also on one. Weights may differ by 1e-5, other numbers by a thousandth.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distillkit.capture.run import capture
from distillkit.runs.writing import sha256
from distillkit.training import distill
from frame import ROOT, Json, Options, option, read_metrics, run

PER_LIFE = 5
"""Kills before a capture or run may go to its end."""
PHASES = ("phases/1-alignment", "phases/2-distillation")
TIMES = ("clock", "seconds", "started", "finished", "tokens_per_second", "checksum", "command", "resumed")
DIVIDED = ("processes", "epoch")
"""What the number of processes decides: `epoch` counts the micro-batches of one."""

Work = Callable[[Path, Path], None]
"""Is given the folders of inputs and output."""


@dataclass(kw_only=True)
class KillsOptions(Options):
    capture_kills: int = option(100)
    training_kills: int = option(40)
    processes: int = option(1, "of a run that is divided over them")
    seed: int = option(0, "of the moments")


def write_inputs(folder: Path) -> None:
    """A teacher of two layers, and text."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2, **heads}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **shape)).save_pretrained(folder / "teacher")
    for name, key in (("train", "assignment"), ("valid", "class")):
        rows = [topics[key][start : start + 200] for start in range(0, 6000, 200)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def captured(inputs: Path, output: Path) -> None:
    codec = {"d": 259, "k": 16, "exact_k": 4, "polynomial_terms": [0, 1, "sqrt"]}
    described = {
        "teacher": {"path": str(inputs / "teacher")},
        "dataset": {"train_dataset": {"disk_path": str(inputs / "train.jsonl")}},
        "sequence_length": 64,
        "compression": {"logprob_compressor": codec},
        "rows_per_shard": 4,
        "output_path": str(output),
    }
    capture(described, console=Console(file=StringIO()))


def trained(inputs: Path, output: Path, training: Json | None = None, **changes: Any) -> None:
    alignment = {"loss_functions": [{"function": "attn_mse", "weight": 1.0}], "frozen_res": ["mlp", "embed_tokens"]}
    described = {
        "teacher": {"path": str(inputs / "teacher")},
        "student": {"full_attention_layers": [1]},
        "dataset": {f"{name}_dataset": {"disk_path": str(inputs / f"{file}.jsonl")} for name, file in FILES.items()},
        "sequence_length": 64,
        "evaluation": {"num_tokens": 200},
        "training_args": {
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_steps": 12,
            "logging_steps": 1,
            "save_steps": 3,
            "save_total_limit": 1,
            "use_cpu": True,
            **(training or {}),
        },
        "phases": [{"name": "alignment", **alignment}, {"name": "distillation"}],
        "resume": True,
        "output_path": str(output),
        **changes,
    }
    distill(described, Console(file=StringIO()))


def divided(inputs: Path, output: Path, rows: int) -> None:
    """The same run with so many rows in a step, on as many processes as there are."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = {"parallel": {"async_checkpoints": True}} if number > 1 else {}
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows // number}
    trained(inputs, output, training, **parallel)


FILES = {"train": "train", "eval": "valid"}


def files_of_capture(folder: Path) -> Json:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def files_of_run(folder: Path) -> Json:
    """Weights, losses by step, and results without times."""
    found: Json = {part: load_file(folder / part / "model.safetensors") for part in (".", *PHASES)}
    for part in PHASES:
        found[f"{part} metrics"] = [timeless(line) for line in read_metrics(folder / part)]
    for part in (".", *PHASES):
        found[f"{part} results"] = timeless(json.loads((folder / part / "results.json").read_text()))
    hidden = sorted(path.name for path in folder.rglob(".*") if path.is_file() and path.name != ".metadata")
    return found | {"hidden": hidden}  # but for that of a divided optimizer


def timeless(content: Json) -> Json:
    """Without what a clock decides, or the number of processes, and without the folder."""
    return {
        key: timeless(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in (*TIMES, *DIVIDED, "phases", "config", "losses", "samples")
    }


def equal(ours: Any, theirs: Any, *, nearly: bool) -> bool:
    """To the last bit, or nearly so: as sums in another order are."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key], nearly=nearly) for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(partial(equal, nearly=nearly), ours, theirs))
    if isinstance(ours, torch.Tensor):
        return torch.allclose(ours, theirs, rtol=0, atol=1e-5 if nearly else 0)
    if nearly and isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-6)
    return bool(ours == theirs)


def started(work: Work, inputs: Path, output: Path, number: int = 1) -> list[multiprocessing.Process]:
    """So many processes at one work, which know of each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    forks = [
        processes.Process(target=as_one_of, args=(environment if number > 1 else {}, work, inputs, output))
        for environment in environments
    ]
    for fork in forks:
        fork.start()
    return forks


def as_one_of(environment: dict[str, str], work: Work, inputs: Path, output: Path) -> None:
    os.environ |= environment
    work(inputs, output)


def ended(forks: list[multiprocessing.Process]) -> list[int | None]:
    """Exit codes of processes that end by themselves."""
    for fork in forks:
        fork.join()
    return [fork.exitcode for fork in forks]


def lives(work: Work, inputs: Path, folder: Path, kills: int, chance: random.Random, most: int = 1) -> Json:
    """How many kills there were, and how many of the lives that they interrupted ended otherwise than undisturbed.

    most: the number of processes, undisturbed.
    """
    compare = files_of_capture if work is captured else files_of_run
    divisors = [number for number in range(1, most + 1) if most % number == 0]
    seconds = []
    for name in ("warm", "undisturbed"):  # the first one also starts the fork server
        began = time.monotonic()
        ended(started(work, inputs, folder / name, most))
        seconds.append(time.monotonic() - began)
    expected, done, ends, differing = compare(folder / "undisturbed"), 0, 0, []
    while done < kills:
        output, killed = folder / f"life{ends}", 0
        while killed < PER_LIFE and done < kills:
            # What one process has written without the others they cannot go on with.
            forks = started(work, inputs, output, chance.choice(divisors[1:] or [1]))
            forks[0].join(chance.uniform(0, seconds[-1]))
            if forks[0].exitcode is not None:  # it came to its end first: the next life
                ended(forks)
                break
            for fork in forks:
                fork.kill()
            ended(forks)
            killed, done = killed + 1, done + 1
        codes = ended(started(work, inputs, output, chance.choice(divisors)))
        files = {"exit codes": codes} if any(codes) else compare(output)
        differing += [
            sorted(key for key in {*expected, *files} if not equal(files.get(key), expected.get(key), nearly=most > 1))
        ]
        ends += 1
        shutil.rmtree(output)
    found = {"kills": done, "ends": ends, "equal": sum(not each for each in differing)}
    return found | ({"differing": differing} if any(differing) else {})


def measure(options: KillsOptions) -> Iterator[Json]:
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs")
        write_inputs(inputs)
        most, runs = options.processes, Path(folder, "runs")
        if most > 1:
            work = partial(divided, rows=most)
            found = lives(work, inputs, runs, options.training_kills, chance, most)
            yield {"what": f"runs of two phases, divided over {most} processes", **found}
            return
        yield {"what": "captures", **lives(captured, inputs, Path(folder, "captures"), options.capture_kills, chance)}
        yield {"what": "runs of two phases", **lives(trained, inputs, runs, options.training_kills, chance)}


# Imports torch once, and forks a clean process from there for each life.
processes = multiprocessing.get_context("forkserver")

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])  # of the fork server
    processes.set_forkserver_preload(["kills"])
    import kills  # as the fork server knows its functions

    run(KillsOptions, kills.measure, "tiny captures and runs, killed at random moments and started again")
