"""What all benchmarks share: options, a process for each measurement, time and memory, and result files.

A benchmark is a script with a docstring, a dataclass of options and a function that yields rows. `run` parses the
command line, prints the rows as they come, and after each row writes benchmarks/results/NAME.json, which says on which
machine, with which versions and by which command it was measured. A script that does not yield rows calls `parse` and
`save` itself.
"""

import json
import platform
import resource
import shlex
import sys
import time
from argparse import RawDescriptionHelpFormatter as Formatter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from transformers import HfArgumentParser

from distillkit.runs.provenance import commit, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB, GIB = 2**20, 2**30
CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
"""Where benchmarks run unless an option names another device."""

Json = dict[str, Any]
T = TypeVar("T")


def option(default: Any = MISSING, help: str = "", **argument: Any) -> Any:
    """A field of an options class; without a default it is required. `argument`: more for `add_argument`."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help, **argument})


@dataclass(kw_only=True)
class Options:
    """The options of every benchmark. Mistakes that `__post_init__` finds are ValueErrors."""

    output: Path | None = option(None, "result file, by default of the benchmark's name; in benchmarks/results")

    @property
    def benchmark(self) -> str:
        """The name of the script."""
        return Path(str(sys.modules[type(self).__module__].__file__)).stem

    @property
    def result_file(self) -> Path:
        """A bare name stands for a file in benchmarks/results; any other path is taken as it is."""
        path = self.output or Path(f"{self.benchmark}.json")
        return RESULTS / path if path.parent == Path() else path

    def settings(self, *names: str) -> Json:
        """These options, or all, as a result file keeps them."""
        return {name: shown(value) for name, value in asdict(self).items() if not names or name in names}


@dataclass(kw_only=True)
class TeacherOptions(Options):
    """Options of a benchmark that loads a teacher."""

    teacher: str = option(help="a folder, a hub id or a .gguf file")
    gguf_file: str | None = option(None, "name of the GGUF file in the teacher's folder")

    @property
    def where(self) -> dict[str, str]:
        """Keyword arguments for loading anything of the teacher."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def parse(options: type[T], words: list[str] | None = None) -> T:
    """The options on the command line. A mistake is printed in one line and ends the process with 2."""
    parser = HfArgumentParser(options, description=sys.modules[options.__module__].__doc__, formatter_class=Formatter)
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    except ValueError as error:
        parser.error(str(error))


def run(
    options_class: type[T],
    measure: Callable[[T], Iterator[Json]],
    title: str,
    *packages: str,
    key: str = "rows",
    more: Callable[[T, list[Json]], Json] = lambda options, rows: {},
) -> None:
    """Measure from the command line: print each row and save all rows so far.

    title: what is measured. packages: further packages whose versions matter. key: where the file keeps the rows.
    more: what it keeps beside them, from the options and the rows so far.
    """
    options = parse(options_class)
    rows: list[Json] = []
    for row in measure(options):
        rows.append(row)
        show(row)
        save(options, {"benchmark": title, **more(options, rows), key: rows}, *packages)


def show(row: Json) -> None:
    """One line, without curves and other lists."""
    print(json.dumps({name: value for name, value in row.items() if not isinstance(value, list)}), flush=True)


def save(options: Options, content: Json, *packages: str) -> None:
    """Write the result file, with where its numbers come from."""
    made = {"command": command(options), **provenance(*packages)}
    write_whole(options.result_file, {**made, **content})


def write_whole(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.rename(path)


def provenance(*packages: str) -> Json:
    """Machine, versions (of what always computes, and of `packages`) and commit."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = cpus[0].split(":")[1].strip() if cpus else platform.machine()
    memory = psutil.virtual_memory().total
    machine: Json = {"cpu": cpu, "threads": torch.get_num_threads(), "memory_gib": round(memory / GIB)}
    if DEVICE.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {"machine": machine, "versions": versions(*packages), "commit": commit()}


def command(options: Options) -> str:
    """The command line, with names of files instead of a machine's folders."""
    return shlex.join(["python", f"benchmarks/{options.benchmark}.py", *map(shown, sys.argv[1:])])


def shown(value: Any) -> Any:
    """A value, of an absolute path only the last name."""
    value = str(value) if isinstance(value, Path) else value
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def read_metrics(folder: Path) -> list[Json]:
    """The lines of metrics of a run, or of a phase of it."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a new process, so that no peak of memory hides in that of an earlier measurement."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], repeats: int = 1, warm_up: int = 0) -> list[float]:
    """Seconds of each call of `work` after those that are not counted."""
    moments = [now()]
    for _ in range(warm_up + repeats):
        work()
        moments.append(now())
    return [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)][warm_up:]


def start_peak(device: torch.device = DEVICE) -> int:
    """Forget the peak of memory so far; returns the bytes in use, on a CPU the highest so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return peak_memory(device)


def peak_memory(device: torch.device = DEVICE) -> int:
    """Peak bytes: of PyTorch's allocations on CUDA since `start_peak`, else of what was resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
