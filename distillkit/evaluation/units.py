"""The units of an evaluation, each one task of a suite for one model.

A unit is measured once. Its result is stored under a hash of everything that decides it: the model's files, the
settings, the text. So a killed evaluation continues, one with more models or tasks adds what is missing, and what has
changed is measured again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from distillkit.config import DatasetSource
from distillkit.config.evaluate import ESSAY_TASKS, TEACHER, EvaluateConfig
from distillkit.data.prepared import file_states
from distillkit.evaluation.local_benchmarks import task_files
from distillkit.runs.secrets import without_secrets
from distillkit.runs.writing import read_json, write_json

VERSIONS = {"model": 2, "divergence": 2, "generation": 1, "benchmarks": 4, "needles": 1, "long_context": 2, "speed": 3}
"""Version of each suite's maths, increased when the same models and settings give other numbers than before."""

LIBRARIES = ("torch", "transformers", "flash-linear-attention")
"""Packages whose version changes the outputs or the speed of a model."""

CONTINUATIONS, CHOICES = "continuations", "choices"
"""The tasks of `generation`."""

DOCUMENTS, LAST_WORD = "documents", "last_word"
"""The tasks of `long_context`; the second is followed by @ and a distance."""

SMOKE_SAMPLES, SMOKE_LENGTH, SMOKE_NEW_TOKENS = 2, 256, 32


@dataclass(frozen=True)
class Unit:
    """One task of a suite, for one model."""

    model: str
    suite: str
    task: str
    settings: dict[str, Any] = field(hash=False)
    """Everything but the models that decides the result, for JSON."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.model, self.suite, self.task) if part)

    @property
    def beside_teacher(self) -> bool:
        """Whether the teacher, where there is one, is needed too, and decides the result."""
        compared = self.suite == "divergence" or self.task == CONTINUATIONS or self.settings.get("kl", False)
        return self.model != TEACHER and compared


@dataclass(frozen=True)
class UnitResult:
    """The result of a unit, and its provenance."""

    result: Any
    made_with: dict[str, Any]
    """`versions`, `commit` and `machine` of the process that measured it."""


@dataclass(frozen=True)
class UnitFiles:
    """The files of unit results, each complete or absent."""

    folder: Path

    def read(self, unit: Unit, state: Any) -> UnitResult | None:
        """The result of a unit for models in `state`; None if it has not been measured."""
        content = read_json(self._path(unit, state))
        return UnitResult(content["result"], content["made_with"]) if content else None

    def write(self, unit: Unit, state: Any, measured: UnitResult, seconds: float) -> None:
        """Store the result of a unit."""
        path = self._path(unit, state)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"suite": unit.suite, "task": unit.task, "settings": unit.settings, "models": state}
        content = {
            **without_secrets(about),
            "made_with": measured.made_with,
            "seconds": round(seconds, 3),
            "result": measured.result,
        }
        write_json(path, content)

    def _path(self, unit: Unit, state: Any) -> Path:
        decided_by = [VERSIONS[unit.suite], unit.suite, unit.task, unit.settings, state]
        key = sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]
        name = "-".join(part for part in (unit.suite, quote(unit.task, safe=""), key) if part)
        return self.folder / unit.model / f"{name}.json"


def units_of(config: EvaluateConfig, device: torch.device) -> Iterator[Unit]:
    """All units, model by model, the teacher first; a student's units that need the teacher come first."""
    teacher = [] if config.teacher is None else [TEACHER]
    for model in [*teacher, *config.students]:
        yield Unit(model, "model", "", {})
        yield from sorted(_of_model(model, config, device), key=lambda unit: not unit.beside_teacher)


def _of_model(model: str, config: EvaluateConfig, device: torch.device) -> Iterator[Unit]:
    """Suite by suite."""
    libraries = _libraries()
    if config.divergence is not None and model != TEACHER:
        text = _files(config.divergence.dataset)
        settings = {**config.divergence.model_dump(mode="json"), "files": text, "limit": config.limit}
        yield Unit(model, "divergence", "", {**settings, **libraries})
    yield from _generation(model, config)
    yield from _benchmarks(model, config)
    yield from _needles(model, config)
    yield from _long_context(model, config)
    if config.speed is not None:
        threads = torch.get_num_threads() if device.type == "cpu" else None
        settings = config.speed.model_dump(mode="json", exclude={"contexts"})
        settings = {
            **settings,
            **libraries,
            "device": _name(device),
            "threads": threads,
            "decoding": config.decoding,
        }
        for context in config.speed.contexts:
            yield Unit(model, "speed", str(context), settings)


def shortened(config: EvaluateConfig) -> EvaluateConfig:
    """A smoke test of the evaluation: few samples, short texts, and a folder of its own."""
    suites: dict[str, Any] = {}
    if (divergence := config.divergence) is not None:
        length = min(divergence.sequence_length, SMOKE_LENGTH)
        suites["divergence"] = divergence.model_copy(update={"sequence_length": length})
    if (generation := config.generation) is not None:
        tokens = min(generation.new_tokens, SMOKE_NEW_TOKENS)
        suites["generation"] = generation.model_copy(update={"new_tokens": tokens})
    if (needles := config.needles) is not None:
        suites["needles"] = needles.model_copy(update={"lengths": needles.lengths[:1], "depths": 1})
    if (long := config.long_context) is not None:
        length = min(long.length, SMOKE_LENGTH)
        buckets = [edge for edge in long.position_buckets if edge < length] or [0]
        changes = {"length": length, "position_buckets": buckets, "distances": long.distances[:1]}
        suites["long_context"] = long.model_copy(update=changes)
    if (speed := config.speed) is not None:
        suites["speed"] = speed.model_copy(update={"contexts": speed.contexts[:1], "decode_tokens": 2, "repeats": 1})
    path = str(Path(config.output_path) / "smoke")
    return config.model_copy(update={"output_path": path, "limit": SMOKE_SAMPLES, **suites})


def _generation(model: str, config: EvaluateConfig) -> Iterator[Unit]:
    if (generation := config.generation) is None:
        return
    settings = generation.model_dump(mode="json")
    common = {
        **{name: settings.pop(name) for name in ("seed", "batch_size")},
        **_libraries(),
        "limit": config.limit,
        "decoding": config.decoding,
    }
    asked = {name: settings.pop(name) for name in ("questions", "num_questions", "num_fewshot")}
    yield Unit(model, "generation", CONTINUATIONS, {**settings, **common, "files": _files(generation.dataset)})
    if generation.questions is not None:
        yield Unit(model, "generation", CHOICES, {**asked, **common, "files": _files(generation.questions)})


def _benchmarks(model: str, config: EvaluateConfig) -> Iterator[Unit]:
    if config.benchmarks is None:
        return
    settings = config.benchmarks.model_dump(mode="json", exclude={"tasks", "include_path", "data"})
    tasks = [[str(file), *_state(file)] for folder in config.benchmarks.include_path for file in _task_files(folder)]
    decided_by = {**_libraries(), "limit": config.limit, "lm_eval": _version("lm_eval")}
    described = config.teacher if model == TEACHER else config.students[model]
    if described is None or described.server is None:
        decided_by["decoding"] = config.decoding
    else:
        decided_by["server"] = described.server.model_dump(include={"url", "model", "max_length"})
    for task in config.benchmarks.tasks:
        read = [] if (data := config.benchmarks.data) is None else task_files(task, data)
        own = [[str(file), *_state(file)] for file in [*_files_beside(task), *read]]
        yield Unit(model, "benchmarks", task, {**settings, **decided_by, "files": [*tasks, *own]})


def _needles(model: str, config: EvaluateConfig) -> Iterator[Unit]:
    """One unit per task and length, so that a length that fails does not affect shorter ones."""
    if config.needles is None:
        return
    settings = {
        **config.needles.model_dump(mode="json", exclude={"tasks", "lengths", "haystack"}),
        **_libraries(),
        "limit": config.limit,
        "decoding": config.decoding,
    }
    for task in config.needles.tasks:
        haystack = {}
        if task in ESSAY_TASKS and (source := config.needles.haystack) is not None:
            haystack = {"haystack": source.model_dump(mode="json"), "files": _files(source)}
        for length in config.needles.lengths:
            yield Unit(model, "needles", f"{task}@{length}", {**settings, **haystack})


def _long_context(model: str, config: EvaluateConfig) -> Iterator[Unit]:
    if (suite := config.long_context) is None:
        return
    common = {"dataset", "text_field", "seed", "prefill_tokens"}
    decided_by = {**_libraries(), "limit": config.limit, "files": _files(suite.dataset)}
    own = {"documents", "length", "position_buckets", "kl"}
    settings = suite.model_dump(mode="json", include=common | own)
    if model == TEACHER:
        del settings["kl"]
    yield Unit(model, "long_context", DOCUMENTS, {**settings, **decided_by})
    if suite.passages is not None:
        settings = suite.model_dump(mode="json", include={*common, "passages", "num_passages", "batch_size"})
        settings |= {"longest": max(suite.distances), "passage_files": _files(suite.passages)}
        for distance in suite.distances:
            yield Unit(model, "long_context", f"{LAST_WORD}@{distance}", {**settings, **decided_by})


def _files(source: DatasetSource) -> list[list[Any]]:
    """States of local text files; a dataset of the hub is identified by its name and revision."""
    return [list(state) for state in file_states(source.disk_path)] if source.disk_path is not None else []


def _task_files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _files_beside(task: str) -> list[Path]:
    """For a task that is a file, all files of its folder, which it may read; none for a name."""
    return sorted(file for file in Path(task).parent.iterdir() if file.is_file()) if Path(task).is_file() else []


def _libraries() -> dict[str, Any]:
    return {"libraries": {name: _version(name) for name in LIBRARIES}}


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
