"""Names of the files in a captured dataset's folder, for all code that writes or reads them."""

from pathlib import Path

from distillkit.config.errors import UserError

MANIFEST = "manifest.json"
"""Written last: a folder that has it holds a complete dataset."""
PLAN = "plan.json"
"""Which rows go into which shard; written before the first one."""
BACKGROUND = "background.safetensors"
TOKENIZER = "tokenizer"
"""Folder of the teacher's tokenizer."""
CARD = "README.md"
SHARD = "shard-"
"""Beginning of the names of shards and their records."""


def shard_name(index: int) -> str:
    """`shard-00007`, to which .parquet and .json are added."""
    return f"{SHARD}{index:05d}"


def inside(folder: Path, name: str, named_by: str) -> Path:
    """A file of a dataset, by a name that stands in one of its files, which somebody else may have written.

    Raises `UserError` for a name or a link that leads out of the folder, and for one that is no name. Links of the
    hub's cache, where the files of a snapshot are kept beside it, are followed.

    named_by: the file, and the key in it, for error messages.
    """
    key = f"{folder / named_by}"
    if not isinstance(name, str) or not Path(name).parts or "\0" in name:
        raise UserError(key, f"{name!r} is no name of a file")
    if Path(name).is_absolute() or ".." in Path(name).parts or "://" in name:
        raise UserError(key, f"names {name!r}, which is not in its folder; a dataset may name its own files only")
    home = folder.resolve()
    home = next((parent.parent for parent in (home, *home.parents) if parent.name == "snapshots"), home)
    if not (folder / name).resolve().is_relative_to(home):
        raise UserError(key, f"names {name!r}, a link that leads out of its folder; put the file itself there")
    return folder / name


def files_of(folder: Path) -> dict[str, Path]:
    """The files in a folder of a dataset, by their names in it, sorted.

    Raises `UserError` for a link that leads out of the dataset.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: inside(folder.parent, f"{folder.name}/{name}", folder.name) for name in names}
