"""A teacher behind a server that gives log-probabilities of prompts, as vLLM's does (`prompt_logprobs`).

Every document is a request of its own, because a server knows nothing of documents packed in one row; of a document
only the tokens are sent that a loss counts, and those before them. The answer has, for each token after the first, the
k likeliest ones and the token itself, each with its rank: the teacher's distribution behind the token before.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.config.teacher import ServerTeacherConfig
from distillkit.distribution import Distribution, SparseDistribution
from distillkit.models.labels import IGNORED_LABEL
from distillkit.models.server import Refused, ServedModel, Server, connect
from distillkit.teacher.teacher import DISTRIBUTION, SignalRequest, Teacher, TeacherSignal

KEY = "teacher"

ANSWER_SECONDS = 600
"""Of silence after which a request is taken for lost."""

_ABSENT = -9999.0
"""vLLM's log-probability of a token that is impossible, for JSON has no infinity."""

_PROBED = 1024
"""Tokens of the vocabulary, besides those added to it, whose text is compared before a run starts."""

_Scores = tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]
"""Token ids and log-probabilities, the likeliest first, behind all tokens of a document but the last."""


class ServedTeacher(Teacher):
    """Asks for a batch's documents side by side, and for those of `expect` before they are wanted.

    Args:
        served: the model; its tokenizer is the student's.
        settings: its section of the YAML.
        vocabulary_size: tokens that are the teacher's.
        background: log-distribution of the probability outside the top k.
    """

    def __init__(
        self,
        served: ServedModel,
        settings: ServerTeacherConfig,
        vocabulary_size: int,
        background: Float[Tensor, " vocab"] | None = None,
    ) -> None:
        self.served = served
        self.settings = settings
        self.background = background
        self.steps_ahead = settings.steps_ahead
        self._vocabulary_size = vocabulary_size
        self._requests = _Requests(settings.concurrency)
        self._expected: dict[tuple[int, ...], Future[_Scores]] = {}

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    def expect(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Send what these batches need; what was expected before and is not needed any more is forgotten."""
        wanted: dict[tuple[int, ...], Future[_Scores]] = {}
        for ids in (document.ids for batch in batches for document in _documents(batch)):
            wanted[ids] = wanted[ids] if ids in wanted else self._asked(ids)
        self._expected = wanted

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor], request: SignalRequest = DISTRIBUTION) -> TeacherSignal:
        """From the batch's `input_ids`, `position_ids` and `targets`. Raises ValueError for all but distributions.

        Raises UserError, once a distribution is read, where the server has not answered in time, or not as asked.
        """
        if request.hidden_states or request.attention:
            raise ValueError("a served teacher has neither hidden states nor attention outputs")
        device, tokens = batch["input_ids"].device, batch["input_ids"].numel()
        columns = min(request.vocabulary_size or self.vocabulary_size, self.vocabulary_size)
        asked = [(document, self._asked(document.ids)) for document in _documents(batch)]
        background = None if self.background is None else self.background.to(device)

        def distribution(rows: Tensor) -> Callable[[slice], Distribution]:
            ids = torch.zeros(tokens, self.settings.top_k, dtype=torch.long)
            logprobs = torch.full(ids.shape, torch.nan)
            for document, answer in asked:
                place = slice(document.start, document.start + len(document.ids) - 1)
                ids[place], logprobs[place] = answer.result()
            wanted = rows.cpu()
            ids, logprobs = ids[wanted], logprobs[wanted]
            if logprobs.isnan().any():
                raise ValueError("a row was asked for whose next token no loss counts")
            whole = SparseDistribution(ids.to(device), logprobs.to(device), background).first_columns(columns)
            return lambda chunk: SparseDistribution(whole.ids[chunk], whole.logprobs[chunk], whole.background)

        return TeacherSignal(distribution)

    def check(self, sequence_length: int) -> None:
        """Raises `UserError` where documents of so many tokens are too long for the server, it gives fewer than k
        tokens or no log-probabilities of prompts at all, or a token is another text for it than for the tokenizer.
        """
        if sequence_length >= self.served.max_length:
            raise UserError(
                "sequence_length",
                f"is {sequence_length}, and the server needs room for one token more, but takes "
                f"{self.served.max_length}; serve it with a longer context (vLLM: --max-model-len "
                f"{sequence_length + 1}), or write shorter rows",
            )
        vocabulary, added = (
            sorted(token for token in named.values() if token < self.vocabulary_size)
            for named in (self.served.tokenizer.get_vocab(), self.served.tokenizer.get_added_vocab())
        )
        spread = [vocabulary[index * (len(vocabulary) - 1) // (_PROBED - 1)] for index in range(_PROBED)]
        probed = list(dict.fromkeys([*spread, *added]))
        step = max(1, min(_PROBED, sequence_length - 1))  # and one before them
        for start in range(0, len(probed), step):
            self._check_texts(probed[start : start + step])
        try:
            self._scores((probed[0], probed[-1]))
        except Refused as error:
            raise UserError(
                f"{KEY}.top_k",
                f"is {self.settings.top_k}, which the server refuses: {error.problem}; vLLM gives as many as its "
                "option --max-logprobs says, 20 by default",
            ) from error

    def _check_texts(self, ids: list[int]) -> None:
        """Send tokens one after another, and compare what each is for the server."""
        try:
            entries = self._ask((ids[0], *ids), 1)[1:]
        except Refused as error:
            raise UserError(
                f"{KEY}.url",
                f"{error.problem}; tokens up to {max(ids)} were sent: where the teacher has fewer than the student, "
                f"say how many in {KEY}.vocab_size",
            ) from error
        for token, entry in zip(ids, entries, strict=True):
            theirs, ours = entry[str(token)].get("decoded_token"), self.served.tokenizer.decode([token])
            if isinstance(theirs, str) and "\ufffd" not in theirs + ours and theirs.strip() != ours.strip():
                raise UserError(
                    f"{KEY}.url",
                    f"token {token} is {theirs!r} for {self.served.name!r} and {ours!r} for the student; name a "
                    "teacher that has the student's tokenizer",
                )

    def _asked(self, ids: tuple[int, ...]) -> "Future[_Scores]":
        expected = self._expected.get(ids)
        return self._requests.submit(lambda: self._scores(ids)) if expected is None else expected

    def _scores(self, ids: tuple[int, ...]) -> _Scores:
        k = self.settings.top_k
        try:
            best = [sorted(map(_ranked, entry.items()))[:k] for entry in self._ask(ids, k)[1:]]
            ranks = [[rank for rank, _, _ in each] for each in best]
            tokens = torch.tensor([[token for _, token, _ in each] for each in best])
            logprobs = torch.tensor([[logprob for _, _, logprob in each] for each in best], dtype=torch.float32)
        except (KeyError, TypeError, ValueError):
            raise self._strange("has no ranks or log-probabilities, or not equally many for each token") from None
        if any(each != list(range(1, k + 1)) for each in ranks):
            raise self._strange(f"has not the {k} likeliest tokens of each place")
        if not bool(((logprobs <= 1e-3) & (logprobs.exp().sum(-1, keepdim=True) <= 1.01)).all()):
            raise self._strange("has log-probabilities that are no numbers, or above 0")
        return tokens, logprobs.masked_fill(logprobs <= _ABSENT, -torch.inf)

    def _ask(self, ids: tuple[int, ...], k: int) -> list[dict[str, Any]]:
        """For each token the entries of the k likeliest and of itself; the first one's are none."""
        body = {"model": self.served.name, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
        url = f"{self.settings.url}/completions"
        answer = self.served.server.ask(url, body, ANSWER_SECONDS, self.settings.patience)
        try:
            entries = answer["choices"][0].get("prompt_logprobs")
        except (LookupError, TypeError, AttributeError):
            raise self._strange("has no choices") from None
        if entries is None:
            raise UserError(
                f"{KEY}.url",
                f"{url} gives no log-probabilities of a prompt (prompt_logprobs), as vLLM does; use vLLM, or capture "
                "the teacher (distillkit capture)",
            )
        if not isinstance(entries, list) or len(entries) != len(ids):
            count = len(entries) if isinstance(entries, list) else 0
            raise self._strange(f"is about {count} tokens, but {len(ids)} were sent")
        for token, entry in zip(ids[1:], entries[1:], strict=True):
            if not isinstance(entry, dict) or not isinstance(entry.get(str(token)), dict):
                raise self._strange(f"does not score token {token}, which was sent")
        return entries

    def _strange(self, what: str) -> UserError:
        return UserError(
            f"{KEY}.url", f"an answer of {self.settings.url}/completions {what}; vLLM 0.24 answers rightly"
        )


@dataclass(frozen=True)
class _Document:
    """start: its first position in the flattened batch. ids: its tokens up to the last one that a loss counts."""

    start: int
    ids: tuple[int, ...]


def _ranked(entry: tuple[str, dict[str, Any]]) -> tuple[int, int, float]:
    """Rank, token and log-probability of an entry of an answer."""
    token, about = entry
    return about["rank"], int(token), about["logprob"]


def _documents(batch: Mapping[str, Tensor]) -> Iterator[_Document]:
    """Documents in which a token counts that has others before it."""
    rows = zip(*(batch[name].tolist() for name in ("input_ids", "position_ids", "targets")), strict=True)
    width = batch["input_ids"].shape[1]
    for index, (ids, positions, targets) in enumerate(rows):
        if positions and positions[0] != 0:
            raise ValueError("a row begins within a document, which a served teacher cannot read")
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], width], strict=True):
            counted = [place for place in range(start, end) if targets[place] != IGNORED_LABEL]
            if counted:
                yield _Document(index * width + start, tuple(ids[start : counted[-1] + 2]))


def open_served(
    settings: ServerTeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    background: Callable[[int], Float[Tensor, " vocab"]] | None,
) -> ServedTeacher:
    """The teacher of a run whose rows have so many tokens. tokenizer: the student's.

    background: the background for a vocabulary of so many tokens.

    Raises `UserError` where no server answers, or it cannot be this run's teacher.
    """
    served = connect(Server(KEY, settings), None, None, tokenizer)
    size = settings.vocab_size or 1 + max(tokenizer.get_vocab().values())
    teacher = ServedTeacher(served, settings, size, None if background is None else background(size))
    teacher.check(sequence_length)
    return teacher


class _Requests:
    """Threads that work through a queue. They end with the process, whatever a server still owes an answer."""

    def __init__(self, threads: int) -> None:
        self._queue: SimpleQueue[tuple[Future[_Scores], Callable[[], _Scores]]] = SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, work: Callable[[], _Scores]) -> Future[_Scores]:
        future: Future[_Scores] = Future()
        self._queue.put((future, work))
        return future

    def _work(self) -> None:
        while True:
            future, work = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
