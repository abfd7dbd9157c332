"""One line for the person who wrote the YAML: the key, the problem, and the remedy.

Every mistake of a user becomes a `UserError`; the command line prints it and exits with 2. pydantic checks types and
bounds, and `user_error` turns its report into that line. Validators of the sections raise `KeyProblem`. What other
libraries raise while they read a user's input becomes one in `reading`.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError


class UserError(Exception):
    """A mistake of the user's in one line: the key that is wrong, and the problem with its remedy.

    key: of the YAML (`loss_functions[1].temperature`), an option (`--gpu`) or a file; None where none can be named.
    located: the phase that is wrong is named already.
    """

    def __init__(self, key: str | os.PathLike[str] | None, problem: str, *, located: bool = False) -> None:
        self.key = os.fspath(key) if key else None
        self.located = located
        self.problem = " ".join(problem.split())
        super().__init__(self.key, self.problem)

    def __str__(self) -> str:
        return self.problem if self.key is None else f"{self.key}: {self.problem}"

    def under(self, section: str, *, located: bool = False) -> "UserError":
        """The same problem of a key inside `section`: `tokens` under `phases[1]` is `phases[1].tokens`."""
        return UserError(join_keys(section, self.key or ""), self.problem, located=located)


class KeyProblem(UserError, ValueError):
    """A `UserError` of a validator, which pydantic collects because it is a ValueError.

    key: the path below the validated value: `temperature`, `[2]`, `[2].function`; "" for the value itself.
    """


def reason(error: Exception) -> str:
    """What an error of a library says: its message, after its type where the message alone says little."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}".rstrip(": ")


@contextmanager
def reading(
    key: str | os.PathLike[str] | None, prefix: str = "", describe: Callable[[Exception], str] = reason
) -> Iterator[None]:
    """Turn whatever a library raises in the block into a `UserError` of `key`.

    For blocks that only read what a user gave: libraries raise any type there. Elsewhere an exception is a fault of
    ours, which must show its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(key, prefix + describe(error)) from error


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`; did you mean 'weight'?` where a known name begins like `name` or is close to it, else `otherwise`."""
    names = list(known)
    close = [each for each in names if each.startswith(name)] or difflib.get_close_matches(name, names)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def user_error(error: ValidationError, data: Any) -> UserError:
    """The first error that pydantic found in `data` as one line, with the number of other wrong keys."""
    lines: dict[str, str] = {}
    for details in error.errors(include_url=False):
        path = key_path(details["loc"], data)
        problem = details.get("ctx", {}).get("error")
        if isinstance(problem, KeyProblem):
            path = join_keys(path, problem.key or "")
        elif details["type"].startswith("union_tag"):
            path = join_keys(path, _quoted(details["ctx"]["discriminator"])[0])
        lines.setdefault(path, _remedy(details))
    path, line = next(iter(lines.items()))
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return UserError(path, line + more)


def key_path(location: Sequence[int | str], data: Any) -> str:
    """`loss_functions[1].temperature` for a location of pydantic's.

    A location also contains labels of pydantic's own (the member of a union); these are no keys of `data` and are
    omitted.
    """
    path = ""
    for part in location:
        if isinstance(data, dict) and part in data:
            path = join_keys(path, str(part))
        elif isinstance(data, (list, tuple)) and isinstance(part, int):
            path = f"{path}[{part}]"
        else:
            continue
        data = data[part]
    return path


def one_of(value: Any, choices: Sequence[str]) -> str:
    """The problem of a value that is not among the choices; a long list of them only where none is close."""
    suggestion = did_you_mean(str(value), choices)
    if suggestion and len(choices) > 12:
        return f"no such choice: {shown(value)}{suggestion}"
    return f"must be one of {', '.join(choices)}; got {shown(value)}{suggestion}"


def shown(value: Any) -> str:
    """A value as the user may recognise it, short."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def join_keys(path: str, key: str) -> str:
    """`section.key`, or `section[0].key` for a key that begins with an index."""
    if not path or not key:
        return path or key
    return path + key if key.startswith("[") else f"{path}.{key}"


_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "string": "must be text",
    "bool": "must be true or false",
    "list": "must be a list",
    "dict": "must be a mapping of keys to values",
    "model": "must be a mapping of keys to values",
}
_BOUNDS = {
    "greater_than": ("must be > {}", "gt"),
    "greater_than_equal": ("must be >= {}", "ge"),
    "less_than": ("must be < {}", "lt"),
    "less_than_equal": ("must be <= {}", "le"),
}


def _remedy(details: Any) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "value_error":
        problem = context["error"]
        return problem.problem if isinstance(problem, KeyProblem) else str(problem)
    if kind in _BOUNDS:
        text, bound = _BOUNDS[kind]
        return f"{text.format(f'{context[bound]:g}')}, got {shown(value)}"
    if kind == "too_short":
        return "must have at least one entry"
    if kind == "literal_error":
        return one_of(value, _quoted(context["expected"]))
    if kind == "union_tag_invalid":
        return one_of(value[_quoted(context["discriminator"])[0]], _quoted(context["expected_tags"]))
    if kind == "union_tag_not_found":
        return "is missing; it says what the section describes"
    line = _KINDS.get(kind.split("_")[0], details["msg"])
    quote = " (put it in quotes)" if kind == "string_type" and isinstance(value, (int, float)) else ""
    return f"{line}, got {shown(value)}{quote}"


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)
