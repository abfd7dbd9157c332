"""Result files and run folders as the report reads them: of their JSON nothing is taken for granted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.config.errors import UserError

EVALUATION = "distillkit-evaluation"
FORMAT = 1
RESULTS, RUN, METRICS, PHASES = "results.json", "run.json", "metrics.jsonl", "phases"

OUTLINE: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "models": (dict, dict),
    "divergence": (dict, dict),
    "benchmarks": (dict, dict, dict),
    "needles": (dict, dict, list, dict),
    "speed": (dict, list, dict),
    "failures": (list, dict),
    "missing": (list, dict),
}
"""What lies in what, in an evaluation."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A result file of `distillkit evaluate`."""

    path: Path
    content: Json

    @property
    def caveats(self) -> list[str]:
        """What a reader must know before the numbers, one sentence each."""
        config, told = section(self.content, "config"), []
        if config.get("smoke"):
            told.append("A smoke test: two samples of everything at the shortest length. Its numbers mean nothing.")
        elif (limit := number(config, "limit")) is not None:
            told.append(f"Measured on at most {limit:,.0f} samples of each task.")
        if missing := rows(self.content, "missing"):
            told.append(f"An evaluation was interrupted; results that are missing: {len(missing)}.")
        return told


@dataclass(frozen=True)
class Phase:
    """A stretch of training under one configuration; a run without phases is one of them, without a name."""

    name: str | None
    config: Json
    metrics: list[Json]
    results: Json


@dataclass(frozen=True)
class Run:
    """A distillation, finished (`results` is not empty) or not. `path`: its folder, or the file that was named."""

    path: Path
    results: Json
    record: Json
    phases: list[Phase]

    @property
    def config(self) -> Json:
        return section(self.results, "config") or section(self.record, "config")

    @property
    def name(self) -> str:
        """What a person calls it: the project, or the file or folder where it gives no name."""
        project = self.config.get("project_name")
        if isinstance(project, str) and project != "distillkit":
            return project
        return self.path.stem if self.path.suffix == ".json" else self.path.resolve().name


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
    evaluations: list[Evaluation] = []
    runs: list[Run] = []
    for path in paths:
        if not path.exists():
            raise UserError("RESULTS", f"no such file or folder: {str(path)!r}")
        file = path / RESULTS if path.is_dir() else path
        content = read_json(file) if file.exists() else {}
        if content.get("kind") == EVALUATION:
            if content.get("format") != FORMAT:
                raise UserError(
                    "RESULTS", f"{str(file)!r} has format {content.get('format')}, this version reads {FORMAT}"
                )
            _check_shape(content, file)
            evaluations.append(Evaluation(file, content))
        elif "training" in content or (not content and (path / RUN).exists()):
            folder = file.parent if file.name == RESULTS else None
            runs.append(_run(path if folder is None or path.is_dir() else folder, folder, content))
        else:
            what = "holds no" if content or path.is_file() else f"has no {RESULTS}, so it holds no"
            raise UserError(
                "RESULTS", f"{str(path)!r} {what} result of distillkit; name the output_path of a run or an evaluation"
            )
    return Results(evaluations, runs)


def section(content: Json, key: str) -> Json:
    """The mapping under a key; empty where there is none."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def rows(content: Json, key: str) -> list[Json]:
    """The mappings listed under a key; empty where there are none."""
    value = content.get(key)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def number(content: Json, *keys: str) -> float | None:
    """The number at the end of the keys; None where there is none."""
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_shape(content: Json, file: Path) -> None:
    """Hold an evaluation to its outline, by suite and model; what is in there is looked for, never taken for granted.

    Raises:
        UserError: something is no mapping or list where one should be.
    """

    def check(value: Any, kinds: Sequence[type], where: str) -> None:
        if value is None:
            return
        if not isinstance(value, kinds[0]):
            what = "mapping" if kinds[0] is dict else "list"
            raise UserError("RESULTS", f"{str(file)!r} is damaged: {where} is no {what}")
        parts: Any = value
        inside = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for key, inner in inside if len(kinds) > 1 else ():
            check(inner, kinds[1:], f"{where}.{key}")

    for key, kinds in OUTLINE.items():
        check(content.get(key), kinds, key)


def _run(path: Path, folder: Path | None, results: Json) -> Run:
    record = read_json(folder / RUN) if folder is not None and (folder / RUN).exists() else {}
    config = section(results, "config") or section(record, "config")
    phases = [] if folder is None else [_phase(each, rows(results, PHASES)) for each in _phase_folders(folder)]
    if not phases:
        metrics = _read_metrics(folder / METRICS) if folder is not None else rows(results, "curve")
        phases = [Phase(None, config, metrics, results)]
    return Run(path, results, record, phases)


def _phase_folders(folder: Path) -> list[Path]:
    """`phases/1-alignment`, `phases/2-distillation`, … in their order, begun ones only."""
    numbered = [
        (int(each.name.split("-")[0]), each)
        for each in (folder / PHASES).glob("[0-9]*-*")
        if each.name.split("-")[0].isdigit() and ((each / RUN).exists() or (each / METRICS).exists())
    ]
    return [each for _, each in sorted(numbered)]


def _phase(folder: Path, summaries: list[Json]) -> Phase:
    name = folder.name.split("-", 1)[1]
    results = read_json(folder / RESULTS) if (folder / RESULTS).exists() else {}
    record = read_json(folder / RUN) if (folder / RUN).exists() else {}
    summary = next((each for each in summaries if each.get("name") == name), {})
    config = section(results, "config") or section(record, "config")
    return Phase(name, config, _read_metrics(folder / METRICS), {**summary, **results})


def read_json(path: Path) -> Json:
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


def _read_metrics(path: Path) -> list[Json]:
    """The lines of a metrics file. Those that a kill cut off are left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
