"""The miniature replication: SmolLM2 becomes hybrid, front-loaded and KDA-only students, each by a run of the product.

    python benchmarks/replication.py --teacher FOLDER --gguf-file NAME --data train.parquet --eval valid.parquet \\
      --tokens 40M --long-tokens 8M --work /tmp/replication --gpus 4
    python benchmarks/replication.py … --variants best --set best.phases.short.training_args.learning_rate=1e-3 \\
      --set all.training_args.torch_compile=true
    python benchmarks/replication.py … --variants best-a best-b --set best-a.phases.alignment.tokens=2M    # two trials

A variant (benchmarks/variants.py) is a YAML over a recipe of recipes/smollm2: a phase, or several, in rows of
`--sequence-length`, then one in rows of `--long-sequence-length`. `distillkit evaluate` measures its students after
each: divergence from the teacher in rows of either length, and needles. Each GPU trains one variant at a time; the
evaluations of one run side by side. Each variant is written to `--output` when it is finished, one that fails with the
last line of its log; the same command again continues where it was stopped and repeats nothing that is finished.

`--go-on STUDENT` takes what an earlier run of a variant has trained in short rows, perhaps elsewhere, trains it in long
ones and measures both, in a `--work` of its own; the phases that `--output` has of that variant stay before its own.

`--data` and `--eval` are text, or tokens that `distillkit synthesize` has written.
"""

import json
import os
import queue
import re
import shlex
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
from frame import ROOT, Json, TeacherOptions, command, option, parse, provenance, write_whole
from outcomes import continued, part_of
from variants import VARIANTS, base, evaluation_of_teacher, evaluations_of, run_of

KNOWN = (*VARIANTS, TEACHER)


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


class Replication:
    """Variants that wait for a GPU, and the file that they are written to."""

    def __init__(self, options: ReplicationOptions) -> None:
        self.options = options
        self.folder = Path(options.work)
        self._gpus: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def plan(self, name: str) -> Json:
        """All that decides the outcome: the YAML files by name, and what the command line changes in the run's."""
        folder, options = self.folder / name, self.options
        if name == TEACHER:
            return {"files": evaluation_of_teacher(folder, options), "overrides": []}
        run = run_of(name, folder, options)
        given = [text.split(".", 1) for text in options.set]
        phases = {phase["name"]: f"{position}-{phase['name']}" for position, phase in enumerate(run["phases"], 1)}
        students = {each: folder / "run" / "phases" / phases[each] for each in ("short", "long") if each in phases}
        if options.go_on:
            students = {"short": Path(options.go_on), **students}
        return {
            "files": {"run.yaml": run, **evaluations_of(folder, students, options)},
            "overrides": [change for whose, change in given if whose in ("all", base(name), name)],
        }

    def write_configurations(self) -> None:
        """All YAML files, before any GPU waits. Raises `UserError` for a key or value that cannot be."""
        for name in self.options.variants:
            folder, plan = self.folder / name, self.plan(name)
            folder.mkdir(parents=True, exist_ok=True)
            for file, described in plan["files"].items():
                (folder / file).write_text(yaml.safe_dump(described, sort_keys=False))
            if name != TEACHER:
                load_run(folder / "run.yaml", plan["overrides"])

    def run(self) -> bool:
        """Every variant, one per GPU at a time; whether all went well."""
        for gpu in range(self.options.gpus):
            self._gpus.put(gpu)
        with ThreadPoolExecutor(self.options.gpus) as workers:
            try:
                return all([*workers.map(self._attempt, self.options.variants)])
            finally:  # a signal: runs save a checkpoint and evaluations keep what they have
                self._stopped = True
                workers.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.terminate()  # nothing if it has ended

    def _attempt(self, name: str) -> bool:
        gpu = self._gpus.get()
        try:
            self._finish(name, gpu)
            return True
        except Exception as error:  # the others continue
            self._print(name, f"failed: {error}")
            if not self._stopped:  # beside what was measured, which may be much
                self._write(name, {**self._provenance(), **self._known(name), "error": str(error)})
            return False
        finally:
            self._gpus.put(gpu)

    def _finish(self, name: str, gpu: int) -> None:
        """Train a variant and evaluate it, unless that is done already, and write it to the file."""
        folder, plan = self.folder / name, self.plan(name)
        done = folder / "part.json"
        if done.exists() and (former := json.loads(done.read_text()))["plan"] == plan:
            self._print(name, "is done already")
            self._write(name, {**former["part"], **self._provenance()})
            return
        start = time.perf_counter()
        if name != TEACHER:
            self._print(name, "trains")
            run = ["distillkit", str(folder / "run.yaml"), *plan["overrides"], "--resume"]
            self._process(folder / "run.txt", run, gpu)
            self._print(name, f"is trained after {time.perf_counter() - start:.0f} s, and is evaluated")
        files = [folder / file for file in plan["files"] if file != "run.yaml"]
        # Side by side: a GPU waits for the processor that starts the kernels of each.
        threads = max((os.cpu_count() or 1) // (len(files) * self.options.gpus), 1)
        with ThreadPoolExecutor(len(files)) as evaluations:
            for _ in evaluations.map(lambda file: self._evaluate(file, gpu, threads), files):
                pass
        part = part_of(name, folder, plan)
        part["seconds_in_all"] = round(time.perf_counter() - start, 1)
        if self.options.go_on and "phases" in (former := self._known(name)):
            part = continued(former, part)
        self._write(name, {**part, **self._provenance()})
        if part["failures"]:  # the same command tries these again
            first = part["failures"][0]
            raise RuntimeError(f"{len(part['failures'])} measurements failed: {first['task']}: {first['error']}")
        write_whole(done, {"plan": plan, "part": part})
        self._print(name, f"is done after {part['seconds_in_all']:.0f} s")

    def _evaluate(self, file: Path, gpu: int, threads: int) -> None:
        """It ends with 1 if something could not be measured; its results tell what."""
        self._process(file.with_suffix(".txt"), ["distillkit", "evaluate", str(file)], gpu, str(threads), codes=(0, 1))

    def _process(
        self, log: Path, words: list[str], gpu: int, threads: str | None = None, codes: tuple[int, ...] = (0,)
    ) -> None:
        """Raises `RuntimeError` with the last line of the log if the command ends with another code."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", threads)
        if self.options.gpus > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.options.gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu]
        with log.open("ab") as output:
            output.write(f"\n$ {shlex.join(words)}\n".encode())
            output.flush()
            line = [sys.executable, "-m", *words]
            process = subprocess.Popen(line, stdout=output, stderr=output, env=environment)
        self._running.append(process)
        if self._stopped:
            process.terminate()
        if process.wait() not in codes:
            raise RuntimeError(log.read_text(errors="replace").strip().splitlines()[-1])

    def _provenance(self) -> Json:
        return {**provenance(), "command": command(self.options)}

    def _content(self) -> Json:
        output = self.options.result_file
        former = json.loads(output.read_text()) if output.exists() else {}
        return {"benchmark": "the miniature replication", "variants": {}, **former}

    def _known(self, name: str) -> Json:
        """What the file has of a variant, or of the teacher."""
        content = self._content()
        known: Json = (content if name == TEACHER else content["variants"]).get(name, {})
        return known

    def _write(self, name: str, part: Json) -> None:
        """Write a variant, or the teacher, into the file; what else it has stays."""
        with self._lock:
            content = self._content()
            (content if name == TEACHER else content["variants"])[name] = part
            content["variants"] = dict(sorted(content["variants"].items(), key=lambda item: place(item[0])))
            write_whole(self.options.result_file, content)

    def _print(self, name: str, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {name} {what}", flush=True)


def place(name: str) -> tuple[int, int, str]:
    """Among the variants of the file: trials of one by the number in their name, if there is one."""
    number = re.search(r"\d+", name)
    return [*VARIANTS].index(base(name)), int(number[0]) if number else 0, name


if __name__ == "__main__":
    replication = Replication(parse(ReplicationOptions))
    try:
        replication.write_configurations()
    except UserError as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(0 if replication.run() else 1)
