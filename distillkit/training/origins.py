"""What a run was made from, kept in `run.json`: the weights that it begins with, its teacher's, and its data files."""

from pathlib import Path
from typing import Any

from distillkit.config import DatasetSource, RunConfig
from distillkit.config.teacher import HFTeacherConfig
from distillkit.data.sources import local_files
from distillkit.models.loading import weights_sha256
from distillkit.runs.folder import PhaseFolder


def record_origins(config: RunConfig, folder: PhaseFolder) -> None:
    """Record them where a phase begins; one that goes on from a checkpoint has them."""
    if folder.checkpoint is not None or not folder.main_process:
        return
    teacher = config.teacher
    origins: dict[str, Any] = {
        "student": _model(str(folder.untrained) if config.model is None else config.model, config.model_kwargs)
    }
    if isinstance(teacher, HFTeacherConfig):
        origins["teacher"] = _model(teacher.path, teacher.kwargs)
    held_out = None if config.evaluation is None else config.evaluation.dataset
    sources = {
        "dataset.train_dataset": config.dataset.train_dataset,
        "dataset.eval_dataset": config.dataset.eval_dataset,
        "evaluation.dataset": held_out,
    }
    origins["data"] = {key: _files(source) for key, source in sources.items() if source is not None}
    folder.update_record(origins=origins)


def _model(path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where a model is, and SHA-256 of its weights; the revision of one of the hub, as far as it was named."""
    if (digest := weights_sha256(path, kwargs)) is not None:
        return {"path": path, "weights_sha256": digest}
    return {"path": path, "revision": kwargs.get("revision")}


def _files(source: DatasetSource) -> dict[str, Any]:
    """Where data is, and the names and sizes in bytes of local files."""
    named = source.model_dump(exclude_none=True)
    if source.disk_path is None:
        return named
    return {**named, "files": {name: Path(name).stat().st_size for name in local_files(source.disk_path)}}
