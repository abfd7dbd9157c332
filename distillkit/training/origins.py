"""What a run was made from, kept in `run.json`: its models, its text, and by what they are known again.

A resumed run finds the same teacher, text, tokenizer and losses as it was begun with, or is refused: files by
their fingerprints, before anything is loaded; rows, tokenizer and commits of the hub by their content, once they are.
"""

import sys
from pathlib import Path
from typing import Any

from distillkit.config import DatasetSource, Phase, RunConfig, UserError
from distillkit.config.readiness import text_sources
from distillkit.config.teacher import HFTeacherConfig
from distillkit.data import text_to_ids_hash
from distillkit.data.sources import local_files
from distillkit.models.loading import weights_sha256
from distillkit.models.vocabulary import TOKENIZER_FILES
from distillkit.runs.fingerprints import Fingerprint, differences, fingerprint
from distillkit.runs.folder import PhaseFolder
from distillkit.runs.record import RunRecord, read_record
from distillkit.teacher.served import ServedTeacher
from distillkit.training.setup import Models

_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py", *TOKENIZER_FILES)


def settle_files(phase: Phase, folder: PhaseFolder) -> None:
    """Record the files that a phase depends on where it begins, before they are read; hold them to it where it goes on.

    A later phase finds the files of the phases before it as these found them, and its student as it was saved.

    Raises `UserError` for a file that has changed.
    """
    if not folder.main_process:
        return
    config, files = phase.config, _files(phase.config)
    former = folder.record if folder.checkpoint is not None else None
    if former is None and phase.index > 0:
        before = Path(str(config.model))
        check_saved(before)
        former = read_record(before)
    if former is not None:
        _refuse_changes(config, files, former, folder.path, same_phase=folder.checkpoint is not None)
    if folder.checkpoint is None:
        teacher = config.teacher
        origins: dict[str, Any] = {"data": {key: _described(source) for key, source in text_sources(config).items()}}
        if isinstance(teacher, HFTeacherConfig):
            origins["teacher"] = _model(teacher.path, teacher.kwargs)
        folder.update_record(origins=origins, files={key: fingerprint(files[key]) for key in files})


def settle_models(config: RunConfig, folder: PhaseFolder, models: Models) -> None:
    """The same for what is known once models are loaded: the student, the tokenizer, and the commit of a hub id."""
    if folder.checkpoint is None and folder.main_process:
        student = _model(str(folder.untrained) if config.model is None else config.model, config.model_kwargs)
        folder.update_record(origins={"student": student, **(folder.record.origins or {})})
    key = "teacher.path" if config.model is None else "model"
    settle(folder, key, "tokenizer", text_to_ids_hash(models.tokenizer))
    if isinstance(models.teacher, ServedTeacher):
        served = models.teacher.served
        if folder.checkpoint is None and folder.main_process:
            folder.update_record(origins={**(folder.record.origins or {}), "teacher": served.about()})
        settle(folder, "teacher.model", "model", " ".join(filter(None, (served.name, served.root))))
    if models.teacher.model is not None:
        settle(folder, "teacher.path", "commit", vars(models.teacher.model.config).get("_commit_hash"))


def settle(folder: PhaseFolder, key: str, what: str, content: str | None) -> None:
    """Record what something holds where a phase begins; raise `UserError`, naming `key`, where another goes on."""
    if not folder.main_process or content is None:
        return
    known, name = folder.record.contents or {}, f"{what} of {key}"
    if known.get(name) == content:
        return
    if folder.checkpoint is not None and name in known:
        remedy = f" ({content} instead of {known[name]}, which teacher.kwargs.revision may name)"
        raise _changed(key, f"its {what} is another{remedy if what == 'commit' else ''}", folder.path)
    folder.update_record(contents={**known, name: content})


def check_saved(folder: Path) -> None:
    """Raises `UserError` where the student of a finished phase is not as it was saved."""
    record = read_record(folder)
    saved = (record.saved if record is not None else None) or {}
    if found := differences({name: folder / name for name in saved}, saved):
        raise UserError(
            folder,
            f"is not as it was when its student was saved: {found[0]}; restore it, or remove the folder to train this "
            "phase again",
        )


def _refuse_changes(
    config: RunConfig, files: dict[str, dict[str, Path]], former: RunRecord, folder: Path, *, same_phase: bool
) -> None:
    """same_phase: the former record is of this phase; else what it names in other places is not compared."""
    known: dict[str, Fingerprint] = former.files or {}
    for key, then in known.items():
        now = files.get(key, {})
        if not same_phase:
            common = then.keys() & now.keys()
            now = {name: now[name] for name in common}
            then = {name: then[name] for name in common}
        if found := differences(now, then):
            raise _changed(key, found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else ""), folder)
    teacher, noted = config.teacher, (former.origins or {}).get("teacher", {})
    if not isinstance(teacher, HFTeacherConfig) or noted.get("path") != teacher.path:
        return
    unknown = _not_read(known.get("teacher.path", {}))
    if unknown and weights_sha256(teacher.path, teacher.kwargs) != noted.get("weights_sha256"):
        raise _changed("teacher.path", "its weights have other content", folder)


def _not_read(then: Fingerprint) -> bool:
    """Whether one of the files is too large for its fingerprint to have a digest, and has another time of change."""
    return any(
        "digest" not in state and Path(name).stat().st_mtime_ns != state["modified"] for name, state in then.items()
    )


def _changed(key: str, difference: str, folder: Path) -> UserError:
    return UserError(
        key,
        f"is not what it was when the run in {str(folder)!r} began: {difference}; restore it, or choose another "
        "output_path",
    )


def _files(config: RunConfig) -> dict[str, dict[str, Path]]:
    """Local files by the key of the YAML that names them, and by their paths."""
    teacher = config.teacher
    found = {
        key: _local(source.disk_path) for key, source in text_sources(config).items() if source.disk_path is not None
    }
    if isinstance(teacher, HFTeacherConfig):
        found["teacher.path"] = _model_files(teacher.path, teacher.kwargs)
    if teacher.background is not None:
        found["teacher.background"] = _local(teacher.background)
    for index, loss in enumerate(config.loss_functions):
        if loss.is_from_module and (file := sys.modules[loss.function.partition(":")[0]].__file__) is not None:
            found[f"loss_functions[{index}].function"] = {file: Path(file)}
    return found


def _local(path: str) -> dict[str, Path]:
    return {name: Path(name) for name in local_files(path)}


def _model_files(path: str, kwargs: dict[str, Any]) -> dict[str, Path]:
    """What a model and its tokenizer are read from; nothing for a hub id."""
    place = Path(path).expanduser()
    if "gguf_file" in kwargs:
        place /= kwargs["gguf_file"]
    files = [place] if place.is_file() else [file for pattern in _MODEL_FILES for file in place.glob(pattern)]
    return {str(file): file for file in sorted(set(files)) if file.is_file()}


def _model(path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where a model is, and SHA-256 of its weights; the revision of one of the hub, as far as it was named."""
    if (digest := weights_sha256(path, kwargs)) is not None:
        return {"path": path, "weights_sha256": digest}
    return {"path": path, "revision": kwargs.get("revision")}


def _described(source: DatasetSource) -> dict[str, Any]:
    """Where data is, and the names and sizes in bytes of local files."""
    named = source.model_dump(exclude_none=True)
    if source.disk_path is None:
        return named
    return {**named, "files": {name: Path(name).stat().st_size for name in local_files(source.disk_path)}}
