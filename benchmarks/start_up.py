"""Seconds to the first training step on a fresh machine, and what is saved by what an earlier one found out.

    python benchmarks/start_up.py                             # on CUDA; writes the JSON
    python benchmarks/start_up.py --device cpu --tokens 128 --shapes tiny --output small.json

fla's kernels are tuned at their first call, per number and size of heads and dtype, and Triton keeps the outcome in
TRITON_CACHE_DIR. Each shape is timed in three new processes: with an empty cache, with the one that the first left, and
with an empty one and the configurations that the package brings for some GPUs and shapes (distillkit/model/tuned). A
process makes a student of two KDA layers, takes a forward and backward pass over packed documents as training does
(float32 masters under bf16 autocast), and then, cast to bf16, prefills and decodes as evaluation does.

`--keep FOLDER` writes down what was tuned, in the files that fla reads; `--from FOLDER` times a process that begins
with such files instead. They serve the same GPU, and heads and dtypes that are the same:

    FLA_CONFIG_DIR=FOLDER distillkit CONFIG.yaml
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
from measuring import RESULTS, in_own_process, provenance
from transformers import ArceeConfig, LlamaConfig, PreTrainedConfig

from distillkit.config import StudentConfig
from distillkit.conversion.convert import student_on_meta
from distillkit.models.decoder import decode
from distillkit.student.network import KDAHybridForCausalLM
from distillkit.student.network.tuned_kernels import folder_of
from distillkit.training.precision import cast_for_saving, cast_for_training


def heads(config: type[PreTrainedConfig], hidden_size: int, query_heads: int, kv_heads: int) -> PreTrainedConfig:
    """Two layers with a model's attention; what else it has does not matter to the kernels."""
    return config(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
    )


SHAPES = {
    "tiny": heads(LlamaConfig, 64, 2, 1),
    "smollm2-135m": heads(LlamaConfig, 576, 9, 3),
    "afm-4.5b": heads(ArceeConfig, 2560, 20, 4),
}


LAUNCH = ("num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override")
"""What a configuration of Triton has beside the kernel's own constants."""
MOST_BLOCKS = 16
"""Of 65,536 heads of tokens, by whose number fla tunes l2norm: those of 116,508 tokens with nine heads."""
STATES = ("empty", "kept", "tuned elsewhere")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "afm-4.5b"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192, help="of a row of packed documents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, help="folder for what was tuned")
    parser.add_argument("--from", dest="kept", type=Path, help="such a folder, to start with")
    parser.add_argument("--states", nargs="+", choices=STATES, help="only these, of those that there are")
    parser.add_argument("--one", choices=list(SHAPES), help="time one shape in this process")
    parser.add_argument("--output", type=Path, default=RESULTS / "start_up.json")
    options = parser.parse_args()
    if options.keep is not None and options.kept is not None:
        parser.error("--keep writes down what is tuned, which --from leaves out: give one of the two")
    if options.one is not None:
        print(json.dumps(first_steps(options.one, options.tokens, torch.device(options.device))))
        if options.keep is not None:
            keep_tuned(options.keep)
        return
    keep = [] if options.keep is None else ["--keep", options.keep.absolute()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            for state in states(options):
                cache = Path(folder) / f"{shape}-{'other' if state == 'tuned elsewhere' else 'own'}"
                os.environ["TRITON_CACHE_DIR"] = str(cache)
                os.environ["FLA_CACHE_MODE"] = "strict" if state == "tuned elsewhere" else "disabled"
                if options.kept is not None:
                    os.environ["FLA_CONFIG_DIR"] = str(options.kept.absolute())
                common = ["--tokens", options.tokens, "--device", options.device]
                timed = in_own_process(__file__, "--one", shape, *common, *(keep if state == "empty" else []))
                rows.append({"shape": shape, "triton_cache": state, **timed})
                result = {
                    "benchmark": "seconds to the first step of a new process, by what Triton's cache holds",
                    "command": " ".join(["python benchmarks/start_up.py", *sys.argv[1:]]),
                    **provenance("flash-linear-attention", "triton"),
                    "rows": rows,
                }
                options.output.write_text(json.dumps(result, indent=2) + "\n")


def states(options: argparse.Namespace) -> list[str]:
    """What Triton's cache may hold, or fla be told of; not the latter where nothing is known of this GPU."""
    if options.kept is not None:
        return ["tuned elsewhere"]
    known = options.device.startswith("cuda") and folder_of(torch.cuda.get_device_name()).is_dir()
    there = STATES if known else STATES[:2]
    return [state for state in there if state in (options.states or STATES)]


def first_steps(shape: str, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of the first and second training step, and of the first answer."""
    student = untrained(SHAPES[shape], device)
    cast_for_training(student, torch.bfloat16)
    input_ids = torch.arange(tokens, device=device).remainder(512).unsqueeze(0)
    position_ids = torch.cat([torch.arange(length, device=device) for length in documents(tokens)]).unsqueeze(0)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            decode(student, input_ids, position_ids)[0].float().square().mean().backward()

    def answer() -> None:
        cast_for_saving(student.eval(), torch.bfloat16)
        student.generate(input_ids[:, : tokens // 2], max_new_tokens=4, do_sample=False, pad_token_id=0)

    names = ("first_step_seconds", "second_step_seconds", "first_answer_seconds")
    return {name: timed(work, device) for name, work in zip(names, (step, step, answer), strict=True)}


def untrained(base_config: PreTrainedConfig, device: torch.device) -> KDAHybridForCausalLM:
    config = student_on_meta(base_config, StudentConfig(layout="kda_only")).config
    with torch.device(device):
        return KDAHybridForCausalLM(config).train()


def documents(tokens: int) -> list[int]:
    """Lengths of the documents in a row: quarters of it, the last one cut in two."""
    quarter = tokens // 4
    return [quarter, quarter, quarter, quarter // 2, tokens - 3 * quarter - quarter // 2]


def timed(work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - start, 2)


def keep_tuned(folder: Path) -> None:
    """What fla's kernels chose in this process, added to the files of a folder: `FLA_CONFIG_DIR`."""
    import triton
    from fla.ops.utils.cache import AutotuneKey, CachedAutotuner

    folder.mkdir(parents=True, exist_ok=True)
    for tuner in [each for each in gc.get_objects() if issubclass(type(each), CachedAutotuner)]:
        if not tuner.cache:
            continue
        path = folder / f"{tuner.kernel_name}.json"
        entries = json.loads(path.read_text())["autotune_entries"] if path.exists() else {}
        blocks = tuner.keys.index("NB") if "NB" in tuner.keys else None
        for key, config in (tuner.cache if blocks is None else for_all_blocks(tuner.cache, blocks)).items():
            entries[AutotuneKey.key_hash(key)] = {
                "autotune_key": AutotuneKey.normalize_autotune_key(key),
                "config": {"kwargs": config.kwargs, **{name: getattr(config, name) for name in LAUNCH}},
            }
        write_configurations(path, tuner.kernel_name, triton.__version__, entries)


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


def write_configurations(path: Path, kernel: str, triton_version: str, entries: dict[str, Any]) -> None:
    """As fla reads them, an entry a line."""
    lines = ",\n".join(f"  {json.dumps(digest)}: {json.dumps(entry)}" for digest, entry in entries.items())
    head = f' "kernel_name": {json.dumps(kernel)},\n "triton_version": {json.dumps(triton_version)},\n'
    path.write_text(f'{{\n{head} "autotune_entries": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    main()
