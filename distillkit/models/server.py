"""A running OpenAI-compatible server that answers for a model: whether it is there, which model it has, what it gives.

Prompts are sent to it as token ids of the model's own tokenizer: they are those of a measurement in memory.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from transformers import PreTrainedTokenizerBase

from distillkit.config.errors import UserError, reason
from distillkit.config.server import ServerConfig
from distillkit.models.loading import weights_sha256
from distillkit.models.special_tokens import encode_texts
from distillkit.runs.secrets import HIDDEN

logger = logging.getLogger(__name__)

SECONDS = 3600
"""That an answer may take: the longest ones wait for many others."""

_LONGEST_PAUSE = 30


class _NoAnswer(UserError):
    """A server that is not there or too busy; it may answer later."""


class Refused(UserError):
    """What was asked for is not given."""


class _NoRedirect(HTTPRedirectHandler):
    """A redirection is an answer like any other, for the key is for this server alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


_open = build_opener(ProxyHandler({}), _NoRedirect).open  # as lm-eval's client, past the proxies of the environment


@dataclass(frozen=True)
class Server:
    """A server by its section of the YAML.

    key: of that section, for error messages.
    """

    key: str
    settings: ServerConfig

    @property
    def headers(self) -> dict[str, str]:
        """Of every request; they are written nowhere."""
        return {"Authorization": f"Bearer {self._secret}"} if self._secret else {}

    @property
    def _secret(self) -> str:
        return os.environ.get(self.settings.api_key_env or "", "")

    def hide(self, text: str) -> str:
        """A server's words without its key, which it may repeat."""
        return text.replace(self._secret, HIDDEN) if self._secret else text

    def ask(
        self, url: str, body: Mapping[str, Any] | None = None, seconds: float = 30, patience: float | None = None
    ) -> Any:
        """The JSON that the server answers. Raises `UserError` where it answers none.

        seconds: of silence after which there is no answer. patience: seconds after the first failure for which a
        server that is not there or too busy is asked again, less and less often; None: it is asked once.
        """
        until, tried = float("inf"), 0
        while True:
            try:
                return self._answer(url, body, seconds)
            except _NoAnswer as error:
                if patience is None:
                    raise
                tried, now, pause = tried + 1, time.monotonic(), min(2**tried, _LONGEST_PAUSE)
                until = min(until, now + patience)
                if now + pause > until:
                    raise UserError(error.key, f"{error.problem} (tried {tried} times, for {patience:g} s)") from error
                _tell(str(error), int(now / 60))
                time.sleep(pause)

    def _answer(self, url: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(url, data, {**self.headers, "Content-Type": "application/json"})
        try:
            with _open(request, timeout=seconds) as answer:
                return json.load(answer)
        except HTTPError as error:
            if error.code in (401, 403):
                problem = f"{url} wants another key"
                raise UserError(
                    f"{self.key}.api_key_env", f"{problem}; name the environment variable that holds it"
                ) from error
            said = self.hide(_words(error))
            kind = _NoAnswer if error.code >= 500 or error.code in (408, 429) else Refused
            raise kind(f"{self.key}.url", f"{url} answers {error.code} {error.reason}: {said}") from error
        except (OSError, ValueError, HTTPException) as error:
            problem = f"no answer from {url}: {reason(error)}"
            raise _NoAnswer(
                f"{self.key}.url",
                f"{problem}; start the server, or write its address, such as http://localhost:8000/v1",
            ) from error


def _words(error: HTTPError) -> str:
    """How a server's answer begins that is an error; a server that is ending may break off."""
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, HTTPException) as broken:
        return reason(broken)


@functools.lru_cache(maxsize=16)
def _tell(problem: str, minute: int) -> None:
    """Once a minute: many requests fail at a time."""
    logger.warning("%s; it is asked again", problem)


@dataclass(frozen=True)
class ServedModel:
    """A model that a server answers for. tokenizer: the model's own. max_length: tokens of prompt and answer."""

    server: Server
    name: str
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    max_length: int
    by: str | None
    """What the server calls itself (`owned_by`), and its version, where it tells."""
    root: str | None = None
    """The model that the name stands for, where the server tells."""

    def about(self) -> dict[str, Any]:
        """Where results come from."""
        return {
            "url": self.server.settings.url,
            "model": self.name,
            "by": self.by,
            "max_length": self.max_length,
        }

    @functools.cached_property
    def without_likelihoods(self) -> UserError | None:
        """None where the server gives log-probabilities of a prompt; else the reason why it does not."""
        ids = encode_texts(self.tokenizer, ["The log-probabilities of a prompt"])[0]
        url, asked = f"{self.server.settings.url}/completions", {"model": self.name, "prompt": [ids], "max_tokens": 1}
        try:
            answer = self.server.ask(url, {**asked, "temperature": 0, "logprobs": 1, "echo": True}, SECONDS)
            given = answer["choices"][0]["logprobs"]
            found = given["token_logprobs"]
            complete = len(found) == len(given["top_logprobs"]) == len(ids) + 1
            if complete and all(isinstance(each, float | int) for each in found[1:]):
                return None
            problem = f"{len(found)} log-probabilities for {len(ids)} tokens and one more"
        except (UserError, LookupError, TypeError) as error:
            self.server.ask(url, asked, SECONDS)  # a server without completions says so here
            problem = reason(error)
        return UserError(
            f"{self.server.key}.url",
            f"the server gives no log-probabilities of a prompt (echo and logprobs), which this task needs: {problem}; "
            "measure it without server, or with a server that gives them, such as vLLM",
        )


def connect(server: Server, path: str | None, weights: str | None, tokenizer: PreTrainedTokenizerBase) -> ServedModel:
    """The model at `path` as a server gives it; without a path, the one of the settings' name or the only one.

    weights: the hash of its files, where they are here.

    Raises `UserError`: no server answers, it serves another model, its key is missing, or it does not tell how many
    tokens it takes.
    """
    settings = server.settings
    answer = server.ask(f"{settings.url}/models")
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise UserError(
            f"{server.key}.url", f"{settings.url}/models lists no models, so this is no OpenAI-compatible API"
        )
    named = settings.model is not None or path is not None
    found = [card for card in cards if not named or _serves(card, settings.model, path)]
    card = found[0] if found and (named or len(found) == 1) else None
    if card is None:
        names = ", ".join(str(card["id"]) for card in cards) or "nothing"
        missing = f"{settings.url} serves {names}" + (f", not {settings.model or path}" if named else "")
        raise UserError(f"{server.key}.model", f"{missing}; write the name under which this model is served")
    root = card.get("root")
    if weights is not None and isinstance(root, str) and os.path.isdir(root) and weights_sha256(root, {}) != weights:
        raise UserError(f"{server.key}.model", f"{card['id']!r} is {root!r}, whose weights are not those of {path!r}")
    longest = card.get("max_model_len")
    if (max_length := settings.max_length or longest) is None:
        raise UserError(f"{server.key}.max_length", "is missing: the server does not tell how many tokens it takes")
    if longest is not None and max_length > longest:
        raise UserError(f"{server.key}.max_length", f"is {max_length}, but the server takes {longest} tokens")
    by = " ".join(str(part) for part in (card.get("owned_by"), _version(server)) if part)
    return ServedModel(server, card["id"], tokenizer, max_length, by or None, root if isinstance(root, str) else None)


def _serves(card: Mapping[str, Any], name: str | None, path: str | None) -> bool:
    """Whether it is the model of the name, or without one the model of the path."""
    if name is not None:
        return bool(card["id"] == name)
    places = [place for place in (card["id"], card.get("root")) if isinstance(place, str)]
    return path is not None and any(
        place == path or os.path.realpath(place) == os.path.realpath(path) for place in places
    )


def _version(server: Server) -> str | None:
    """Of vLLM, which tells it beside the API; None for others."""
    try:
        return str(server.ask(f"{server.settings.url.removesuffix('/v1')}/version")["version"])
    except (UserError, LookupError, TypeError):
        return None
