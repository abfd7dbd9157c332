"""Varlen attention against SDPA with the mask that transformers makes for packed documents."""

import copy

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from distillkit.config import StudentConfig
from distillkit.conversion.convert import build_student
from distillkit.models.decoder import decode
from distillkit.models.varlen_attention import VARLEN, document_boundaries, use_varlen_attention

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DOCUMENTS = [[5, 19, 1, 15], [40]]  # two rows of 40 tokens


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mistral_with_a_window():
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))


def latent_attention():
    """Queries and keys of 24 numbers, values of 16."""
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    config = DeepseekV3Config(**{**SIZES, **sizes, "num_key_value_heads": 4}, first_k_dense_replace=4)
    return DeepseekV3ForCausalLM(config)


def llama_with_wide_heads():
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=264))


def llama_with_odd_heads():
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=20))


def hybrid_student():
    return build_student(llama(), StudentConfig(layout="hybrid"))


MODELS = [llama, mistral_with_a_window, hybrid_student, latent_attention]
ON_CUDA = [llama, mistral_with_a_window, latent_attention, llama_with_wide_heads, llama_with_odd_heads]


def both_ways(make_model, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    masked = make_model().to(device, dtype).train()
    varlen = copy.deepcopy(masked)
    varlen.set_attn_implementation(VARLEN)
    return masked, varlen


def packed(device="cpu"):
    input_ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    positions = [torch.cat([torch.arange(length) for length in row]) for row in DOCUMENTS]
    return input_ids.to(device), torch.stack(positions).to(device)


def gradients(model, *batch):
    hidden, states = decode(model, *batch, [1, 3])
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
    ((hidden + states[1] + states[3]) * weights).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make_model", MODELS)
def test_packed_rows_and_their_gradients_equal_masked_ones(make_model):
    masked, varlen = both_ways(make_model)
    expected, expected_gradients = gradients(masked, *packed())
    hidden, found = gradients(varlen, *packed())
    torch.testing.assert_close(hidden, expected)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)


def test_gradient_checkpointing_sees_the_same_boundaries():
    masked, varlen = both_ways(llama)
    varlen.gradient_checkpointing_enable({"use_reentrant": False})
    _, expected = gradients(masked, *packed())
    _, found = gradients(varlen, *packed())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def llama_without_attention():
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=1.0))


@torch.no_grad()
def test_all_attention_may_drop_out():
    """Which is the one dropout that leaves nothing to chance."""
    masked, varlen = both_ways(llama_without_attention)
    torch.testing.assert_close(decode(varlen, *packed())[0], decode(masked, *packed())[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_attention_drops_out_in_training_alone(device):
    _, varlen = both_ways(llama, torch.float32, device)
    for module in varlen.modules():
        if isinstance(module, LlamaAttention):
            module.attention_dropout = 0.5
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        assert not torch.equal(decode(varlen, *packed(device))[0], decode(varlen, *packed(device))[0])
        varlen.eval()
        torch.testing.assert_close(decode(varlen, *packed(device))[0], decode(varlen, *packed(device))[0])


@torch.no_grad()
def test_a_row_with_positions_needs_no_boundaries():
    masked, varlen = both_ways(llama)
    ids, positions = (x[:1] for x in packed())
    expected = masked(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(varlen(ids, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.parametrize("make_model", MODELS)
@torch.no_grad()
def test_padded_batches_and_generation_are_those_of_sdpa(make_model):
    masked, varlen = (model.eval() for model in both_ways(make_model))
    ids, _ = packed()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    expected = masked(ids, attention_mask=mask, use_cache=False).logits
    logits = varlen(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()])
    for rows in (ids[:1], ids):
        written = [
            model.generate(rows, max_new_tokens=12, do_sample=False, pad_token_id=0) for model in (masked, varlen)
        ]
        assert written[0].tolist() == written[1].tolist()


def test_boundaries_with_several_rows_are_refused():
    _, varlen = both_ways(llama)
    with pytest.raises(ValueError, match="one row"):
        varlen(packed()[0], cu_seq_lens_q=torch.tensor([0, 40]), max_length_q=40, use_cache=False)


def test_boundaries_of_documents():
    cu_seqlens, longest = document_boundaries(torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]]))
    assert cu_seqlens.tolist() == [0, 3, 4, 8]
    assert longest == 4
    assert cu_seqlens.dtype == torch.int32


def test_a_cpu_keeps_sdpa():
    model = llama()
    assert not use_varlen_attention(model, torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("make_model", ON_CUDA)
def test_the_kernel_equals_sdpa_document_by_document(make_model):
    masked, varlen = both_ways(make_model, torch.float32, "cuda")
    assert use_varlen_attention(copy.deepcopy(masked), torch.bfloat16)
    assert not use_varlen_attention(masked, torch.float32)
    expected, expected_gradients = gradients(masked, *packed("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        hidden, found = gradients(varlen, *packed("cuda"))
    assert (hidden.float() - expected).norm() / expected.norm() < 2e-2
    for name, gradient in found.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 5e-2, f"{name}: relative error {error:.1e}"
