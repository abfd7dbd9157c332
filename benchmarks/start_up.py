"""Seconds to the first training step on a fresh machine, and what is saved by what an earlier one found out.

    python benchmarks/start_up.py                             # on CUDA
    python benchmarks/start_up.py --device cpu --tokens 128 --shapes tiny --output small.json

fla's kernels are tuned at their first call, per number and size of heads and dtype, and Triton keeps the outcome in
TRITON_CACHE_DIR. Each shape is timed in three new processes: with an empty cache, with the one that the first left, and
with an empty one and the configurations that the package brings for some GPUs and shapes
(distillkit/student/network/tuned). A process makes a student of two KDA layers, takes a forward and backward pass over
packed documents as training does (float32 masters under bf16 autocast), and then, cast to bf16, prefills and decodes as
evaluation does.

`--keep FOLDER` writes down what was tuned, in the files that fla reads: FLA_CONFIG_DIR=FOLDER distillkit CONFIG.yaml.
They serve the same GPU, heads and dtypes. With FLA_CONFIG_DIR, `--states "tuned elsewhere"` times a process that begins
with such files.
"""

import gc
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from distillkit.config import StudentConfig
from distillkit.conversion.convert import student_on_meta
from distillkit.models.decoder import decode
from distillkit.student.network import KDAHybridForCausalLM
from distillkit.student.network.tuned_kernels import folder_of
from distillkit.training.precision import cast_for_saving, cast_for_training
from frame import DEVICE, Json, Options, in_own_process, option, run, seconds_of
from steps import SHAPES

LAUNCH = ("num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override")
"""What a configuration of Triton has beside the kernel's own constants."""
MOST_BLOCKS = 16
"""Of 65,536 heads of tokens, by whose number fla tunes l2norm: those of 116,508 tokens with nine heads."""
STATES = ["empty", "kept", "tuned elsewhere"]
"""What Triton's cache contains at first; `tuned elsewhere`: nothing, but fla reads configurations."""


@dataclass(kw_only=True)
class StartUpOptions(Options):
    shapes: list[str] = option(["smollm2-135m", "afm-4.5b"], choices=[*SHAPES])
    tokens: int = option(8192, "of a row of packed documents")
    device: str = option(DEVICE.type)
    keep: Path | None = option(None, "folder for what was tuned")
    states: list[str] = option(STATES, "only these, of those that there are", choices=STATES)

    def __post_init__(self) -> None:
        brought = self.device.startswith("cuda") and folder_of(torch.cuda.get_device_name()).is_dir()
        if not brought and "FLA_CONFIG_DIR" not in os.environ:  # nothing is known of this device
            self.states = [state for state in self.states if state != STATES[2]]


def measure(options: StartUpOptions) -> Iterator[Json]:
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            for state in options.states:
                elsewhere = state == "tuned elsewhere"
                os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / f"{shape}-{'other' if elsewhere else 'own'}")
                os.environ["FLA_CACHE_MODE"] = "strict" if elsewhere else "disabled"
                keep = options.keep if state == "empty" else None
                seconds = in_own_process(first_steps, shape, options.tokens, options.device, keep)
                yield {"shape": shape, "triton_cache": state, **seconds}


def first_steps(shape: str, tokens: int, device_name: str, keep: Path | None) -> dict[str, float]:
    """Seconds of the first and second training step, and of the first answer."""
    device = torch.device(device_name)
    student = untrained(SHAPES[shape], device)
    cast_for_training(student, torch.bfloat16)
    input_ids = torch.arange(tokens, device=device).remainder(512).unsqueeze(0)
    quarter = tokens // 4
    lengths = (quarter, quarter, quarter, quarter // 2, tokens - 3 * quarter - quarter // 2)
    position_ids = torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            decode(student, input_ids, position_ids)[0].float().square().mean().backward()

    def answer() -> None:
        cast_for_saving(student.eval(), torch.bfloat16)
        student.generate(input_ids[:, : tokens // 2], max_new_tokens=4, do_sample=False, pad_token_id=0)

    work = {"first_step": step, "second_step": step, "first_answer": answer}
    seconds = {f"{name}_seconds": round(seconds_of(each)[0], 2) for name, each in work.items()}
    if keep is not None:
        keep_tuned(keep)
    return seconds


def untrained(shape: Json, device: torch.device) -> KDAHybridForCausalLM:
    """Two layers with a model's attention; what else it has does not matter to the kernels."""
    small = {"num_hidden_layers": 2, "intermediate_size": 2 * shape["hidden_size"], "vocab_size": 512}
    config = student_on_meta(AutoConfig.for_model(**{**shape, **small}), StudentConfig(layout="kda_only")).config
    with torch.device(device):
        return KDAHybridForCausalLM(config).train()


def keep_tuned(folder: Path) -> None:
    """Add what fla's kernels chose in this process to the files of a folder: `FLA_CONFIG_DIR`."""
    import triton
    from fla.ops.utils.cache import AutotuneKey, CachedAutotuner

    folder.mkdir(parents=True, exist_ok=True)
    for tuner in [each for each in gc.get_objects() if issubclass(type(each), CachedAutotuner) and each.cache]:
        path = folder / f"{tuner.kernel_name}.json"
        entries = json.loads(path.read_text())["autotune_entries"] if path.exists() else {}
        chosen = for_all_blocks(tuner.cache, tuner.keys.index("NB")) if "NB" in tuner.keys else tuner.cache
        for key, config in chosen.items():
            entries[AutotuneKey.key_hash(key)] = {
                "autotune_key": AutotuneKey.normalize_autotune_key(key),
                "config": {"kwargs": config.kwargs, **{name: getattr(config, name) for name in LAUNCH}},
            }
        lines = ",\n".join(f"  {json.dumps(digest)}: {json.dumps(entry)}" for digest, entry in entries.items())
        head = f' "kernel_name": "{tuner.kernel_name}",\n "triton_version": "{triton.__version__}",\n'
        path.write_text(f'{{\n{head} "autotune_entries": {{\n{lines}\n }}\n}}\n')


def for_all_blocks(chosen: dict[tuple, Any], place: int) -> dict[tuple, Any]:
    """For any number of blocks of tokens, which stands at `place` of a key, what the next smaller number chose."""
    found: dict[tuple, Any] = {}
    for key, config in sorted(chosen.items(), key=lambda item: item[0][place]):
        for blocks in range(1, MOST_BLOCKS + 1):
            named = (*key[:place], blocks, *key[place + 1 :])
            if blocks >= key[place]:
                found[named] = config
            else:
                found.setdefault(named, config)
    return found


if __name__ == "__main__":
    title = "seconds to the first step of a new process, by what Triton's cache holds"
    run(StartUpOptions, measure, title, "flash-linear-attention", "triton")
