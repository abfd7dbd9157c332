"""The miniature replication: SmolLM2 becomes hybrid, front-loaded and KDA-only students, each by a run of the product.

    python benchmarks/replication.py --teacher FOLDER --gguf-file NAME --data train.parquet --eval valid.parquet \\
      --tokens 40M --long-tokens 8M --work /tmp/replication --gpus 4
    python benchmarks/replication.py … --variants best --set best.phases.short.training_args.learning_rate=1e-3 \\
      --set all.training_args.torch_compile=true
    python benchmarks/replication.py … --variants best-a best-b --set best-a.phases.alignment.tokens=2M    # two trials

A variant (benchmarks/variants.py) is a YAML over a recipe of recipes/smollm2: a phase, or several, in rows of
`--sequence-length`, then one in rows of `--long-sequence-length`. `distillkit evaluate` measures its students after
each: divergence from the teacher in rows of either length, and needles. The GPUs share the variants, in turn. Each
variant is written to `--output` when it is finished, one that fails with the last line of its log; the same command
again continues where it was stopped, for `distillkit` repeats nothing that is finished.

`--go-on STUDENT` takes what an earlier run of a variant has trained in short rows, perhaps elsewhere, trains it in long
ones and measures both, in a `--work` of its own; the phases that `--output` has of that variant stay before its own.

`--data` and `--eval` are text, or tokens that `distillkit synthesize` has written.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from distillkit.config.errors import UserError
from distillkit.config.evaluate import TEACHER
from distillkit.config.resolve import load_run
from distillkit.config.tokens import parse_tokens
from distillkit.console import FAILED, INTERRUPTED
from frame import ROOT, Json, TeacherOptions, command, option, parse, provenance, write_whole
from outcomes import continued, part_of
from variants import VARIANTS, base, evaluation_of_teacher, evaluations_of, run_of

KNOWN = (*VARIANTS, TEACHER)
RUNNING: set[subprocess.Popen[bytes]] = set()
WRITING = threading.Lock()


@dataclass(kw_only=True)
class ReplicationOptions(TeacherOptions):
    data: str = option(help="training text: a file, a folder or a pattern of files")
    eval: str = option(help="held-out text")
    haystack: str = option("", "text that hides needles; --eval by default, which then must be text")
    tokens: str = option("40M", "of all phases of short rows together")
    long_tokens: str = option("8M", "of the phase of long rows; 0: none")
    go_on: str | None = option(None, "folder of one variant's student, trained in short rows: only long rows")
    work: str = option(help="folder of everything but the result")
    variants: list[str] = option([*KNOWN], "names, or trials of one such as best-a")
    set: list[str] = option([], "VARIANT.KEY=VALUE, of one or of `all`", action="extend")
    gpus: int = option(1)
    batch: int = option(16, "short rows per step")
    sequence_length: int = option(2048)
    long_sequence_length: int = option(8192)
    alignment_share: float = option(0.25, "of --tokens, if a variant has alignment")
    logging_steps: int = option(10)
    held_out_tokens: int = option(98304)
    dtype: str = option("bfloat16", "of the students while they are evaluated")
    needle_tasks: list[str] = option(["niah_single_1", "niah_single_2", "niah_multikey_1"])
    needle_lengths: list[int] = option([2**power for power in range(10, 16)])
    needle_depths: int = option(5)
    needle_samples: int = option(4, "for each length and depth")
    needle_batch: int = option(16, "prompts that are answered together")
    needle_prefill_tokens: int = option(32768, "of all these, read at a time")

    def __post_init__(self) -> None:
        for name in self.variants:
            if base(name) not in KNOWN or (name != TEACHER and base(name) == TEACHER):
                raise ValueError(f"--variants: {name!r}: must be one of {', '.join(KNOWN)}, or a trial such as best-a")
        for text in self.set:
            if not re.fullmatch(r"[^.]+\.[^=]+=.*", text) or base(text.partition(".")[0]) not in ("all", *VARIANTS):
                known = ", ".join(("all", *VARIANTS))
                raise ValueError(f"--set: {text!r}: must be VARIANT.key=value, of {known}")
        self.tokens = parse_tokens(self.tokens)
        self.long_tokens = 0 if self.long_tokens == "0" else parse_tokens(self.long_tokens)
        if self.go_on is not None:
            if len(self.variants) > 1 or self.variants == [TEACHER] or not self.long_tokens:
                raise ValueError("--go-on is for one variant and its long rows: give --variants NAME and --long-tokens")
            if not os.path.isdir(self.go_on):
                raise ValueError(f"--go-on: no folder {self.go_on}; give that of a trained student")
            self.go_on = os.path.abspath(self.go_on)
        self.haystack = os.path.abspath(self.haystack or self.eval)
        self.work, self.data, self.eval = (os.path.abspath(path) for path in (self.work, self.data, self.eval))
        self.teacher = os.path.abspath(self.teacher) if os.path.exists(self.teacher) else self.teacher

    @property
    def teacher_model(self) -> Json:
        return {"path": self.teacher, "kwargs": {"dtype": self.dtype, **self.where}}


def plan(name: str, options: ReplicationOptions) -> Json:
    """The YAML files of a variant by name, and what the command line changes in that of its run."""
    folder = Path(options.work) / name
    if name == TEACHER:
        return {"files": evaluation_of_teacher(folder, options), "overrides": []}
    run = run_of(name, folder, options)
    phases = {phase["name"]: f"{position}-{phase['name']}" for position, phase in enumerate(run["phases"], 1)}
    students = {each: folder / "run" / "phases" / phases[each] for each in ("short", "long") if each in phases}
    if options.go_on:
        students = {"short": Path(options.go_on), **students}
    given = [text.split(".", 1) for text in options.set]
    return {
        "files": {"run.yaml": run, **evaluations_of(folder, students, options)},
        "overrides": [change for whose, change in given if whose in ("all", base(name), name)],
    }


def write_configurations(options: ReplicationOptions) -> None:
    """All YAML files, before any GPU waits. Raises `UserError` for a key or value that cannot be."""
    for name in options.variants:
        folder, planned = Path(options.work) / name, plan(name, options)
        folder.mkdir(parents=True, exist_ok=True)
        for file, described in planned["files"].items():
            (folder / file).write_text(yaml.safe_dump(described, sort_keys=False))
        if name != TEACHER:
            load_run(folder / "run.yaml", planned["overrides"])


def run_on(gpu: int, options: ReplicationOptions) -> bool:
    """The variants of one GPU, one after the other; whether all went well."""
    failed = False
    for name in options.variants[gpu :: options.gpus]:
        try:
            finish(name, gpu, options)
        except Exception as error:  # the others continue
            failed = True
            report(name, f"failed: {error}")
            write(name, {**known(name, options), "error": str(error)}, options)  # beside what was measured
    return not failed


def finish(name: str, gpu: int, options: ReplicationOptions) -> None:
    """Train a variant and evaluate it, each unless that is done already, and write it to the file."""
    folder, planned = Path(options.work) / name, plan(name, options)
    for file in planned["files"]:
        report(name, file)
        path = str(folder / file)
        words = [path, *planned["overrides"], "--resume"] if file == "run.yaml" else ["evaluate", path]
        distillkit(words, Path(path).with_suffix(".txt"), gpu, options)
    part = part_of(name, folder, planned)
    if options.go_on and "phases" in (former := known(name, options)):
        part = continued(former, part)
    write(name, part, options)
    if part["failures"]:  # the same command tries these again
        first = part["failures"][0]
        raise RuntimeError(f"{len(part['failures'])} measurements failed: {first['task']}: {first['error']}")
    report(name, "done")


def distillkit(words: list[str], log: Path, gpu: int, options: ReplicationOptions) -> None:
    """One command of the product.

    Raises:
        RuntimeError: with the last line of the log, if it fails.
        SystemExit: it was interrupted.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if options.gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu]
    with log.open("ab") as output:
        line = [sys.executable, "-m", "distillkit", *words]
        process = subprocess.Popen(line, stdout=output, stderr=output, env=environment)
    RUNNING.add(process)
    code = process.wait()
    RUNNING.discard(process)
    if code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise SystemExit(INTERRUPTED)
    if code and (code, words[0]) != (FAILED, "evaluate"):  # its results tell what could not be measured
        raise RuntimeError(log.read_text(errors="replace").strip().splitlines()[-1])


def content_of(options: ReplicationOptions) -> Json:
    output = options.result_file
    former = json.loads(output.read_text()) if output.exists() else {}
    return {"benchmark": "the miniature replication", "variants": {}, **former}


def known(name: str, options: ReplicationOptions) -> Json:
    """What the file has of a variant, or of the teacher."""
    content = content_of(options)
    found: Json = (content if name == TEACHER else content["variants"]).get(name, {})
    return found


def write(name: str, part: Json, options: ReplicationOptions) -> None:
    """Write a variant, or the teacher, into the file; what else it has stays."""
    part = {**part, **provenance(), "command": command(options)}
    with WRITING:
        content = content_of(options)
        (content if name == TEACHER else content["variants"])[name] = part
        content["variants"] = dict(sorted(content["variants"].items(), key=lambda item: place(item[0])))
        write_whole(options.result_file, content)


def report(name: str, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name}: {what}", flush=True)


def place(name: str) -> tuple[int, int, str]:
    """Among the variants of the file: trials of one by the number in their name, if there is one."""
    number = re.search(r"\d+", name)
    return [*VARIANTS].index(base(name)), int(number[0]) if number else 0, name


def stop(*_: object) -> None:
    """Runs save a checkpoint, and evaluations keep what they have."""
    for process in [*RUNNING]:
        process.terminate()


if __name__ == "__main__":
    options = parse(ReplicationOptions)
    try:
        write_configurations(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(options.gpus) as workers:
        well = [*workers.map(run_on, range(options.gpus), [options] * options.gpus)]
    sys.exit(0 if all(well) else 1)
