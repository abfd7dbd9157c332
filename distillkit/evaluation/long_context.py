"""The suite `long_context`: what a long text tells a model, beyond needles.

documents        long documents, read from their beginning: perplexity, and beside a teacher KL(teacher ‖ student) and
                 the share of tokens with the same likeliest one, by the position of the predicted token. Every document
                 has tokens in every bucket, so that a curve over positions is one over the same documents.
last_word        passages whose last word follows from what they say before (LAMBADA, Paperno et al. 2016,
                 arXiv 1606.06031): the beginning of a passage, then so many tokens of other text, then its last
                 sentence up to the last word. The same prompt without the beginning tells how far the word can be
                 guessed from the sentence and the other text alone; the difference is what was remembered.
standard_errors  by the jackknife over documents or passages

A document is read in pieces through the model's own cache, and logits exist for a chunk of tokens at a time: memory is
that of the cache and a piece, whatever the length.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.config.evaluate import LongContextConfig
from distillkit.data.sources import load_source
from distillkit.distribution import DenseDistribution, at_least_float32
from distillkit.evaluation.chunks import CHUNK_BYTES
from distillkit.evaluation.generation import check_numbers, score_continuations
from distillkit.evaluation.haystack import Essay
from distillkit.evaluation.jackknife import Named, jackknife, with_errors
from distillkit.evaluation.needles import read_prose
from distillkit.losses.divergences import kl
from distillkit.models.chunked_logits import ChunkedHead, chunk_tokens_within
from distillkit.models.decoder import head
from distillkit.models.special_tokens import encode_texts

DATASET, PASSAGES = "long_context.dataset", "long_context.passages"
VARIETY = 4
"""Text between the parts of passages is taken from so many times the longest distance."""
_SENTENCE_END = re.compile(r"[.!?…][\"'`)\]\u201d\u2019]*\s+")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Passage:
    """A text in three parts: all sentences but the last with the white space behind them, the last one, its last word.

    The last sentence is without the last word and the space before it.
    """

    beginning: str
    sentence: str
    word: str


def check_texts(settings: LongContextConfig) -> None:
    """Raises `UserError` where documents or passages cannot be read, or no document can have `length` tokens."""
    if not any(_may_have(settings.length, text) for texts in _documents(settings) for text in texts):
        raise _too_short(settings)
    read_passages(settings)


def read_documents(
    settings: LongContextConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[list[int]]:
    """The first `length` tokens of documents that have so many, in an order that the seed decides.

    Raises `UserError` for a text that cannot be read, and where no document is long enough.
    """
    wanted = settings.documents if limit is None else min(settings.documents, limit)
    found: list[list[int]] = []
    for texts in _documents(settings):
        encoded = encode_texts(tokenizer, [text for text in texts if _may_have(settings.length, text)])
        found += [ids[: settings.length] for ids in encoded if len(ids) >= settings.length]
        if len(found) >= wanted:
            return found[:wanted]
    if not found:
        raise _too_short(settings)
    return found


def read_passages(settings: LongContextConfig, limit: int | None = None) -> list[Passage]:
    """Passages of more than one sentence, in an order that the seed decides; none without a source.

    Raises `UserError` for a source that cannot be read, and where it has no such passage.
    """
    if settings.passages is None:
        return []
    texts = _column(load_source(settings.passages, PASSAGES), "text", PASSAGES).shuffle(seed=settings.seed)["text"]
    found = [passage for text in texts if (passage := split_passage(text or "")) is not None]
    if not found:
        raise UserError(PASSAGES, "has no text of two sentences or more, the last of at least two words")
    return found[: settings.num_passages if limit is None else min(settings.num_passages, limit)]


def split_passage(text: str) -> Passage | None:
    """None for a text without two sentences, or with a last word that is alone in its sentence or its line."""
    before, _, word = text.strip().rpartition(" ")
    ends = [found.end() for found in _SENTENCE_END.finditer(f"{before} ")]
    if not ends or ends[-1] > len(before) or word.split() != [word]:
        return None
    return Passage(before[: ends[-1]], before[ends[-1] :].rstrip(), word)


@torch.no_grad()
def measure_documents(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    settings: LongContextConfig,
    *,
    teacher: PreTrainedModel | None = None,
    columns: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The numbers of `documents`, for JSON: `documents`, `tokens`, and `positions`, one entry for each bucket.

    Args:
        model: a causal language model that can continue from its cache, in evaluation mode; its logits are its head
            times its final hidden states.
        documents: as of `read_documents`.
        teacher: adds `kl` and `agreement`.
        columns: to which both models' logits are cut, where the heads are padded differently.

    Raises:
        UserError: logits are NaN.
    """
    length = settings.length
    edges = [*(edge for edge in settings.position_buckets if edge < length), length]
    sums = []
    for index, document in enumerate(documents):
        totals: Named = {}
        start = 0
        for piece in _numbers_of_pieces(model, teacher, document, settings.prefill_tokens, columns):
            positions = torch.arange(start + 1, start + 1 + len(piece["tokens"]))
            buckets = torch.bucketize(positions, torch.tensor(edges), right=True)  # 0: before the first bucket
            for name, each in piece.items():
                totals[name] = totals.get(name, each.new_zeros(len(edges) + 1)).index_add(0, buckets, each)
            start += len(positions)
            progress(index * length + start + 1, len(documents) * length)
        sums.append({name: total[1:-1] for name, total in totals.items()})
    stacked = {name: torch.stack([each[name] for each in sums]) for name in sums[0]}
    values, errors = jackknife(_by_token, stacked)
    tokens = stacked["tokens"].sum(0).long().tolist()
    return {
        "documents": len(documents),
        "tokens": sum(tokens),
        "positions": [
            {
                "from": edges[bucket],
                "to": edges[bucket + 1],
                "tokens": count,
                **{name: _finite(each[bucket]) for name, each in values.items()},
                "standard_errors": {name: _finite(each[bucket]) for name, each in errors.items()},
            }
            for bucket, count in enumerate(tokens)
            if count
        ],
    }


def measure_last_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: LongContextConfig,
    distance: int,
    *,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The numbers of `last_word` at a distance, for JSON, with `standard_errors`.

    `accuracy` (the word's tokens are the likeliest, one after the other) and `log_probability` (of the word, in nats),
    both also without the beginning of the passage (`…_without`); `gain`: the difference of the two log-probabilities.

    Raises:
        UserError: the texts cannot be read, or logits are NaN.
    """
    passages = read_passages(settings, limit)
    filler = _filler(settings, tokenizer, distance)
    texts = []
    for index, passage in enumerate(passages):
        between = f"{filler(index)}\n\n" if distance else ""
        texts.append((f"{passage.beginning.rstrip()}\n\n" if distance else passage.beginning) + between)
        texts.append(between)
    prompts = [text + passages[index // 2].sentence for index, text in enumerate(texts)]
    contexts = encode_texts(tokenizer, prompts)
    whole = encode_texts(tokenizer, [f"{text} {passages[index // 2].word}" for index, text in enumerate(prompts)])
    words = [[ids[len(before) :]] for ids, before in zip(whole, contexts, strict=True)]
    found = score_continuations(
        model,
        contexts,
        words,
        batch_size=settings.batch_size,
        tokens_at_a_time=settings.prefill_tokens,
        progress=progress,
    )
    scores = torch.tensor([[score.log_probability, score.likeliest] for (score,) in found], dtype=torch.float64)
    with_it, without = scores[::2], scores[1::2]
    sums = {
        "passages": torch.ones(len(passages), dtype=torch.float64),
        "accuracy": with_it[:, 1],
        "log_probability": with_it[:, 0],
        "accuracy_without": without[:, 1],
        "log_probability_without": without[:, 0],
        "gain": with_it[:, 0] - without[:, 0],
    }
    tokens = sum(map(len, contexts[::2])) / len(passages)
    means = with_errors(
        lambda all_: {name: each / all_["passages"] for name, each in all_.items() if name != "passages"}, sums
    )
    return {"distance": distance, "passages": len(passages), "prompt_tokens_mean": tokens, **means}


def _numbers_of_pieces(
    model: PreTrainedModel, teacher: PreTrainedModel | None, document: Sequence[int], piece: int, columns: int | None
) -> Iterator[Named]:
    """Numbers of each predicted token, [tokens] by name, a piece of the document at a time."""
    targets = torch.tensor(document[1:], device=next(model.parameters()).device)
    models = [model] if teacher is None else [model, teacher]
    heads = [ChunkedHead(*head(each), each.dtype) for each in models]
    step, start = chunk_tokens_within(CHUNK_BYTES, heads[0].columns), 0
    for hidden in zip(*(_hidden_states(each, document[:-1], piece) for each in models), strict=True):
        chunks = []
        for first in range(0, len(hidden[0]), step):
            chunk = slice(first, min(first + step, len(hidden[0])))
            logits = [
                at_least_float32(own.logits(states[chunk].to(own.matrix.device))[:, :columns]).to(targets.device)
                for own, states in zip(heads, hidden, strict=True)
            ]
            chunks.append(_numbers(logits, targets[start + chunk.start : start + chunk.stop]))
        yield {name: torch.cat([chunk[name] for chunk in chunks]).cpu().double() for name in chunks[0]}
        start += len(hidden[0])


def _hidden_states(
    model: PreTrainedModel, document: Sequence[int], piece: int
) -> Iterator[Float[Tensor, "tokens width"]]:
    """The final hidden states of a document, a piece at a time, each continued from the cache of those before."""
    cache, decoder = None, model.get_decoder()
    input_ids: Int[Tensor, "1 tokens"] = torch.tensor([document], device=model.get_input_embeddings().weight.device)
    for tokens in input_ids.split(piece, dim=1):
        output = decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output.last_hidden_state[0]


def _numbers(logits: Sequence[Float[Tensor, "tokens vocab"]], targets: Int[Tensor, " tokens"]) -> Named:
    """logits: the model's own and, where there is one, the teacher's."""
    for each in logits:
        check_numbers(each)
    numbers = {"tokens": torch.ones_like(targets), "nll": F.cross_entropy(logits[0], targets, reduction="none")}
    if len(logits) > 1:
        numbers["kl"] = kl(logits[0], DenseDistribution(logits[1]), targets)[0]
        numbers["agreement"] = logits[0].argmax(-1) == logits[1].argmax(-1)
    return numbers


def _by_token(sums: Named) -> Named:
    found = {name: each / sums["tokens"] for name, each in sums.items() if name != "tokens"}
    return {"perplexity": found.pop("nll").exp(), **found}


def _filler(settings: LongContextConfig, tokenizer: PreTrainedTokenizerBase, distance: int) -> Callable[[int], str]:
    """A function from the number of a passage to other text of about so many tokens, from a random sentence on."""
    if distance == 0:
        return lambda index: ""
    longest = max(settings.distances)
    essay = Essay(read_prose(settings.dataset, VARIETY * longest, DATASET, settings.text_field))

    def text(index: int) -> str:
        start = random.Random(f"{settings.seed} {index}").randrange(len(essay.sentences))
        ids = tokenizer(" ".join(essay.lines(start, distance)), add_special_tokens=False, verbose=False).input_ids
        return tokenizer.decode(ids[:distance]).strip(" �")

    return text


def _documents(settings: LongContextConfig) -> Iterator[list[str]]:
    """The texts in an order that the seed decides, some at a time."""
    rows = _column(load_source(settings.dataset, DATASET), settings.text_field, DATASET)
    for some in rows.shuffle(seed=settings.seed).iter(batch_size=64):
        yield [text or "" for text in some[settings.text_field]]


def _column(rows: Any, name: str, key: str) -> Any:
    if name not in rows.column_names:
        raise UserError(key, f"the text has no column {name!r}; its columns are {', '.join(rows.column_names)}")
    return rows.select_columns(name)


def _may_have(tokens: int, text: str) -> bool:
    """A text has no more tokens than bytes, but for a special token before it and a space."""
    return len(text.encode()) + 2 >= tokens


def _too_short(settings: LongContextConfig) -> UserError:
    return UserError("long_context.length", f"no document of the text has {settings.length:,} tokens; lower it")


def _finite(number: Tensor) -> float | None:
    return number.item() if number.isfinite() else None
