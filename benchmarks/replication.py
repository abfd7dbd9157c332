"""The miniature replication: SmolLM2 becomes hybrid, front-loaded and KDA-only students, each by a run of the product.

    python benchmarks/replication.py --teacher FOLDER --gguf-file NAME --data train.parquet --eval valid.parquet \\
      --tokens 40M --long-tokens 8M --work /tmp/replication --gpus 4
    python benchmarks/replication.py … --variants best --set best.phases.short.training_args.learning_rate=1e-3 \\
      --set all.training_args.torch_compile=true
    python benchmarks/replication.py … --variants best-a best-b --set best-a.phases.alignment.tokens=2M    # two trials

A variant (benchmarks/variants.py) is a YAML over a recipe of recipes/smollm2: a phase, or several, in rows of
`--sequence-length`, then one in rows of `--long-sequence-length`. Its students after each are measured by `distillkit
evaluate`: divergence from the teacher in rows of either length, and needles. Variants stand in a queue, one per GPU at
a time; the evaluations of one run side by side. Each is written to `--output` as soon as it is through, one that fails
with the last line of its log; the same command again goes on where it was stopped and repeats nothing that is finished.

`--go-on STUDENT` takes what a former run of a variant has trained in short rows, perhaps elsewhere, trains it in long
ones and measures both, in a `--work` of its own; the phases that `--output` knows of that variant stay before its own.

`--data` and `--eval` are text, or tokens that benchmarks/corpus.py has made; `--tokenize` makes them here, once.
"""

import argparse
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
from pathlib import Path
from typing import Any

import yaml
from corpus import count, prepare_rows, tokenised, write
from measuring import RESULTS, ROOT, provenance
from outcomes import continued, part_of
from variants import VARIANTS, base, evaluation_of_teacher, evaluations_of, run_of

from distillkit.cli import main as distillkit
from distillkit.config.errors import UserError
from distillkit.config.evaluate import TEACHER
from distillkit.config.resolve import load_run
from distillkit.config.tokens import parse_tokens
from distillkit.models.loading import load_tokenizer, where
from distillkit.runs.writing import write_json

Json = dict[str, Any]


class Replication:
    """A queue of variants, and the file that they are written to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(args.work)
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def write_configurations(self, names: list[str]) -> None:
        """All YAML files, before any GPU waits. Raises `UserError` for a key or value that cannot be."""
        for name in names:
            folder = self.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            plan = self._plan(name, folder)
            for file, described in plan["files"].items():
                (folder / file).write_text(yaml.safe_dump(described, sort_keys=False))
            if name != TEACHER:
                load_run(folder / "run.yaml", plan["overrides"])

    def work_off(self, names: list[str]) -> bool:
        """One worker per GPU; whether all went well."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            waiting.put(name)
        failed: list[str] = []

        def worker(gpu: int) -> None:
            while not self._stopped:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._do(name, gpu)
                except Exception as error:  # the others go on
                    failed.append(name)
                    self._say(name, f"failed: {error}")
                    if not self._stopped:
                        self._keep_failure(name, error)

        threads = [threading.Thread(target=worker, args=(gpu,)) for gpu in range(self.args.gpus)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # a signal: runs save a checkpoint and evaluations keep what they have
            self._stopped = True
            for process in list(self._running):
                process.terminate()  # nothing where it has ended
            for thread in threads:
                thread.join()
        return not failed

    def _do(self, name: str, gpu: int) -> None:
        """Train a variant and evaluate it, unless that is done already, and write it down."""
        folder = self.folder / name
        plan = self._plan(name, folder)
        done = folder / "part.json"
        if done.exists() and (former := json.loads(done.read_text()))["plan"] == plan:
            self._say(name, "is done already")
            self._keep(name, former["part"])
            return
        start = time.perf_counter()
        if name != TEACHER:
            self._say(name, "trains")
            run = [sys.executable, "-m", "distillkit", str(folder / "run.yaml"), *plan["overrides"], "--resume"]
            self._process(folder / "run.txt", run, gpu)
            self._say(name, f"is trained after {time.perf_counter() - start:.0f} s, and is evaluated")
        self._evaluate(name, [file for file in plan["files"] if file != "run.yaml"], gpu)
        part = part_of(name, folder, plan)
        part["seconds_in_all"] = round(time.perf_counter() - start, 1)
        if self.args.go_on and "phases" in (former := self._known(name)):
            part = continued(former, part)
        self._keep(name, part)
        if part["failures"]:  # the same command tries these again
            first = part["failures"][0]
            raise RuntimeError(f"{len(part['failures'])} measurements failed: {first['task']}: {first['error']}")
        write_json(done, {"plan": plan, "part": part})
        self._say(name, f"is done after {part['seconds_in_all']:.0f} s")

    def _evaluate(self, name: str, files: list[str], gpu: int) -> None:
        """All evaluations of a variant side by side: a GPU waits for the processor that starts the kernels of each."""
        folder = self.folder / name
        threads = max((os.cpu_count() or 1) // (len(files) * self.args.gpus), 1)
        commands = {file: [sys.executable, __file__, "--evaluate", str(folder / file)] for file in files}
        with ThreadPoolExecutor(len(files)) as side_by_side:
            started = [
                side_by_side.submit(self._process, (folder / file).with_suffix(".txt"), command, gpu, threads)
                for file, command in commands.items()
            ]
        for process in started:
            process.result()

    def prepare_rows(self, names: list[str]) -> None:
        """Begin with the rows of all phases, while models are still loaded; runs wait for those that they need."""
        files = [str(self.folder / name / "run.yaml") for name in names if name != TEACHER]
        with (self.folder / "rows.txt").open("ab") as log:
            command = [sys.executable, __file__, "--rows", *files]
            self._running.append(subprocess.Popen(command, stdout=log, stderr=log, env=self._environment(None)))

    def _environment(self, gpu: int | None, threads: int | None = None) -> dict[str, str]:
        """Of a process on one of several GPUs; None is for one that needs none. `threads`: its share of the cores."""
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths}
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        if gpu is None:
            return {**environment, "CUDA_VISIBLE_DEVICES": ""}
        if self.args.gpus > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.args.gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu]
        return environment

    def _plan(self, name: str, folder: Path) -> Json:
        """All that decides what comes out: the YAML files by name, and what the command line changes in the run's."""
        if name == TEACHER:
            described = evaluation_of_teacher(folder, self.args)
            return {"files": {f"{each}.yaml": content for each, content in described.items()}, "overrides": []}
        run = run_of(name, folder, self.args)
        overrides = [text for whose, text in self.args.set if whose in ("all", base(name), name)]
        phases = {phase["name"]: f"{position}-{phase['name']}" for position, phase in enumerate(run["phases"], 1)}
        students = {each: folder / "run" / "phases" / phases[each] for each in ("short", "long") if each in phases}
        if self.args.go_on:
            students = {"short": Path(self.args.go_on), **students}
        evaluations = evaluations_of(folder, students, self.args)
        return {
            "files": {"run.yaml": run} | {f"{each}.yaml": content for each, content in evaluations.items()},
            "overrides": overrides,
        }

    def _process(self, log: Path, command: list[str], gpu: int, threads: int | None = None) -> None:
        """Raises `RuntimeError` with the last line of the log where the command fails."""
        with log.open("ab") as output:
            output.write(f"\n$ {shlex.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(command, stdout=output, stderr=output, env=self._environment(gpu, threads))
        self._running.append(process)
        if self._stopped:
            process.terminate()
        code = process.wait()
        if code:
            raise RuntimeError(log.read_text(errors="replace").strip().splitlines()[-1])

    def _keep(self, name: str, part: Json) -> None:
        """Write a variant, or the teacher, into the file; what else it holds stays."""
        self._write(name, {**part, **self._provenance()})

    def _provenance(self) -> Json:
        return {**provenance(), "command": shlex.join(["python", *shown_command(self.args)])}

    def _write(self, name: str, part: Json) -> None:
        with self._lock:
            output = self.args.output
            former = json.loads(output.read_text()) if output.exists() else {}
            variants = former.get("variants", {})
            if name == TEACHER:
                former = {**former, TEACHER: part}
            else:
                variants = {**variants, name: part}
            ordered = {each: variants[each] for each in sorted(variants, key=place)}
            content = {"benchmark": "the miniature replication", **former, "variants": ordered}
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(content, indent=1) + "\n")

    def _keep_failure(self, name: str, error: Exception) -> None:
        """Beside what was measured, where that is much."""
        self._write(name, {**self._provenance(), **self._known(name), "error": str(error)})

    def _known(self, name: str) -> Json:
        """What the file holds of a variant, or of the teacher."""
        former = json.loads(self.args.output.read_text()) if self.args.output.exists() else {}
        known: Json = former.get(TEACHER, {}) if name == TEACHER else former.get("variants", {}).get(name, {})
        return known

    def _say(self, name: str, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {name} {what}", flush=True)


def tokenize(args: argparse.Namespace) -> None:
    """Exchange text for tokens in `--work`, which all phases of all variants then read."""
    tokenizer = load_tokenizer(args.teacher, **where(args.teacher_section["kwargs"]))
    for name in ("data", "eval"):
        path = Path(args.work) / "tokens" / f"{name}.parquet"
        if not path.exists():
            start = time.perf_counter()
            documents = tokenised(getattr(args, name), tokenizer, args.processes)
            write(documents, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
            seconds = time.perf_counter() - start
            print(f"{name}: {count(documents):,} tokens, tokenised in {seconds:.1f} s", flush=True)
        setattr(args, name, str(path))


def place(name: str) -> tuple[int, int, str]:
    """Among the variants of the file: trials of one by the number in their name, if there is one."""
    number = re.search(r"\d+", name)
    return [*VARIANTS].index(base(name)), int(number[0]) if number else 0, name


def variant(name: str) -> str:
    if base(name) not in VARIANTS and name != TEACHER:
        names = ", ".join((*VARIANTS, TEACHER))
        raise argparse.ArgumentTypeError(f"{name!r}: must be one of {names}, or a trial of one such as best-a")
    return name


def shown_command(args: argparse.Namespace) -> list[str]:
    """The words of the command, with names of files instead of a machine's folders."""
    return ["benchmarks/replication.py", *(Path(word).name if word.startswith("/") else word for word in args.words)]


def override(text: str) -> tuple[str, str]:
    whose, point, rest = text.partition(".")
    if not point or "=" not in rest or base(whose) not in ("all", *VARIANTS):
        names = ", ".join(("all", *VARIANTS))
        raise argparse.ArgumentTypeError(f"{text!r}: must be VARIANT.key=value, of {names}")
    return whose, rest


def tokens_or_zero(text: str) -> int:
    return 0 if text == "0" else parse_tokens(text)


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a folder or hub id")
    parser.add_argument("--gguf-file", help="name of the GGUF file in the teacher's folder")
    parser.add_argument("--data", required=True, help="what is learnt from: a file, a folder or a pattern of files")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--haystack", help="text that hides needles; --eval by default, which then must be text")
    parser.add_argument("--tokens", type=parse_tokens, default="40M", help="of all phases of short rows together")
    parser.add_argument("--long-tokens", type=tokens_or_zero, default="8M", help="of the phase of long rows; 0: none")
    parser.add_argument(
        "--go-on", metavar="STUDENT", help="folder of one variant's, trained in short rows: only long rows"
    )
    parser.add_argument("--work", required=True, help="folder of everything but the result")
    parser.add_argument("--output", type=Path, default=RESULTS / "replication.json")
    parser.add_argument("--variants", nargs="+", type=variant, default=[*VARIANTS, TEACHER])
    parser.add_argument("--set", action="append", type=override, default=[], metavar="VARIANT.KEY=VALUE")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="short rows per step")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--long-sequence-length", type=int, default=8192)
    parser.add_argument(
        "--alignment-share", type=float, default=0.25, help="of --tokens, where a variant has alignment"
    )
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--held-out-tokens", type=int, default=98304)
    parser.add_argument("--dtype", default="bfloat16", help="of the students while they are evaluated")
    parser.add_argument("--needle-tasks", nargs="+", default=["niah_single_1", "niah_single_2", "niah_multikey_1"])
    parser.add_argument("--needle-lengths", type=int, nargs="+", default=[2**power for power in range(10, 16)])
    parser.add_argument("--needle-depths", type=int, default=5)
    parser.add_argument("--needle-samples", type=int, default=4, help="for each length and depth")
    parser.add_argument("--needle-batch", type=int, default=16, help="prompts that are answered together")
    parser.add_argument("--needle-prefill-tokens", type=int, default=32768, help="of all these, read at a time")
    parser.add_argument("--tokenize", action="store_true", help="make tokens of the text first")
    parser.add_argument("--processes", type=int, help="that tokenise")
    args = parser.parse_args(words)
    args.words = words
    args.work, args.data, args.eval = (os.path.abspath(path) for path in (args.work, args.data, args.eval))
    args.go_on = os.path.abspath(args.go_on) if args.go_on else None
    if args.go_on and (len(args.variants) > 1 or args.variants == [TEACHER] or not args.long_tokens):
        parser.error("--go-on is for one variant and its long rows: give --variants NAME and --long-tokens")
    if args.go_on and not os.path.isdir(args.go_on):
        parser.error(f"--go-on: no folder {args.go_on}; give that of a trained student")
    args.haystack = os.path.abspath(args.haystack) if args.haystack else args.eval
    args.teacher = os.path.abspath(args.teacher) if os.path.exists(args.teacher) else args.teacher
    gguf = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    args.teacher_section = {"kind": "hf", "path": args.teacher, "kwargs": {"dtype": args.dtype, **gguf}}
    return args


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--evaluate"]:
        code = distillkit(["evaluate", *words[1:]])
        sys.exit(0 if code == 1 else code)  # 1: results tell what could not be measured
    if words[:1] == ["--rows"]:
        return prepare_rows(words[1:])
    args = arguments(words)
    replication = Replication(args)
    if args.tokenize:
        tokenize(args)
    try:
        replication.write_configurations(args.variants)
    except UserError as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    replication.prepare_rows(args.variants)
    sys.exit(0 if replication.work_off(args.variants) else 1)


if __name__ == "__main__":
    main()
