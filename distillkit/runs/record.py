"""`run.json`: what a run or a phase was started with, and facts that a resumed run needs again."""

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distillkit.config import RunConfig
from distillkit.runs.names import RUN
from distillkit.runs.provenance import command, commit, versions
from distillkit.runs.secrets import without_secrets
from distillkit.runs.writing import read_sealed, write_sealed

Json = dict[str, Any]

_ORIGIN = ("started", "command", "versions", "commit")


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`. Facts that are None are not written; where the run came from always is."""

    config: Json
    """As `kept_config` gives it: the top level's for a run, the whole configuration of a phase for a phase."""
    started: str | None = None
    command: str | None = None
    versions: Json | None = None
    commit: str | None = None
    resumed: list[Json] | None = None
    """`started`, `command`, `versions` and `commit` of each time that the run was resumed."""
    processes: int | None = None
    """How many trained together, the last time."""
    converted: Json | None = None
    """What the folder `untrained` was made from, sections `student` and `teacher` and the teacher's weights, and its
    files' fingerprint."""
    embedding_rows: int | None = None
    """Rows of the student's embeddings before these grew."""
    origins: Json | None = None
    """Digests of the student's and the teacher's weights, and sizes of the data files."""
    files: Json | None = None
    """Fingerprints of the files that the run depends on, by the key that names them."""
    contents: dict[str, str] | None = None
    """Digests of the rows and the tokenizer, commit of a hub id: what the run depends on besides files."""
    saved: Json | None = None
    """Fingerprint of the student's files at the end of a phase."""
    verified: dict[str, str] | None = None
    """Per key of a captured dataset, a digest of the state of its files when they were verified."""
    schedule: Json | None = None
    divergence_before: Json | None = None
    pushed: Json | None = None
    """Where on the hub the finished run was uploaded to."""

    def write(self, folder: Path) -> None:
        content = {name: value for name, value in asdict(self).items() if value is not None or name in _ORIGIN}
        write_sealed(folder / RUN, content)


def new_record(config: RunConfig, **facts: Any) -> RunRecord:
    """The record of a run that begins now."""
    return RunRecord(config=kept_config(config), **origin(), **facts)


def read_record(folder: Path) -> RunRecord | None:
    """The record in a folder; None where there is none. Raises `UserError` for a damaged one."""
    content = read_sealed(folder / RUN)
    if not content:
        return None
    known = {each.name for each in fields(RunRecord)}
    return RunRecord(**{name: value for name, value in content.items() if name in known})


def origin() -> Json:
    """When a run was started or resumed, and by what."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(),
        "versions": versions(),
        "commit": commit(),
    }


def kept_config(config: RunConfig) -> Json:
    """The configuration as files keep it, which others may read: without keys of servers and tokens of the hub."""
    kept: Json = without_secrets(config.model_dump(mode="json"))
    return kept
