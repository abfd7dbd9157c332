"""Checks before a run starts and before torch is imported: files that do not exist, launchers not supported."""

import glob
import importlib.util
import os

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.config.parallel import DIVIDED
from distillkit.config.resolve import Run
from distillkit.config.run import RunConfig
from distillkit.config.server import check_server_key
from distillkit.config.teacher import PACKAGE_OF, Quantization


def check_ready(run: Run) -> None:
    """Raises `UserError` where the run, or one of its phases, could not start."""
    _refuse_split_models()
    output_path = run.config.output_path
    if os.path.exists(output_path) and not os.path.isdir(output_path):
        raise UserError("output_path", f"{output_path!r} is a file; name a folder")
    for phase in run.phases:
        try:
            _check_inputs(phase.config, check_model=phase.index == 0)  # later ones start from the phase before
        except UserError as error:
            raise (phase.located(error) if phase.names(error.key) else error) from None


def check_processes(run: Run) -> None:
    """Raises `UserError` where this is not one of as many processes as `parallel` divides models over."""
    if run.config.parallel is not None:
        run.config.parallel.sizes(int(os.environ.get("WORLD_SIZE", "1")))


def _check_inputs(config: RunConfig, *, check_model: bool) -> None:
    for key, source in text_sources(config).items():
        check_source(f"{key}.disk_path", source)
    if config.model is not None and check_model:
        check_model_path("model", config.model)
    if config.teacher.kind == "hf":
        check_model_path("teacher.path", config.teacher.path)
        _check_quantization(config.teacher.quantization)
    if config.teacher.kind == "server":
        check_server_key("teacher", config.teacher)
    if config.teacher.background is not None:
        check_source("teacher.background", DatasetSource(disk_path=config.teacher.background))


def _check_quantization(kind: Quantization | None) -> None:
    package = None if kind is None else PACKAGE_OF.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError("teacher.quantization", f"{kind} needs {package}: pip install {package}")


def _refuse_split_models() -> None:
    """Refuse FSDP and DeepSpeed from accelerate's configuration, as from training_args."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() not in ("", "0", "false"):
            raise UserError(
                "accelerate",
                f"its {name} divides no models here; launch with torchrun, and write {DIVIDED} in the YAML",
            )


def text_sources(config: RunConfig) -> dict[str, DatasetSource]:
    """The text that a run names, by the key of the YAML."""
    named = {"dataset.train_dataset": config.dataset.train_dataset, "dataset.eval_dataset": config.dataset.eval_dataset}
    if config.evaluation is not None:
        named["evaluation.dataset"] = config.evaluation.dataset
    if config.rollouts is not None:
        named["rollouts.prompts"] = config.rollouts.prompts
    return {key: source for key, source in named.items() if source is not None}


def check_source(key: str, source: DatasetSource) -> None:
    """Raises `UserError`, naming `key`, where local files of text do not exist."""
    path = source.disk_path
    if path is not None and not os.path.exists(path) and not glob.glob(path, recursive=True):
        raise UserError(key, f"no such file or folder: {path!r}")


def check_model_path(key: str, path: str) -> None:
    """Raises `UserError`, naming `key`, where a path cannot be a hub id and does not exist."""
    if not path.strip():
        raise UserError(key, "is empty; name a folder, a hub id or a .gguf file")
    looks_local = path.startswith(("/", ".")) or path.count("/") > 1 or path.endswith(".gguf")
    if looks_local and not os.path.exists(path):
        raise UserError(key, f"no such file or folder: {path!r}")


def named_source(key: str, dataset: str, split: str | None) -> DatasetSource:
    """The dataset of an option: files, where such files exist, else a dataset of the hub. Raises `UserError`."""
    is_local = os.path.exists(dataset) or glob.has_magic(dataset)
    if not is_local:
        check_model_path(key, dataset)
    return DatasetSource.parse({"disk_path" if is_local else "repo_id": dataset, "split": split})
