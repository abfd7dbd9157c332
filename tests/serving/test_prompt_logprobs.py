"""vLLM's own classes take a served teacher's request, and give the answer that the test's server gives."""

import json

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.engine.protocol import ModelCard
from vllm.logprobs import Logprob, append_logprobs_for_next_position

from distillkit.config.teacher import ServerTeacherConfig
from distillkit.teacher.served import open_served
from tests.evaluation.completions import serving
from tests.teacher.prompt_logprobs import PromptLogprobs
from tests.training.tiny import BYTES, llama, tokenizer


def test_request_and_answer_are_vllms():
    model = llama(0, vocab=BYTES)
    with serving(server := PromptLogprobs(model, tokenizer(), "big")) as url:
        section = ServerTeacherConfig.parse({"kind": "server", "url": url, "top_k": 5})
        teacher = open_served(section, tokenizer(), 64, None)
        ids, _ = teacher._scores((3, 4, 5, 6))
        body = server.bodies[-1]
        answer = server.complete(body)
    assert ids.shape == (3, 5)
    request = CompletionRequest.model_validate(body)
    assert not request.model_extra and request.prompt == [3, 4, 5, 6]
    parameters = request.to_sampling_params(request.max_tokens)
    assert (parameters.prompt_logprobs, parameters.max_tokens, parameters.logprobs) == (5, 1, None)
    assert ModelCard.model_validate(server.card).max_model_len == 512

    parsed = CompletionResponse.model_validate(answer)
    assert not parsed.model_extra and not parsed.choices[0].model_extra
    assert (
        json.loads(parsed.model_dump_json())["choices"][0]["prompt_logprobs"]
        == json.loads(json.dumps(answer))["choices"][0]["prompt_logprobs"]
    )
    ours = parsed.choices[0].prompt_logprobs
    for position, entry in enumerate(ours[1:], start=1):
        own = body["prompt"][position]
        likeliest = sorted((each.rank, token) for token, each in entry.items())[:5]
        theirs = []
        tokens = [own, *(token for _, token in likeliest)]
        append_logprobs_for_next_position(
            theirs,
            tokens,
            [entry[token].logprob for token in tokens],
            [entry[token].decoded_token for token in tokens],
            entry[own].rank,
            5,
        )
        assert theirs == [entry] and isinstance(entry[own], Logprob)
