"""Result files and folders of runs as the report reads them. Their JSON may be damaged or unfinished."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distillkit.config.errors import UserError
from distillkit.reporting import numbers
from distillkit.reporting.numbers import Form
from distillkit.runs.names import METRICS, PHASES, RESULTS, RUN

EVALUATION = "distillkit-evaluation"
FORMAT = 1

OUTLINE: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "models": (dict, dict),
    "divergence": (dict, dict),
    "generation": (dict, dict, dict),
    "benchmarks": (dict, dict, dict),
    "needles": (dict, dict, list, dict),
    "long_context": (dict, dict),
    "speed": (dict, list, dict),
    "failures": (list, dict),
    "missing": (list, dict),
}
"""The containers of an evaluation, from the outermost to the innermost."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A result file of `distillkit evaluate`."""

    path: Path
    content: Json

    @property
    def caveats(self) -> list[str]:
        """What a reader must know before the numbers, one sentence each."""
        config, found = section(self.content, "config"), []
        if config.get("smoke"):
            found.append("A smoke test: two samples of everything at the shortest length. Its numbers mean nothing.")
        elif (limit := number(config, "limit")) is not None:
            found.append(f"Measured on at most {limit:,.0f} samples of each task.")
        if missing := len(rows(self.content, "missing")):
            found.append(f"An evaluation was interrupted; results that are missing: {missing}.")
        return found


@dataclass(frozen=True)
class Phase:
    """A part of the training under one configuration. A run without phases has one, without a name."""

    name: str | None
    config: Json
    metrics: list[Json]
    results: Json


@dataclass(frozen=True)
class Run:
    """A distillation, finished (`results` is not empty) or not.

    name: the project; where none is configured, the file or folder; numbered where several runs of a report share it.
    path: its folder, or the given file.
    """

    name: str
    path: Path
    config: Json
    results: Json
    record: Json
    phases: list[Phase]


@dataclass(frozen=True)
class Results:
    """Everything that a report is about."""

    evaluations: list[Evaluation]
    runs: list[Run]


def read_results(paths: Sequence[Path]) -> Results:
    """Read result files and folders, in their order.

    Raises:
        UserError: one of them does not exist, cannot be read, or holds no result of distillkit.
    """
    found = Results([], [])
    for path in paths:
        if not path.exists():
            raise UserError("RESULTS", f"no such file or folder: {str(path)!r}")
        file = path / RESULTS if path.is_dir() else path
        content = _read_if_there(file)
        if content.get("kind") == EVALUATION:
            _check_evaluation(content, file)
            found.evaluations.append(Evaluation(file, content))
        elif "training" in content or (not content and (path / RUN).exists()):
            found.runs.append(_read_run(file.parent if file.name == RESULTS else file, content))
        else:
            what = "holds no" if content or path.is_file() else f"has no {RESULTS}, so it holds no"
            raise UserError(
                "RESULTS", f"{str(path)!r} {what} result of distillkit; name the output_path of a run or an evaluation"
            )
    names = numbers.numbered([run.name for run in found.runs])
    runs = [replace(run, name=name) for run, name in zip(found.runs, names, strict=True)]
    return Results(found.evaluations, runs)


def section(content: Json, *keys: str) -> Json:
    """The mapping at the end of the keys; empty where there is none."""
    value = _at(content, keys)
    return value if isinstance(value, dict) else {}


def rows(content: Json, *keys: str) -> list[Json]:
    """The mappings in the list at the end of the keys; empty where there are none."""
    value = _at(content, keys)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def number(content: Json, *keys: str) -> float | None:
    """The number at the end of the keys; None where there is none."""
    value = _at(content, keys)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def shown(form: Form, content: Json, *keys: str) -> str:
    """The number at the end of the keys as text; a dash where there is none."""
    return numbers.shown(number(content, *keys), form)


def read_content(path: Path) -> Json:
    """Raises `UserError` for what cannot be read, or is no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError("RESULTS", f"{str(path)!r} is not JSON: {error}") from None
    except OSError as error:
        raise UserError("RESULTS", f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError("RESULTS", f"{str(path)!r} holds no result of distillkit")
    return content


def _at(content: Json, keys: Sequence[str]) -> Any:
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _check_evaluation(content: Json, file: Path) -> None:
    """Check format and OUTLINE. Values inside of the innermost containers are not checked.

    Raises:
        UserError: the format is another, or something is no mapping or list where one should be.
    """

    def check(value: Any, kinds: Sequence[type], where: str) -> None:
        if value is None or not kinds:
            return
        if not isinstance(value, kinds[0]):
            what = "mapping" if kinds[0] is dict else "list"
            raise UserError("RESULTS", f"{str(file)!r} is damaged: {where} is not a {what}")
        inside: Any = value
        for key, inner in inside.items() if isinstance(inside, dict) else enumerate(inside):
            check(inner, kinds[1:], f"{where}.{key}")

    if content.get("format") != FORMAT:
        raise UserError("RESULTS", f"{str(file)!r} has format {content.get('format')}, this version reads {FORMAT}")
    for key, kinds in OUTLINE.items():
        check(content.get(key), kinds, key)


def _read_run(path: Path, results: Json) -> Run:
    """A run from its folder, or from a file that holds results and `curve` alone."""
    if path.is_file():
        config = section(results, "config")
        phases = [Phase(None, config, rows(results, "curve"), results)]
        return Run(_name(config, path.stem), path, config, results, {}, phases)
    folders = [
        (int(number), folder)
        for folder in (path / PHASES).glob("[0-9]*-*")
        if (number := folder.name.split("-")[0]).isdigit() and any((folder / name).exists() for name in (RUN, METRICS))
    ]
    whole = _read_phase(path, None, results)
    phases = []
    for _, folder in sorted(folders):
        name = folder.name.split("-", 1)[1]
        summary = next((each for each in rows(results, PHASES) if each.get("name") == name), {})
        phases.append(_read_phase(folder, name, {**summary, **_read_if_there(folder / RESULTS)}))
    name = _name(whole.config, path.resolve().name)
    return Run(name, path, whole.config, results, _read_if_there(path / RUN), phases or [whole])


def _name(config: Json, otherwise: str) -> str:
    project = config.get("project_name")
    return project if isinstance(project, str) and project != "distillkit" else otherwise


def _read_phase(folder: Path, name: str | None, results: Json) -> Phase:
    config = section(results, "config") or section(_read_if_there(folder / RUN), "config")
    return Phase(name, config, _read_metrics(folder / METRICS), results)


def _read_if_there(path: Path) -> Json:
    return read_content(path) if path.exists() else {}


def _read_metrics(path: Path) -> list[Json]:
    """The lines of a metrics file, without those that a kill cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict)]
