"""An `EvaluateConfig` from a YAML file, options and overrides of the command line. Imports no torch."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillkit.config.errors import UserError, one_of
from distillkit.config.evaluate import NAME, SUITES, EvaluateConfig
from distillkit.config.readiness import check_model_path, check_source
from distillkit.config.server import check_server_key
from distillkit.config.yaml_files import apply_override, read_yaml

MARKER, CHECKPOINTS = "complete", "checkpoint-*"
"""In the folder of a run: the file of a complete checkpoint, and the folders of checkpoints."""


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of the command line; an option takes precedence over the key of the file."""

    teacher: str | None = None
    """Replaces the whole section of the file; so does `students`."""
    gguf_file: str | None = None
    students: Sequence[str] = ()
    """Paths, or name=path."""
    suites: Sequence[str] = ()
    """Suites to run, with their keys in the file; by default all of the file, or divergence."""
    data: str | None = None
    """Text of divergence, generation and long_context, and haystack of needles, where these run."""
    out: str | None = None
    limit: int | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)
    """Keys that are set to true."""


def load_evaluate_config(
    path: Path | None, overrides: Sequence[str] = (), options: EvaluateOptions | None = None
) -> EvaluateConfig:
    """The evaluation that a YAML file describes, changed by options and then by `key=value`. Raises `UserError`."""
    options = options or EvaluateOptions()
    data = {} if path is None else read_yaml(path)
    _choose_suites(data, options, with_file=path is not None)
    _set_models(data, options)
    values = {"output_path": options.out, "limit": options.limit}
    data |= {key: value for key, value in values.items() if value is not None}
    data |= {key: True for key, given in options.switches.items() if given}
    for override in overrides:
        apply_override(data, override)
    if path is None and "output_path" not in data:
        raise UserError("--out", "is missing: the folder for results.json")
    return EvaluateConfig.parse(data)


def check_evaluate_ready(config: EvaluateConfig) -> None:
    """Raises `UserError` where the evaluation could not start: files that do not exist, lm-eval not installed."""
    for key, model in config.models().items():
        check_model_path(f"{key}.path", model.path)
        _refuse_unfinished_run(f"{key}.path", Path(model.path))
        if model.server is not None:
            check_server_key(f"{key}.server", model.server)
    if config.divergence is not None:
        check_source("divergence.dataset.disk_path", config.divergence.dataset)
    if config.generation is not None:
        check_source("generation.dataset.disk_path", config.generation.dataset)
        if config.generation.questions is not None:
            check_source("generation.questions.disk_path", config.generation.questions)
    if config.needles is not None and config.needles.haystack is not None:
        check_source("needles.haystack.disk_path", config.needles.haystack)
    if config.long_context is not None:
        check_source("long_context.dataset.disk_path", config.long_context.dataset)
        if config.long_context.passages is not None:
            check_source("long_context.passages.disk_path", config.long_context.passages)
    if config.benchmarks is not None:
        served = any(model.server is not None for model in config.models().values())
        for package in ("lm_eval", "tenacity") if served else ("lm_eval",):  # the second of lm-eval's own extra `api`
            if importlib.util.find_spec(package) is None:
                raise UserError("benchmarks", f"needs {package}; install it with: pip install 'distillkit[eval]'")
        for index, folder in enumerate(config.benchmarks.include_path):
            if not os.path.isdir(folder):
                raise UserError(f"benchmarks.include_path[{index}]", f"no such folder: {folder!r}")
        if (data := config.benchmarks.data) is not None and not os.path.isdir(data):
            raise UserError("benchmarks.data", f"no such folder: {data!r}")
    if os.path.exists(config.output_path) and not os.path.isdir(config.output_path):
        raise UserError("output_path", f"{config.output_path!r} is a file; name a folder")
    if os.path.exists(os.path.join(config.output_path, "run.json")):
        raise UserError(
            "output_path",
            f"{config.output_path!r} contains a run, whose results.json would be overwritten; name another folder, "
            f"such as {os.path.join(config.output_path, 'evaluation')}",
        )


def _choose_suites(data: dict[str, Any], options: EvaluateOptions, *, with_file: bool) -> None:
    wanted = list(options.suites)
    for suite in wanted:
        if suite not in SUITES:
            raise UserError("--suite", f"{one_of(suite, SUITES)}")
    if not wanted and not with_file and options.data is not None:
        wanted = ["divergence"]
    if wanted:
        for suite in set(SUITES) - set(wanted):
            data.pop(suite, None)
        data |= {suite: data.get(suite) or {} for suite in wanted}
    readers = {"divergence": "dataset", "generation": "dataset", "needles": "haystack", "long_context": "dataset"}
    for suite, key in readers.items():
        if options.data is not None and isinstance(data.get(suite), dict):
            data[suite] = {**data[suite], key: {"disk_path": options.data}}
    if options.data is not None and not any(isinstance(data.get(suite), dict) for suite in readers):
        raise UserError("--data", "has no effect: no suite runs that reads a text; add --suite divergence")


def _set_models(data: dict[str, Any], options: EvaluateOptions) -> None:
    if options.teacher is not None:
        kwargs = {} if options.gguf_file is None else {"kwargs": {"gguf_file": options.gguf_file}}
        data["teacher"] = {"path": options.teacher, **kwargs}
    elif options.gguf_file is not None:
        raise UserError("--gguf-file", "has no effect without --teacher; in a YAML file it is teacher.kwargs.gguf_file")
    students: dict[str, Any] = {}
    for text in options.students:
        name, equals, path = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            name, path = Path(text).expanduser().resolve().name if os.path.exists(text) else text.split("/")[-1], text
        if name in students:
            raise UserError("--student", f"two are named {name!r}; name them: --student {name}-2={path}")
        students[name] = {"path": path}
    if students:
        data["students"] = students


def _refuse_unfinished_run(key: str, folder: Path) -> None:
    """A run's folder contains its student only when the run is finished."""
    if not (folder / "run.json").exists() or any(folder.glob("*.safetensors")):
        return
    places = [*folder.glob(CHECKPOINTS), *folder.glob(f"phases/*/{CHECKPOINTS}")]
    whole = sorted((path for path in places if (path / MARKER).exists()), key=lambda path: path.stat().st_mtime)
    remedy = f"name a checkpoint of it, such as {whole[-1]}" if whole else "it has no checkpoint yet"
    raise UserError(key, f"the run in {str(folder)!r} is not finished; {remedy}")
