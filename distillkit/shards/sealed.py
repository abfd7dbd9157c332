"""JSON files of a dataset that hold a digest of themselves, so that damage to them is noticed as it is to shards.

It guards against damage, not against forgery: whoever writes a dataset can seal what they like. So what is read is
checked for its types, and for what it names (`names.inside`).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from distillkit.config.errors import UserError, shown
from distillkit.runs.writing import json_text, write_whole

_DIGEST = "digest"

Content = TypeVar("Content")


def write_sealed(path: Path, content: Any, write: Callable[[Path, bytes], None] = write_whole) -> None:
    """Write a dataclass as JSON. The same content gives the same bytes."""
    plain = json.loads(json_text(asdict(content)))
    text = json.dumps({**plain, _DIGEST: _digest(plain)}, indent=2, ensure_ascii=False, sort_keys=True)
    write(path, (text + "\n").encode())


def read_sealed(
    path: Path, kind: type[Content], format: int = 0, check: Callable[[Content], None] = lambda content: None
) -> Content:
    """What `write_sealed` wrote, or an older version, which had no digest.

    format: the version of the file that is read, if it has one.
    check: raises UserError for content that must not be used; called before the digest is compared.

    Raises UserError for another format, ValueError for a file that is damaged or of another kind, and OSError where
    there is none.
    """
    try:
        plain = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("is nested too deep") from error
    if not isinstance(plain, dict):
        raise ValueError("is no mapping of keys to values")
    if plain.get("format", format) != format:
        found = shown(plain["format"])
        raise UserError(path, f"has format {found}, but this version of distillkit reads format {format}")
    digest = plain.pop(_DIGEST, None)
    unknown = sorted(set(plain) - {field.name for field in fields(kind)})  # type: ignore[arg-type]
    try:
        content = TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    check(content)
    if digest is None and unknown:
        raise ValueError(f"{unknown[0]}: unknown key")
    if digest is not None and digest != _digest(plain):
        raise ValueError(f"it was damaged, or changed by hand; then remove its key {_DIGEST}, if you trust the change")
    return content


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
