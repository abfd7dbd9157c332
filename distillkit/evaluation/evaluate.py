"""`distillkit evaluate`: several models, several suites, one result file.

Models are loaded once each and one at a time; the teacher stays for as long as students are still to be compared with
it, off the accelerator while they are measured by themselves. Every unit's result is kept at once, so the same command
goes on after a kill. A unit that fails is recorded, and the others go on.
"""

from __future__ import annotations

import shlex
import time
import traceback
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from rich.console import Console

from distillkit.config.errors import UserError
from distillkit.config.evaluate import TEACHER, EvaluateConfig
from distillkit.console import INTERRUPTED, print_line
from distillkit.evaluation.model_spec import Loaded, Subject, release_memory
from distillkit.evaluation.progress import EvaluationProgress
from distillkit.evaluation.results import FAILURES, print_results, write_results
from distillkit.evaluation.suites import measure
from distillkit.evaluation.units import Measured, Unit, UnitResults, shortened, units_of
from distillkit.runs.provenance import commit, machine, versions, without_secrets

CONFIG, UNITS = "config.yaml", "units"


def evaluate(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure what `config` names, write `results.json` into its `output_path`, and return what that holds.

    `failures` in it tells what could not be measured; the tracebacks are in `failures.log` beside it.
    """
    console = console or Console()
    transformers.utils.logging.disable_progress_bar()
    if not console.is_terminal:
        datasets.disable_progress_bars()
    asked, config = config, shortened(config) if config.smoke else config
    folder = Path(config.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(asked.model_dump(mode="json"), sort_keys=False))
    about = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["distillkit", "evaluate", str(folder / CONFIG)]),
        "config": without_secrets(asked.model_dump(mode="json")),
    }
    evaluation = _Evaluation(config, folder, console)
    try:
        evaluation.run()
    except KeyboardInterrupt:
        print_line(console, "interrupted; what was measured is kept, and the same command goes on")
        raise SystemExit(INTERRUPTED) from None
    finally:
        found, missing = evaluation.found_in_order(), evaluation.missing()
        results = write_results(folder, about, config, found, evaluation.failures, missing, evaluation.made_with)
    print_results(console, results, folder)
    return results


class _Evaluation:
    """The units of an evaluation: those whose results are there, and the others until they are, too."""

    def __init__(self, config: EvaluateConfig, folder: Path, console: Console) -> None:
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.made_with = {"versions": versions(), "commit": commit(), "machine": machine(self.device)}
        self.failures: dict[Unit, str] = {}
        self._config = config
        self._units = list(units_of(config, self.device))
        self._found: dict[Unit, Measured] = {}
        self._kept = UnitResults(folder / UNITS)
        self._log = folder / FAILURES
        self._console = console
        self._progress = EvaluationProgress(console, 0)
        self._missing: list[Unit] = []
        self._teacher: Loaded | None = None
        self._subjects: dict[str, Subject] = {}
        teacher = None
        if config.teacher is not None:
            teacher = self._subjects[TEACHER] = Subject(TEACHER, config.teacher, config.trust_remote_code)
        for name, student in config.students.items():
            self._subjects[name] = Subject(name, student, config.trust_remote_code, teacher)

    def run(self) -> None:
        """Find what is there, measure what is not."""
        self._log.unlink(missing_ok=True)
        for unit in self._units:
            try:
                measured = self._kept.read(unit, self._state(unit))
            except Exception as error:  # a hub that does not answer, a file that cannot be read
                if unit.suite != "model":
                    self._fail(unit, error)
                continue
            if measured is None:
                self._missing.append(unit)
            else:
                self._found[unit] = measured
        if known := sum(unit.suite != "model" for unit in self._found):
            print_line(self._console, f"{known} results are there already")
        count = sum(unit.suite != "model" for unit in self._missing)
        with EvaluationProgress(self._console, count) as self._progress:
            for subject in self._subjects.values():
                if units := [unit for unit in self._missing if unit.model == subject.name]:
                    self._measure_model(subject, units)

    def missing(self) -> list[Unit]:
        """What is neither measured nor failed by now; nothing, once `run` is through."""
        known = self._found.keys() | self.failures.keys()
        return [unit for unit in self._units if unit.suite != "model" and unit not in known]

    def found_in_order(self) -> dict[Unit, Measured]:
        """What is measured by now, as the YAML has it in order."""
        return {unit: self._found[unit] for unit in self._units if unit in self._found}

    def _measure_model(self, subject: Subject, units: list[Unit]) -> None:
        try:
            loaded = self._load(subject)
        except Exception as error:
            for unit in units:
                self._missing.remove(unit)
                if unit.suite != "model":
                    self._fail(unit, error)
            return
        for unit in units:
            if subject.name != TEACHER and unit.suite not in ("model", "divergence"):
                self._let_teacher_rest()
            self._missing.remove(unit)
            self._measure_unit(unit, loaded)
        del loaded
        self._let_teacher_rest()
        release_memory()

    def _measure_unit(self, unit: Unit, loaded: Loaded) -> None:
        if unit.suite != "model":
            self._progress.begin(str(unit))
        start = time.perf_counter()
        try:
            result = measure(unit, loaded, self._awake_teacher, self._config, self._progress.reach)
        except Exception as error:
            self._fail(unit, error)
        else:
            self._keep(unit, Measured(result, self.made_with), time.perf_counter() - start)
        if unit in self.failures:  # only now does nobody hold what the traceback held
            release_memory()

    def _keep(self, unit: Unit, measured: Measured, seconds: float) -> None:
        self._kept.write(unit, self._state(unit), measured, seconds)
        self._found[unit] = measured
        if unit.suite != "model":
            self._progress.end(str(unit), seconds)

    def _state(self, unit: Unit) -> Any:
        """What the result depends on: the files of the model, and of the teacher where it takes part."""
        names = (unit.model, TEACHER) if unit.suite == "divergence" else (unit.model,)
        return [self._subjects[name].state for name in names]

    def _load(self, subject: Subject) -> Loaded:
        self._progress.begin(f"loading {subject.name}")
        return self._awake_teacher() if subject.name == TEACHER else subject.load(self.device)

    def _awake_teacher(self) -> Loaded:
        if self._teacher is None:
            self._teacher = self._subjects[TEACHER].load(self.device)
        self._teacher.wake()
        return self._teacher

    def _let_teacher_rest(self) -> None:
        """Keep it only while a student is still to be compared with it."""
        if self._teacher is None:
            return
        if any(unit.suite == "divergence" for unit in self._missing):
            self._teacher.park()
        else:
            self._teacher = None
            release_memory()

    def _fail(self, unit: Unit, error: Exception) -> None:
        """One line for the results, everything else for the log."""
        line = " ".join(str(error).split())
        self.failures[unit] = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{unit}\n{''.join(traceback.format_exception(error))}\n")
        self._progress.fail(str(unit), self.failures[unit])
