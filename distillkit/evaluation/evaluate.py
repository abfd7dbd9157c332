"""`distillkit evaluate`: several models, several suites, one result file.

Each model is loaded once, one at a time. The teacher stays in memory while students have to be compared with it, but
not on the accelerator while they are measured alone. Each unit's result is stored at once, so the same command
continues after a kill. A unit that fails is recorded, and the others are measured.
"""

from __future__ import annotations

import os
import shlex
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from rich.console import Console

from distillkit.config.errors import UserError
from distillkit.config.evaluate import TEACHER, EvaluateConfig
from distillkit.config.evaluate_options import check_evaluate_ready
from distillkit.config.yaml_files import as_section
from distillkit.console import INTERRUPTED, print_line
from distillkit.evaluation.generation import decode_as_graphs
from distillkit.evaluation.model_spec import LoadedModel, ModelSpec, release_memory
from distillkit.evaluation.progress import EvaluationProgress
from distillkit.evaluation.results import FAILURES, print_results, write_results
from distillkit.evaluation.suites import check_settings, measure
from distillkit.evaluation.units import Unit, UnitFiles, UnitResult, shortened, units_of
from distillkit.runs.provenance import commit, machine, versions
from distillkit.runs.secrets import hide_in_text, leave_out_secrets, without_secrets

CONFIG, UNITS = "config.yaml", "units"


def evaluate(
    config: EvaluateConfig | Mapping[str, Any] | str | os.PathLike[str], console: Console | None = None
) -> dict[str, Any]:
    """Run an evaluation, write `results.json` into its `output_path`, and return the content.

    config: the path of a YAML file, its content as a mapping, or a configuration.

    `failures` in the results lists what could not be measured; the tracebacks are in `failures.log` beside it.
    """
    console = console or Console()
    transformers.utils.logging.disable_progress_bar()
    if not console.is_terminal:
        datasets.disable_progress_bars()
    requested = as_section(EvaluateConfig, config)
    check_evaluate_ready(requested)
    check_settings(requested)
    config = shortened(requested) if requested.smoke else requested
    folder = Path(config.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    described = requested.model_dump(mode="json")
    (folder / CONFIG).write_text(yaml.safe_dump(leave_out_secrets(described), sort_keys=False))
    about = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["distillkit", "evaluate", str(folder / CONFIG)]),
        "config": without_secrets(described),
    }
    evaluation = _Evaluation(config, folder, console)
    try:
        evaluation.run()
    except KeyboardInterrupt:
        print_line(console, "interrupted; results so far are kept, and the same command continues")
        raise SystemExit(INTERRUPTED) from None
    finally:
        found, missing = evaluation.results_in_order(), evaluation.missing()
        results = write_results(folder, about, config, found, evaluation.failures, missing, evaluation.made_with)
    print_results(console, results, folder)
    return results


class _Evaluation:
    """The units of an evaluation: measured, failed or missing."""

    def __init__(self, config: EvaluateConfig, folder: Path, console: Console) -> None:
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.made_with = {"versions": versions(), "commit": commit(), "machine": machine(self.device)}
        self.failures: dict[Unit, str] = {}
        self._config = config
        self._units = list(units_of(config, self.device))
        self._found: dict[Unit, UnitResult] = {}
        self._files = UnitFiles(folder / UNITS)
        self._log = folder / FAILURES
        self._console = console
        self._progress = EvaluationProgress(console, 0)
        self._missing: list[Unit] = []
        self._teacher: LoadedModel | None = None
        self._specs: dict[str, ModelSpec] = {}
        teacher = None
        if config.teacher is not None:
            teacher = self._specs[TEACHER] = ModelSpec(TEACHER, config.teacher, config.trust_remote_code)
        for name, student in config.students.items():
            self._specs[name] = ModelSpec(name, student, config.trust_remote_code, teacher)

    def run(self) -> None:
        """Read the results that exist, and measure the rest."""
        self._log.unlink(missing_ok=True)
        for unit in self._units:
            try:
                measured = self._files.read(unit, self._state(unit))
            except Exception as error:  # the hub is not reachable, a file cannot be read
                if unit.suite != "model":
                    self._fail(unit, error)
                continue
            if measured is None:
                self._missing.append(unit)
            else:
                self._found[unit] = measured
        if known := sum(unit.suite != "model" for unit in self._found):
            print_line(self._console, f"{known} results exist already")
        for unit in self._missing:
            if unit.suite == "benchmarks":
                _ = self._specs[unit.model].served  # a server that does not answer ends it here, not after hours
        count = sum(unit.suite != "model" for unit in self._missing)
        with EvaluationProgress(self._console, count) as self._progress:
            for spec in self._specs.values():
                if units := [unit for unit in self._missing if unit.model == spec.name]:
                    self._measure_model(spec, units)

    def missing(self) -> list[Unit]:
        """Units that are neither measured nor failed yet; none after `run`."""
        known = self._found.keys() | self.failures.keys()
        return [unit for unit in self._units if unit.suite != "model" and unit not in known]

    def results_in_order(self) -> dict[Unit, UnitResult]:
        """Results so far, in the order of the YAML."""
        return {unit: self._found[unit] for unit in self._units if unit in self._found}

    def _measure_model(self, spec: ModelSpec, units: list[Unit]) -> None:
        try:
            loaded = self._load(spec, units)
        except Exception as error:
            for unit in units:
                self._missing.remove(unit)
                if unit.suite != "model":
                    self._fail(unit, error)
            return
        for unit in units:
            if spec.name != TEACHER and unit.suite != "model" and not unit.beside_teacher:
                self._release_teacher()
            self._missing.remove(unit)
            self._measure_unit(unit, loaded)
        del loaded
        self._release_teacher()
        release_memory()

    def _measure_unit(self, unit: Unit, loaded: LoadedModel) -> None:
        if unit.suite != "model":
            self._progress.begin(str(unit))
        start = time.perf_counter()
        try:
            result = measure(unit, loaded, self._load_teacher, self._config, self._progress.advance)
        except Exception as error:
            self._fail(unit, error)
        else:
            self._store(unit, UnitResult(result, self.made_with), time.perf_counter() - start)
        if unit in self.failures:  # only now is nothing referenced by the traceback
            release_memory()

    def _store(self, unit: Unit, measured: UnitResult, seconds: float) -> None:
        self._files.write(unit, self._state(unit), measured, seconds)
        self._found[unit] = measured
        if unit.suite != "model":
            self._progress.end(str(unit), seconds)

    def _state(self, unit: Unit) -> Any:
        """States of the models on which the result depends: the model, and where both are compared the teacher."""
        names = (unit.model, TEACHER) if unit.beside_teacher and TEACHER in self._specs else (unit.model,)
        return [self._specs[name].state for name in names]

    def _load(self, spec: ModelSpec, units: Sequence[Unit]) -> LoadedModel:
        self._progress.begin(f"loading {spec.name}")
        if spec.config.server is not None and all(unit.suite in ("model", "benchmarks") for unit in units):
            return spec.without_weights()
        return self._load_teacher() if spec.name == TEACHER else self._load_weights(spec)

    def _load_weights(self, spec: ModelSpec) -> LoadedModel:
        loaded = spec.load(self.device)
        if self._config.decoding == "graph":
            decode_as_graphs(loaded.model)
        return loaded

    def _load_teacher(self) -> LoadedModel:
        if self._teacher is None:
            self._teacher = self._load_weights(self._specs[TEACHER])
        self._teacher.reload()
        return self._teacher

    def _release_teacher(self) -> None:
        """Offload the teacher; drop it when no student is left to be compared with it."""
        if self._teacher is None:
            return
        if any(unit.beside_teacher for unit in self._missing):
            self._teacher.offload()
        else:
            self._teacher = None
            release_memory()

    def _fail(self, unit: Unit, error: Exception) -> None:
        """Record one line for the results, and the traceback in the log."""
        line = hide_in_text(" ".join(str(error).split()))
        self.failures[unit] = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{unit}\n{hide_in_text(''.join(traceback.format_exception(error)))}\n")
        self._progress.fail(str(unit), self.failures[unit])
