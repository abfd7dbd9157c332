"""A student in vLLM: does it write what it writes in transformers, how fast, and how many sequences at a time?

    python benchmarks/serving.py --steps parity serve --teacher SmolLM2-135M-Instruct.Q4_1.gguf \\
        --hybrid FOLDER --kda_only FOLDER --output parity.json
    python benchmarks/serving.py --steps throughput --shapes afm-4.5b

`parity` compares tokens and log-probabilities of students in their folders, or of freshly converted ones; both engines
also with the same weights in float32, for rounding moves students that are hardly trained very far. `serve` starts
`vllm serve` and asks it over HTTP. `throughput` writes behind contexts that nobody read (see `read_context`), at random
weights, with one sequence and with as many as fit. Each measurement has a process and a time limit of its own, so that
one which fails costs its row only.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from distillkit.config import StudentConfig
from distillkit.conversion import build_student
from distillkit.conversion.layouts import layer_mixers
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.student.network import KDAHybridConfig
from distillkit.training.precision import cast_for_training
from frame import DEVICE, GIB, MIB, ROOT, Json, Options, option, run

SHAPES = {"afm-4.5b": ROOT / "tests/shapes/afm-4.5b/config.json"}
"""Configurations of teachers."""
STEPS = ["parity", "serve", "throughput"]
MODELS = ["teacher", "kda_only", "hybrid"]
MODES = ["compiled", "graphs", "eager"]
PROMPTS, WRITTEN = 20, 64
"""Of the comparison with transformers."""
DECODED, SKIPPED = 64, 8
"""Tokens that each sequence writes, and those of them before the clock starts."""
VOCABULARY = 512
"""Tokens that every model has."""
GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536]
"""Batches that vLLM records as CUDA graphs; others are filled up to the next."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRITON_CACHE_AUTOTUNING": "1",  # what one process measures, the next one knows
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # neither of these two is installed with it
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # it knows no states, so the teacher is measured without it, too
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(kw_only=True)
class ServingOptions(Options):
    steps: list[str] = option(["throughput"], choices=STEPS)
    models: list[str] = option(MODELS, choices=MODELS)
    teacher: str | None = option(None, "for parity and serve: a folder or a .gguf file")
    hybrid: Path | None = option(None, "for parity: a trained student's folder; without, a freshly converted one")
    kda_only: Path | None = option(None, "likewise")
    dtypes: list[str] = option(["bfloat16", "float32"], "of the comparison")
    shapes: str = option("afm-4.5b", "of throughput: one of those named, or a teacher's config.json")
    contexts: list[int] = option([1024, 8192, 32768])
    most_sequences: int = option(
        1024, "at a time, where more would fit: vLLM allocates states of so many while it starts"
    )
    tensor_parallel_size: int = option(1)
    variants: int = option(1, "of vLLM's prefill kernels that Triton may choose from; 0 for all, which takes minutes")
    mode: str = option(
        "compiled", "of vLLM: compiled, graphs (of decoding, not compiled: a faster start) or eager", choices=MODES
    )
    seconds: int = option(240, "limit for each process")
    job: str | None = option(None, "one measurement, in this process")

    def __post_init__(self) -> None:
        if self.teacher is None and {"parity", "serve"} & {*self.steps}:
            raise ValueError("--steps parity and serve need --teacher")


def jobs(options: ServingOptions) -> Iterator[Json]:
    """What to measure, most important first."""
    students = [model for model in options.models if model != "teacher"]
    for step in sorted(options.steps, key=STEPS.index):
        if step == "parity":
            yield from ({"step": step, "model": model, "dtype": x} for x in options.dtypes for model in students)
        elif step == "serve":
            yield {"step": step, "model": students[-1]}
        else:
            yield from ({"step": step, "model": model} for model in options.models)


def measure(options: ServingOptions) -> Iterator[Json]:
    for job in jobs(options):
        start = time.perf_counter()
        error = None
        for line in in_limited_process([sys.executable, *sys.argv, "--job", json.dumps(job)], options.seconds):
            if line.startswith("ROW "):
                yield {**job, **json.loads(line.removeprefix("ROW "))}
            elif line.startswith("FAILED "):
                error = line.removeprefix("FAILED ").strip()
            else:
                print(line, end="", file=sys.stderr, flush=True)
        print(f"{job}: {time.perf_counter() - start:.0f} s in all", file=sys.stderr, flush=True)
        if error is not None:
            yield {**job, "error": error}


def in_limited_process(command: list[str], seconds: int) -> Iterator[str]:
    """Lines that it prints; after its end, `FAILED …` if it failed or was stopped at the limit."""
    environment = {**ENVIRONMENT, **os.environ, "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(seconds)
    last = ""
    try:
        for line in process.stdout:
            last = line if "Error" in line or (line.strip() and "Error" not in last) else last
            yield line
        code = process.wait()
    finally:
        signal.alarm(0)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if code == -signal.SIGKILL:
        yield f"FAILED stopped after {seconds} s; last line: {last}"
    elif code != 0:
        yield f"FAILED {last}"


def work(options: ServingOptions) -> None:
    """One job."""
    job = json.loads(str(options.job))
    steps = {"parity": parity, "serve": serve, "throughput": throughput}
    with tempfile.TemporaryDirectory() as folder:
        for row in steps[job["step"]](options, job, Path(folder)):
            print("ROW", json.dumps(row), flush=True)


def engine(options: ServingOptions, folder: Path, **arguments: Any) -> Any:
    """vLLM's `LLM`, without what is not measured."""
    from vllm import LLM

    if options.variants:
        limit_variants(options.variants)
    compilation = arguments.pop("compilation_config", {})
    if options.mode == "graphs":
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    arguments = {"attention_backend": "FLASH_ATTN", "enforce_eager": options.mode == "eager", **arguments}
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        seed=0,
        tensor_parallel_size=options.tensor_parallel_size,
        compilation_config=compilation,
        **arguments,
    )


def limit_variants(number: int) -> None:
    """The first ones of each kernel: to compile and to time all of them takes minutes. Decoding has no such kernels."""
    import fla.ops.kda  # noqa: F401
    import vllm.model_executor.layers.fla.ops.kda  # noqa: F401

    for name, module in [*sys.modules.items()]:
        if name.startswith(("fla.", "vllm.model_executor.layers.fla.")):
            for kernel in [*vars(module).values()]:
                while hasattr(kernel, "fn") and hasattr(kernel, "run"):
                    if getattr(kernel, "configs", None):
                        kernel.configs = kernel.configs[:number]
                    kernel = kernel.fn


def sampling(tokens: int, **others: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **others)


# --- parity


def parity(options: ServingOptions, job: Json, folder: Path) -> Iterator[Json]:
    student = student_of(options, job["model"])
    cast_for_training(student, getattr(torch, job["dtype"]))
    student.save_pretrained(folder)
    llm = engine(
        options,
        folder,
        **numbers(job["dtype"]),
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=512,  # so that the longer prompts are read in parts
        gpu_memory_utilization=0.4,
    )
    yield compared(student, llm, prompts_of(str(options.teacher)), WRITTEN)


def numbers(dtype: str) -> Json:
    """Of the engine: FlashAttention knows no float32."""
    return {"dtype": dtype, "attention_backend": "TRITON_ATTN" if dtype == "float32" else "FLASH_ATTN"}


def student_of(options: ServingOptions, layout: str) -> PreTrainedModel:
    """In float32."""
    folder = {"hybrid": options.hybrid, "kda_only": options.kda_only}[layout]
    if folder is not None:
        student = load_model(str(folder), key="student", dtype="float32").to(DEVICE)
    else:
        teacher = load_model(str(options.teacher), key="teacher", dtype="float32").to(DEVICE)
        student = build_student(teacher, StudentConfig.parse({"layout": layout}))
    return student.requires_grad_(False).eval()


def prompts_of(teacher: str) -> list[list[int]]:
    """Of 16 to 1,000 tokens, from the language reference that comes with Python."""
    from pydoc_data import topics

    ids = load_tokenizer(teacher)("\n\n".join(topics.topics[name] for name in sorted(topics.topics)))["input_ids"]
    lengths = [round(16 * (1000 / 16) ** (place / (PROMPTS - 1))) for place in range(PROMPTS)]
    apart = len(ids) // PROMPTS
    return [ids[place * apart :][:length] for place, length in enumerate(lengths)]


@torch.no_grad()
def compared(student: PreTrainedModel, llm: Any, prompts: list[list[int]], written: int) -> Json:
    """Tokens and log-probabilities of vLLM's beside those of transformers, from the same weights on the same device."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling(written, prompt_logprobs=1), use_tqdm=False
    )
    dtype = student.dtype
    exact = copy.deepcopy(student).float()
    equal, gaps, served, own, true, largest = 0, [0.0], [], [], [], 0.0
    for prompt, answer, output in zip(prompts, written_by(student, prompts, written), outputs, strict=True):
        theirs = [*output.outputs[0].token_ids]
        logits = student(torch.tensor([prompt + answer], device=DEVICE)).logits[0].float()
        equal += answer == theirs
        if answer != theirs:
            place = next(i for i, both in enumerate(zip(answer, theirs, strict=True)) if both[0] != both[1])
            at = logits[len(prompt) - 1 + place]
            gaps.append(float((at[answer[place]] - at[theirs[place]]) / rounding(at[answer[place]], dtype)))
        own.append(of_tokens(logits, prompt))
        true.append(of_tokens(exact(torch.tensor([prompt], device=DEVICE)).logits[0], prompt))
        served += [found[token].logprob for token, found in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        largest = max(largest, float(rounding(logits[: len(prompt) - 1].max(), dtype)))
    logprobs = {"vllm": torch.tensor(served), "transformers": torch.cat(own), "float32": torch.cat(true)}
    return {
        "prompts": len(prompts),
        "equal_prompts": equal,
        "written": written,
        "largest_gap_in_roundings": max(gaps),
        "prompt_tokens": len(served),
        **differences(logprobs["vllm"], logprobs["transformers"]),
        "vllm_and_float32": differences(logprobs["vllm"], logprobs["float32"]),
        "transformers_and_float32": differences(logprobs["transformers"], logprobs["float32"]),
        "largest_rounding_of_a_logit": largest,
    }


def of_tokens(logits: torch.Tensor, prompt: list[int]) -> torch.Tensor:
    """The log-probabilities `[tokens - 1]` of a prompt's tokens from the second on."""
    chosen = torch.tensor(prompt[1:], device=logits.device).unsqueeze(-1)
    return logits[: len(prompt) - 1].log_softmax(-1).gather(-1, chosen)[:, 0].cpu()


def differences(one: torch.Tensor, other: torch.Tensor) -> Json:
    off = (one - other).abs()
    return {
        "largest_difference": float(off.max()),
        "mean_difference": float(off.mean()),
        "over_0.05": int((off > 0.05).sum()),
    }


def written_by(student: PreTrainedModel, prompts: list[list[int]], written: int) -> list[list[int]]:
    """What transformers writes behind each prompt, all of them in one batch."""
    student.generation_config.eos_token_id = None  # nothing ends early, as in vLLM
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=DEVICE)
    answers = student.generate(ids, attention_mask=mask, max_new_tokens=written, do_sample=False, pad_token_id=0)
    return answers[:, longest:].tolist()


def rounding(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """From a number to the next one of this dtype."""
    return torch.finfo(dtype).eps * 2.0 ** x.abs().clamp(min=1e-30).log2().floor()


# --- serve


def serve(options: ServingOptions, job: Json, folder: Path) -> Iterator[Json]:
    """`vllm serve`, as a user types it, and one question over HTTP."""
    import urllib.request

    student = student_of(options, job["model"])
    cast_for_training(student, torch.bfloat16)
    student.save_pretrained(folder)
    load_tokenizer(str(options.teacher)).save_pretrained(folder)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--port", "8123"]
    command += ["--max-model-len", "2048", "--gpu-memory-utilization", "0.4", "--served-model-name", "student"]
    command += ["--enforce-eager"]  # to compile takes longer than the question
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    start = time.perf_counter()
    server = subprocess.Popen(command, env=environment)
    question = json.dumps({"model": "student", "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0})
    request = urllib.request.Request(
        "http://127.0.0.1:8123/v1/completions", question.encode(), {"Content-Type": "application/json"}
    )
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    answer = json.load(reply)["choices"][0]
            except OSError:
                time.sleep(1)
                continue
            yield {"start_seconds": round(time.perf_counter() - start, 1), "text": answer["text"]}
            return
        raise SystemExit(f"vllm serve ended with {server.returncode}")
    finally:
        server.terminate()
        server.wait(30)


# --- throughput


def random_folder(options: ServingOptions, model: str, folder: Path) -> Path:
    """A configuration; vLLM makes the weights up."""
    base = AutoConfig.from_pretrained(SHAPES.get(options.shapes, options.shapes))
    if model == "teacher":
        base.save_pretrained(folder)
        return folder
    mixers = layer_mixers(base.num_hidden_layers, StudentConfig.parse({"layout": model}))
    config = KDAHybridConfig(base, mixers=mixers)
    config.architectures = ["KDAHybridForCausalLM"]
    config.save_pretrained(folder)
    return folder


def throughput(options: ServingOptions, job: Json, folder: Path) -> Iterator[Json]:
    from vllm.config import KVTransferConfig

    longest = max(options.contexts) + 256
    llm = engine(
        options,
        random_folder(options, job["model"], folder),
        dtype="bfloat16",
        load_format="dummy",
        max_model_len=longest,
        max_num_seqs=options.most_sequences,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.92,
        compilation_config={"cudagraph_capture_sizes": [x for x in GRAPHS if x <= options.most_sequences]},
        kv_transfer_config=KVTransferConfig(
            kv_connector="ReadContext", kv_role="kv_both", kv_connector_module_path="serving"
        ),
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 0
    for context in options.contexts:
        fitting, bytes_each = capacity(scheduler.kv_cache_config, context + DECODED)
        for sequences in dict.fromkeys([1, min(32, fitting), min(fitting, options.most_sequences)]):
            yield {
                "context": context,
                "fitting_sequences": fitting,
                "mib_per_sequence": bytes_each / MIB,
                **decoded(llm, scheduler, sequences, context),
                "free_gib": free / GIB,
            }


def read_context() -> type:
    """A connector that says it has read a prompt when nobody has, for vLLM to import under the name `ReadContext`.

    To read 32k tokens for each of a thousand sequences would take many times as long as the writing that is measured.
    The cache is filled once with small random numbers; each sequence has its own share of it, as after a real prompt.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

    class ReadContext(DecodeBenchConnector):
        def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
            # States first: attention sees the same memory in another dtype, and any number of its is a small one of
            # a state's, but not the other way round.
            for cache in sorted(kv_caches.values(), key=lambda cache: isinstance(cache, torch.Tensor)):
                for tensor in [cache] if isinstance(cache, torch.Tensor) else cache:
                    tensor.normal_(std=0.02)

        def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
            """Nothing to load."""

    return ReadContext


def __getattr__(name: str) -> Any:
    if name == "ReadContext":
        return read_context()
    raise AttributeError(name)


def capacity(cache: Any, tokens: int) -> tuple[int, int]:
    """How many sequences of so many tokens vLLM's cache holds at a time, and the bytes of each."""
    blocks = 0
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        blocks += 1 if "Mamba" in type(spec).__name__ else -(-tokens // spec.block_size)
    total = sum(tensor.size for tensor in cache.kv_cache_tensors)
    return (cache.num_blocks - 1) // blocks, blocks * total // cache.num_blocks


def decoded(llm: Any, scheduler: Any, sequences: int, context: int) -> Json:
    """Tokens per second of all sequences together, once each of them is being written."""
    from vllm.sampling_params import RequestOutputKind

    prompt = torch.randint(VOCABULARY, (context,)).tolist()
    for number in range(sequences):
        llm.llm_engine.add_request(
            f"{context}-{sequences}-{number}",
            {"prompt_token_ids": prompt},
            sampling(DECODED, output_kind=RequestOutputKind.DELTA),
        )
    count, running = 0, 0
    marks: list[tuple[float, int]] = []
    first, last = sequences * SKIPPED, sequences * (DECODED - 2)
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        count += sum(len(output.outputs[0].token_ids) for output in outputs)
        running = max(running, len(scheduler.running))
        if first <= count and (not marks or count <= last):
            marks.append((time.perf_counter(), count))
    (start, before), (end, after) = marks[0], marks[-1]
    rate = (after - before) / (end - start)
    return {"sequences": sequences, "running_at_once": running, "tokens_per_second": rate}


def about(options: ServingOptions, rows: list[Json]) -> Json:
    return {"settings": options.settings("shapes", "contexts", "tensor_parallel_size", "variants", "mode", "teacher")}


if __name__ == "__main__":
    if "--job" in sys.argv:
        from frame import parse

        work(parse(ServingOptions))
    else:
        run(ServingOptions, measure, "students in vLLM", "vllm", "flash-linear-attention", more=about)
