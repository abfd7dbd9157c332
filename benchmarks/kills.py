"""Killed at random moments and started again, do captures and runs of tiny models end in the files of undisturbed ones?

    python benchmarks/kills.py
    python benchmarks/kills.py --capture-kills 4 --training-kills 4 --output small.json

A capture and a run of two phases (two layers, a tokenizer of bytes, float32 on the CPU) go to their end undisturbed,
then again and again with five SIGKILLs each at moments drawn evenly from their duration. Compared are all files of a
capture; of a run the weights of every phase, the losses of every step, and all results but times.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distillkit.capture.run import capture
from distillkit.runs.writing import sha256
from distillkit.training import distill
from frame import ROOT, Json, Options, option, read_metrics, run

PER_LIFE = 5
"""Kills before a capture or run may go to its end."""
PHASES = ("phases/1-alignment", "phases/2-distillation")
TIMES = ("seconds", "started", "finished", "tokens_per_second", "checksum", "command", "resumed")


@dataclass(kw_only=True)
class KillsOptions(Options):
    capture_kills: int = option(100)
    training_kills: int = option(40)
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


def trained(inputs: Path, output: Path) -> None:
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
        },
        "phases": [{"name": "alignment", **alignment}, {"name": "distillation"}],
        "resume": True,
        "output_path": str(output),
    }
    distill(described, Console(file=StringIO()))


FILES = {"train": "train", "eval": "valid"}


def files_of_capture(folder: Path) -> Json:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def files_of_run(folder: Path) -> Json:
    """Digests of weights, losses by step, and results without times."""
    found: Json = {part: sha256(folder / part / "model.safetensors") for part in (".", *PHASES)}
    for part in PHASES:
        found[f"{part} metrics"] = [timeless(line) for line in read_metrics(folder / part)]
    for part in (".", *PHASES):
        found[f"{part} results"] = timeless(json.loads((folder / part / "results.json").read_text()))
    return found | {"hidden": sorted(path.name for path in folder.rglob(".*") if path.is_file())}


def timeless(content: Json) -> Json:
    """Without what a clock decides, and without the folder."""
    return {
        key: timeless(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in (*TIMES, "phases", "config", "losses", "samples")
    }


def started(work: Callable[[Path, Path], None], inputs: Path, output: Path) -> multiprocessing.Process:
    process = processes.Process(target=work, args=(inputs, output))
    process.start()
    return process


def lives(work: Callable[[Path, Path], None], inputs: Path, folder: Path, kills: int, chance: random.Random) -> Json:
    """How many kills there were, and how many of the lives that they interrupted ended otherwise than undisturbed."""
    compare = files_of_capture if work is captured else files_of_run
    seconds = []
    for name in ("warm", "undisturbed"):  # the first one also starts the fork server
        began = time.monotonic()
        started(work, inputs, folder / name).join()
        seconds.append(time.monotonic() - began)
    expected, done, ended, differing = compare(folder / "undisturbed"), 0, 0, []
    while done < kills:
        output, killed = folder / f"life{ended}", 0
        while killed < PER_LIFE and done < kills:
            process = started(work, inputs, output)
            process.join(chance.uniform(0, seconds[-1]))
            if process.exitcode is not None:  # it came to its end first: the next life
                break
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            killed, done = killed + 1, done + 1
        process = started(work, inputs, output)
        process.join()
        files = compare(output) if process.exitcode == 0 else {"exit code": process.exitcode}
        differing += [sorted(key for key in {*expected, *files} if expected.get(key) != files.get(key))]
        ended += 1
        shutil.rmtree(output)
    found = {"kills": done, "ends": ended, "equal": sum(not each for each in differing)}
    return found | ({"differing": differing} if any(differing) else {})


def measure(options: KillsOptions) -> Iterator[Json]:
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs")
        write_inputs(inputs)
        for name, work, kills in (
            ("captures", captured, options.capture_kills),
            ("runs of two phases", trained, options.training_kills),
        ):
            yield {"what": name, **lives(work, inputs, Path(folder, name.split()[0]), kills, chance)}


# Imports torch once, and forks a clean process from there for each life.
processes = multiprocessing.get_context("forkserver")

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])  # of the fork server
    processes.set_forkserver_preload(["kills"])
    import kills  # as the fork server knows its functions

    run(KillsOptions, kills.measure, "tiny captures and runs, killed at random moments and started again")
