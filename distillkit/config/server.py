"""A running OpenAI-compatible server that answers for a model: a section of the YAML, and whether its key is there."""

import os
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from distillkit.config.errors import UserError
from distillkit.config.section import Section


def _check_url(url: str) -> str:
    """What is wrong is said without the address, which may hold a key."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be the address of an API, such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must hold no key or password; api_key_env names the environment variable that does")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("must have a port from 0 to 65535, such as http://localhost:8000/v1") from None
    return url.rstrip("/")


class ServerConfig(Section):
    """A running server that answers for a model."""

    url: Annotated[str, AfterValidator(_check_url)] = Field(
        description="address of an OpenAI-compatible API, such as http://localhost:8000/v1"
    )
    model: str | None = Field(None, min_length=1, description="name under which it is served; by default its path")
    max_length: int | None = Field(
        None, gt=1, description="tokens that a prompt and its answer may have; by default what the server tells"
    )
    concurrency: int = Field(32, gt=0, description="requests at a time")
    api_key_env: str | None = Field(
        None, min_length=1, description="name of the environment variable that holds the server's key"
    )


def check_server_key(key: str, server: ServerConfig) -> None:
    """Raises `UserError` where the environment has no key for a server; `key` is that of the section."""
    if (name := server.api_key_env) is None:
        return
    held, secret = f"{key}.api_key_env", os.environ.get(name)
    if not secret:
        raise UserError(held, f"the environment has no variable {name!r}; export it first")
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(held, f"what {name} holds is no key: it has line breaks or other characters than ASCII's")
