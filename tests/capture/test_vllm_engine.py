"""The vLLM engine against the shape of vLLM's outputs; vLLM itself needs a GPU and does not run here."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from distillkit.capture import vllm_engine
from distillkit.capture.transformers_engine import TransformersEngine
from distillkit.capture.vllm_engine import VLLMEngine, sparse_distribution
from distillkit.config import HFTeacherConfig, UserError
from distillkit.distribution import SparseDistribution
from distillkit.models.loading import load_pretrained_config
from tests.capture.captures import configuration, run

from . import vllm_outputs

ROWS = [
    {"input_ids": [3, 14, 15, 9, 2, 6], "labels": [3, 14, 15, 9, 2, 6], "seq_lengths": [4, 2]},
    {"input_ids": [5], "labels": [5], "seq_lengths": [1]},
    {"input_ids": [35, 8, 9, 7, 9], "labels": [35, 8, 9, 7, 9], "seq_lengths": [5]},
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=1, initializer_range=0.5))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = vllm_outputs.LLM, vllm_outputs.SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


@given(
    tokens=st.integers(1, 6),
    vocabulary=st.integers(2, 12),
    k=st.integers(1, 12),
    flat=st.booleans(),
    seed=st.integers(),
)
def test_positions_are_shifted_and_have_the_k_likeliest(tokens, vocabulary, k, flat, seed):
    """Each row is the k likeliest tokens after that token, whether or not vLLM added the prompt's own token."""
    k = min(k, vocabulary)
    generator = torch.Generator().manual_seed(seed % 2**32)
    logprobs = torch.randn(tokens, vocabulary, generator=generator).mul(3).log_softmax(-1)
    prompt = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
    got = sparse_distribution(vllm_outputs.request_output(logprobs, prompt, k, flat), k)
    values, ids = logprobs.topk(k)
    torch.testing.assert_close(got.logprobs, values, rtol=0, atol=0)
    torch.testing.assert_close(got.ids, ids)


def test_fewer_entries_than_k_are_absent():
    """A position that vLLM fills with log-probability -inf stays so, and is not taken for the token of its number."""
    entries = {0: vllm_outputs.Logprob(-0.5), 7: vllm_outputs.Logprob(-1.0), 9: vllm_outputs.Logprob(-torch.inf)}
    completion = vllm_outputs.CompletionOutput(0, "", [0], [entries])
    got = sparse_distribution(vllm_outputs.RequestOutput("0", [4], [None], [completion]), 4)
    assert got.present.tolist() == [[True, True, False, False]]
    assert got.ids[0, :2].tolist() == [0, 7]


@pytest.mark.parametrize("at_once", [1, 7, 2**15])
def test_the_same_as_transformers(teacher, vllm, monkeypatch, at_once):
    """Documents of a row are separate requests; what is said of each row does not depend on what is asked together."""
    monkeypatch.setattr(vllm_engine, "TOKENS_AT_ONCE", at_once)
    config = HFTeacherConfig(path=str(teacher), kwargs={"torch_dtype": "float32"})
    engine = VLLMEngine(config, 6, 5)
    slow = TransformersEngine(LlamaForCausalLM.from_pretrained(teacher), 16)
    assert engine.vocabulary_size == slow.vocabulary_size == 40
    got, expected = by_row(engine.top_k(ROWS, 6)), by_row(slow.top_k(ROWS, 6))
    assert sorted(got) == [0, 1, 2]
    for row, distribution in got.items():
        torch.testing.assert_close(distribution.ids, expected[row].ids)
        torch.testing.assert_close(distribution.logprobs, expected[row].logprobs)


def by_row(answers):
    found = {}
    for answer in answers:
        lengths = [len(ROWS[row]["input_ids"]) for row in answer.rows]
        parts = zip(
            answer.rows,
            answer.distribution.ids.split(lengths),
            answer.distribution.logprobs.split(lengths),
            strict=True,
        )
        found |= {row: SparseDistribution(ids, logprobs) for row, ids, logprobs in parts}
    return found


def test_what_is_missing_is_one_line(teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"engine: vllm cannot be imported .*; pip install 'distillkit\[capture\]', or"):
        VLLMEngine(HFTeacherConfig(path=str(teacher)), 6, 5)


@pytest.mark.parametrize(
    ("kwargs", "length", "line"),
    [
        ({"max_model_len": 5}, 5, r"^teacher\.kwargs\.max_model_len: is 5, but vLLM generates a token after each row"),
        ({}, 2048, r"^engine: vllm does not start with .*max_model_len \(2049\).*sequence_length \+ 1 = 2049 tokens"),
        ({"max_logprobs": 3}, 5, "^engine: vllm does not start with .*max_logprobs"),
    ],
)
def test_arguments_that_vllm_refuses_are_one_line(teacher, vllm, kwargs, length, line):
    with pytest.raises(UserError, match=line) as error:
        VLLMEngine(HFTeacherConfig(path=str(teacher), kwargs=kwargs), 6, length)
    assert "\n" not in str(error.value)


def test_a_longer_window_may_be_given(teacher, vllm):
    engine = VLLMEngine(HFTeacherConfig(path=str(teacher), kwargs={"max_model_len": 100}), 6, 5)
    assert engine._llm.max_model_len == 100


def test_the_dtype_is_that_of_the_checkpoint_and_a_step_has_room_for_its_logits(teacher, vllm, monkeypatch):
    llm = VLLMEngine(HFTeacherConfig(path=str(teacher)), 6, 5)._llm
    assert (llm.dtype, llm.engine_args["max_num_batched_tokens"]) == ("float32", 2**28 // 40)
    monkeypatch.setattr(vllm_engine, "LOGITS_AT_ONCE", 40)
    given = {"dtype": "bfloat16", "max_num_batched_tokens": 99}
    assert VLLMEngine(HFTeacherConfig(path=str(teacher)), 6, 5)._llm.engine_args["max_num_batched_tokens"] == 1024
    llm = VLLMEngine(HFTeacherConfig(path=str(teacher), kwargs=given), 6, 5)._llm
    assert (llm.dtype, llm.engine_args["max_num_batched_tokens"]) == ("bfloat16", 99)


def test_the_revision_is_that_of_the_configuration_too(teacher, vllm, monkeypatch):
    def load(path, **options):
        asked.append(options.get("revision"))
        return load_pretrained_config(path, **options)

    asked = []
    monkeypatch.setattr(vllm_engine, "load_pretrained_config", load)
    monkeypatch.setattr(vllm_outputs.LLM, "__init__", lambda self, **options: asked.append(options["revision"]))
    VLLMEngine(HFTeacherConfig(path=str(teacher), kwargs={"revision": "v2"}), 6, 5)
    assert asked == ["v2", "v2"]


def test_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^engine: vllm chooses GPUs by itself"):
        run(configuration("teacher", "text", tmp_path / "dataset", engine="vllm"))
