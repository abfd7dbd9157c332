"""What a live teacher gives is what the model computes for a whole batch."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from distillkit.config.errors import UserError
from distillkit.models.decoder import check_head, decode
from distillkit.teacher import SignalRequest
from distillkit.teacher.live import LiveTeacher
from tests.training.tiny import VOCAB, batch, llama, row


@pytest.fixture(scope="module")
def teacher_model():
    return llama(0, layers=3, dtype=torch.float64)


@pytest.fixture(scope="module")
def inputs():
    made = batch(row([7, 5], seed=1), row([12], seed=2))
    return {name: made[name] for name in ("input_ids", "position_ids")}


@torch.no_grad()
def test_distributions_of_rows_are_the_models_logits(teacher_model, inputs):
    logits = teacher_model(**inputs, use_cache=False).logits.flatten(0, 1)
    rows = torch.tensor([0, 3, 11, 20])
    given = LiveTeacher(teacher_model).signal(inputs).distribution(rows)
    torch.testing.assert_close(given(slice(0, 3)).logits, logits[rows[:3]])
    torch.testing.assert_close(given(slice(3, 4)).logits, logits[rows[3:]])


@torch.no_grad()
def test_top_k_is_normalised_over_the_whole_vocabulary(teacher_model, inputs):
    logprobs = teacher_model(**inputs, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    given = (
        LiveTeacher(teacher_model).signal(inputs, SignalRequest(top_k=5)).distribution(torch.arange(24))(slice(0, 24))
    )
    assert given.ids.shape == (24, 5)
    torch.testing.assert_close(given.logprobs, logprobs.gather(-1, given.ids))
    torch.testing.assert_close(given.logprobs, logprobs.topk(5).values)


@torch.no_grad()
def test_a_common_vocabulary_is_normalised_by_itself(teacher_model, inputs):
    logprobs = teacher_model(**inputs, use_cache=False).logits.flatten(0, 1)[:, :50].log_softmax(-1)
    request = SignalRequest(top_k=50, vocabulary_size=50)
    given = LiveTeacher(teacher_model).signal(inputs, request).distribution(torch.arange(24))(slice(0, 24))
    torch.testing.assert_close(given.logprobs, logprobs.gather(-1, given.ids))
    assert given.ids.max() < 50 < VOCAB


@torch.no_grad()
def test_hidden_states_are_those_that_transformers_gives(teacher_model, inputs):
    expected = teacher_model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    given = LiveTeacher(teacher_model).signal(inputs, SignalRequest(hidden_states=(0, 2, 3))).hidden_states
    assert sorted(given) == [0, 2, 3]
    for index, states in given.items():
        torch.testing.assert_close(states, expected[index])


def test_the_teacher_computes_in_its_own_dtype_under_autocast(inputs):
    model = llama(0)
    outside = LiveTeacher(model).signal(inputs).distribution(torch.arange(24))(slice(0, 24)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LiveTeacher(model).signal(inputs).distribution(torch.arange(24))(slice(0, 24)).logits
    assert torch.equal(inside, outside)


def test_nothing_of_the_teacher_is_recorded_for_gradients(teacher_model, inputs):
    signal = LiveTeacher(teacher_model).signal(inputs, SignalRequest(hidden_states=(1,)))
    assert not signal.hidden_states[1].requires_grad
    assert not signal.distribution(torch.arange(3))(slice(0, 3)).logits.requires_grad


@torch.no_grad()
def test_rows_may_be_laid_end_to_end_as_flash_attention_needs_them(teacher_model, inputs):
    final, states = decode(teacher_model, **inputs, layers=[1])
    flat_final, flat_states = decode(teacher_model, *(inputs[name].view(1, -1) for name in inputs), layers=[1])
    torch.testing.assert_close(flat_final.view_as(final), final)
    torch.testing.assert_close(flat_states[1].view_as(states[1]), states[1])


def assert_same_outputs(signal, expected, device):
    """Of two signals on 24 tokens, with hidden state 1; the first is on `device`."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5}  # rotary embeddings are float32, and each device has its own sines
    rows = torch.arange(24)
    given, wanted = (each.distribution(rows.to(where)) for each, where in ((signal, device), (expected, "cpu")))
    for chunk in (slice(0, 20), slice(20, 24)):
        ours, theirs = vars(given(chunk)), vars(wanted(chunk))
        for name, tensor in theirs.items():
            assert ours[name].device.type == device
            torch.testing.assert_close(ours[name].cpu(), tensor, **tolerance)
    assert signal.hidden_states[1].device.type == device
    torch.testing.assert_close(signal.hidden_states[1].cpu(), expected.hidden_states[1], **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_teacher_on_another_device_answers_on_the_batchs(teacher_model, inputs, top_k):
    """As with teacher.kwargs.device_map: cpu, for a teacher that the GPU has no room for."""
    background = torch.randn(VOCAB).log_softmax(-1) if top_k else None
    teacher, request = LiveTeacher(teacher_model, background), SignalRequest(hidden_states=(1,), top_k=top_k)
    on_cuda = {name: tensor.cuda() for name, tensor in inputs.items()}
    assert_same_outputs(teacher.signal(on_cuda, request), teacher.signal(inputs, request), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_spread_over_devices_answers_on_the_batchs(tmp_path, inputs, tied):
    """As with teacher.kwargs.device_map: auto. A tied head is where the embeddings are, the last layer is elsewhere."""
    whole = llama(0, layers=3, dtype=torch.float64, tied=tied)
    whole.save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0 if tied else 1}
    places |= {f"model.layers.{layer}": int(layer > 0) for layer in range(3)}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    check_head(spread, "teacher.path")
    on_cuda = {name: tensor.cuda() for name, tensor in inputs.items()}
    request = SignalRequest(hidden_states=(1,))
    expected = LiveTeacher(whole).signal(inputs, request)
    assert_same_outputs(LiveTeacher(spread).signal(on_cuda, request), expected, "cuda")


@pytest.mark.gpu
def test_a_head_is_padded_once():
    """On CUDA, where a head of a vocabulary that is no multiple of 64 is copied for it: half a gigabyte or more."""
    teacher = LiveTeacher(llama(0, vocab=100_001).cuda())
    example = {name: torch.arange(4, device="cuda").unsqueeze(0) for name in ("input_ids", "position_ids")}

    def ask():
        given = teacher.signal(example).distribution(torch.arange(4, device="cuda"))
        assert given(slice(0, 4)).logits.shape == (4, 100_001)

    ask()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ask()
    head_bytes = 4 * 32 * 100_001
    assert torch.cuda.max_memory_allocated() - before < head_bytes


def test_a_head_that_is_more_than_a_matrix_is_refused():
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, initializer_range=1.0,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"teacher\.path: Gemma2ForCausalLM changes its logits"):
        check_head(Gemma2ForCausalLM(config), "teacher.path")
    check_head(llama(0), "teacher.path")
