"""lm-eval's client for the completions of a server, which sends the tokens that a model in memory would read.

Of its own, the client would tokenise without BOS, stop at other strings when requests run side by side, and take
sampling arguments as they are.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import normalize_gen_kwargs

from distillkit.config.errors import UserError
from distillkit.models.server import SECONDS, ServedModel
from distillkit.models.special_tokens import encode_texts


class ServedLM(LocalCompletionsAPI):
    """seed: of sampling."""

    def __init__(self, served: ServedModel, seed: int) -> None:
        super().__init__(
            model=served.name,
            base_url=f"{served.server.settings.url}/completions",
            tokenizer_backend="none",  # the tokenizer is loaded already
            num_concurrent=served.server.settings.concurrency,
            max_length=served.max_length,
            add_bos_token=True,
            seed=seed,
            timeout=SECONDS,
        )
        self.served = served
        self.tokenizer, self.tokenizer_backend, self.tokenized_requests = served.tokenizer, "huggingface", True

    @cached_property
    def header(self) -> dict[str, str]:
        return self.served.server.headers

    def tok_encode(
        self,
        string: str | list[str],
        left_truncate_len: int | None = None,
        add_special_tokens: bool | None = None,
        **_: Any,
    ) -> list[Any]:
        """A text, or several."""
        if isinstance(string, str):
            return self.tok_encode([string], left_truncate_len, add_special_tokens)[0]
        if add_special_tokens is False:
            encoded = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        else:
            encoded = encode_texts(self.tokenizer, string)
        return [ids[-left_truncate_len:] for ids in encoded] if left_truncate_len else encoded

    def _create_payload(
        self, *args: Any, generate: bool = False, eos: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, generate=generate, eos=self.eos_string, **kwargs)
        if not generate and (self.served.by or "").startswith("vllm"):
            payload["return_tokens_as_token_ids"] = True  # else two tokens of the same text are one
        return payload

    def loglikelihood(self, requests: list[Instance], **kwargs: Any) -> list[tuple[float, bool]]:
        with self._told():
            return super().loglikelihood(requests, **kwargs)

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[float]:
        with self._told():
            return super().loglikelihood_rolling(requests, **kwargs)

    def generate_until(self, requests: list[Instance], **kwargs: Any) -> list[str]:
        for request in requests:
            prompt, arguments = request.args
            arguments = normalize_gen_kwargs(arguments, self._max_gen_toks)
            request.arguments = (prompt, arguments)
            if arguments["max_gen_toks"] >= self.max_length:
                raise UserError(
                    f"{self.served.server.key}.max_length",
                    f"is {self.served.max_length}, but answers alone may have {arguments['max_gen_toks']} tokens",
                )
        with self._refusals():
            return super().generate_until(requests, **kwargs)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raises `UserError` where the server gives no likelihoods."""
        if (error := self.served.without_likelihoods) is not None:
            raise error
        with self._refusals():
            yield

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Adds to an error what the server said, which lm-eval logs only."""
        said: list[str] = []
        logger = logging.getLogger("lm_eval.models.api_models")
        handler, level = logging.Handler(logging.WARNING), logger.level
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            refused = [line for line in said if line.startswith("API request failed")]
            raise RuntimeError(
                f"{type(error).__name__}: {error}. {self.served.server.hide(' '.join(refused[-1:]))}"
            ) from error
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
