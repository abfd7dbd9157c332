"""Secrets stay out of files: what its key's name, its own shape or the environment tells to be one becomes `***`."""

import os
import re
from typing import Any

import yaml

HIDDEN = "***"

_BETWEEN_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
_ENDS = ("token", "password", "passwd", "passphrase", "secret", "apikey")
_LAST = ("auth", "authorization", "bearer", "cookie", "credential", "credentials", "passwords", "secrets")
_LAST_TWO = [f"{kind} key{s}" for kind in ("api", "access", "account", "private", "secret") for s in ("", "s")]
_LAST_TWO += ["access tokens", "auth tokens", "key id"]
_OF_TOKENIZERS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "special")
"""`pad_token` and the like are no secrets."""

_SHAPES = [
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"(?<![A-Za-z0-9])(?:hf|api_org|gh[opsru])_[A-Za-z0-9]{20,}", HIDDEN),
        (r"(?<![A-Za-z0-9])(?:github_pat_|glpat-|xox[abprs]-)[\w-]{16,}", HIDDEN),
        (r"(?<![A-Za-z0-9])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}", HIDDEN),
        (r"\b(?:A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,})\b", HIDDEN),
        (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*", HIDDEN),  # JSON web tokens
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", HIDDEN),
        (r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\",}]+", rf"\1{HIDDEN}"),
        (r"\b([Bb]earer\s+)(?=\S*\d)[\w.~+/=-]{16,}", rf"\1{HIDDEN}"),
        (r"(://)[^/@\s'\"]+(?=@)", rf"\1{HIDDEN}"),  # user and password of a URL
        (r"(?i)([?&][\w.%-]*(?:token|key|secret|signature|sig|password|credential)=)[^&;\s'\"]+", rf"\1{HIDDEN}"),
    )
]
_LEAST_LETTERS = 8
"""Of a secret of the environment; shorter ones would be found within words."""


def is_secret(name: str) -> bool:
    """Whether values of keys, options or environment variables of this name are secrets."""
    words = [word.lower() for word in _BETWEEN_WORDS.split(name) if word]
    if not words or (words[-1] == "token" and words[-2:-1] and words[-2] in _OF_TOKENIZERS):
        return False
    return words[-1].endswith(_ENDS) or words[-1] in _LAST or " ".join(words[-2:]) in _LAST_TWO


def without_secrets(value: Any) -> Any:
    """Plain data as files keep it, which others may read. Tuples become lists."""
    if isinstance(value, dict):
        return {
            key: _hidden(inner) if isinstance(key, str) and is_secret(key) else without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return hide_in_text(value) if isinstance(value, str) else value


def leave_out_secrets(value: Any) -> Any:
    """The same without the keys of secrets, for a file that is read again: they are then looked for elsewhere."""
    return _without_hidden(without_secrets(value))


def hide_in_text(text: str) -> str:
    """Text without what has the shape of a secret, and without the secrets of the environment."""
    for name, value in os.environ.items():
        if len(value) >= _LEAST_LETTERS and is_secret(name):
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return text


def hide_in_words(words: list[str]) -> list[str]:
    """The words of a command line: `key=value`, whose values are YAML, `--option value`, and any others."""
    hidden = []
    for before, word in zip(["", *words], words, strict=False):
        key, equals, text = word.partition("=")
        if before.startswith("-") and "=" not in before and is_secret(before):
            hidden.append(HIDDEN)
        elif equals and re.fullmatch(r"[\w.-]+", key):
            hidden.append(f"{key}={_hide_in_value(key, text)}")
        else:
            hidden.append(hide_in_text(word))
    return hidden


def _hide_in_value(key: str, text: str) -> str:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return HIDDEN if is_secret(key) else hide_in_text(text)
    if (hidden := without_secrets({key: value})[key]) == value:
        return text
    if not isinstance(value, dict | list):
        return HIDDEN if hidden == HIDDEN else hide_in_text(text)
    return yaml.safe_dump(hidden, default_flow_style=True, sort_keys=False, width=2**20).strip()


def _hidden(value: Any) -> Any:
    """Of a key whose name tells that it holds secrets. A switch (`token: true`) is none."""
    if isinstance(value, dict):
        return {key: _hidden(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner) for inner in value]
    return value if value is None or isinstance(value, bool) or value == "" else HIDDEN


def _without_hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_hidden(inner) for key, inner in value.items() if inner != HIDDEN}
    return [_without_hidden(inner) for inner in value if inner != HIDDEN] if isinstance(value, list) else value
