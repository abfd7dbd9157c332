"""What can be known before a run starts, and before torch is imported: files that do not exist, things not built."""

import glob
import os

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.config.run import RunConfig
from distillkit.config.unbuilt import refuse_unbuilt


def check_ready(config: RunConfig) -> None:
    """Raises `UserError` where the run could not start."""
    refuse_unbuilt(config)
    _refuse_split_models()
    for key, source in _sources(config).items():
        check_source(f"{key}.disk_path", source)
    if config.model is not None:
        check_model_path("model", config.model)
    if config.teacher.kind == "hf":
        check_model_path("teacher.path", config.teacher.path)
    if config.teacher.kind != "vllm" and config.teacher.background is not None:
        check_source("teacher.background", DatasetSource(disk_path=config.teacher.background))
    if os.path.exists(config.output_path) and not os.path.isdir(config.output_path):
        raise UserError(f"output_path: {config.output_path!r} is a file; name a folder")


def _refuse_split_models() -> None:
    """As training_args.fsdp and training_args.deepspeed are refused, which accelerate's configuration goes before."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() not in ("", "0", "false"):
            raise UserError(
                f"accelerate: {name} is not supported yet, each GPU holds the models whole; launch with torchrun, or "
                f"without {name}"
            )


def _sources(config: RunConfig) -> dict[str, DatasetSource]:
    named = {"dataset.train_dataset": config.dataset.train_dataset, "dataset.eval_dataset": config.dataset.eval_dataset}
    if config.evaluation is not None:
        named["evaluation.dataset"] = config.evaluation.dataset
    return {key: source for key, source in named.items() if source is not None}


def check_source(key: str, source: DatasetSource) -> None:
    """Raises `UserError`, naming `key`, where local files of text do not exist."""
    path = source.disk_path
    if path is not None and not os.path.exists(path) and not glob.glob(path, recursive=True):
        raise UserError(f"{key}: no such file or folder: {path!r}")


def check_model_path(key: str, path: str) -> None:
    """Raises `UserError`, naming `key`, where a model can only be on disk (no hub id looks so) and is not."""
    looks_local = path.startswith(("/", ".")) or path.count("/") > 1 or path.endswith(".gguf")
    if looks_local and not os.path.exists(path):
        raise UserError(f"{key}: no such file or folder: {path!r}")
