"""The chunked and the recurrent form of KDA against the equation, token by token."""

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearForgetGate,
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)

from distillkit.student.network.delta_rule import chunk_kda, log_decay, recurrent_kda
from distillkit.student.network.documents import Documents

from .reference import recurrence

HEADS, KEY_DIM, VALUE_DIM = 2, 8, 12
GATES = {"near 0": (-1e-4, 0.0), "usual": (-2.0, 0.0), "near -20": (-20.5, -19.5), "mixed": (-20.0, 0.0)}
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-4}


def make_inputs(tokens, gates="usual", dtype=torch.float64, sequences=1, batch=1):
    torch.manual_seed(tokens)
    low, high = GATES[gates]
    shape = (batch, tokens, HEADS)
    query, key = (torch.randn(*shape, KEY_DIM, dtype=torch.float64) for _ in range(2))
    value = torch.randn(*shape, VALUE_DIM, dtype=torch.float64)
    decay = low + (high - low) * torch.rand(*shape, KEY_DIM, dtype=torch.float64)
    if gates == "mixed":  # strong and weak forgetting side by side: where a difference of running sums loses digits
        decay = torch.where(torch.rand_like(decay) < 0.5, decay, torch.full_like(decay, -1e-3))
    beta = torch.rand(shape, dtype=torch.float64)
    state = torch.randn(sequences, HEADS, KEY_DIM, VALUE_DIM, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (query, key, value, decay, beta, state)]


def expected(inputs, boundaries, with_state):
    """Output, final states and gradients of the reference in float64, document by document."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    *sequence, state = inputs
    outputs, states = [], []
    for index, (start, end) in enumerate(zip(boundaries, boundaries[1:], strict=False)):
        document = [x[0, start:end] for x in sequence]
        if start == end:
            states.append(state[index])
            continue
        output, final = recurrence(*document, state[index] if with_state else None)
        outputs.append(output)
        states.append(final)
    return torch.cat(outputs).unsqueeze(0), torch.stack(states), inputs


def assert_same(actual_output, actual_state, actual_inputs, reference, with_state, tolerance):
    output, state, inputs = reference
    torch.manual_seed(0)
    weights = torch.randn_like(output), torch.randn_like(state)
    used = slice(None) if with_state else slice(-1)

    def gradients(output, state, inputs):
        loss = (output * weights[0].to(output.dtype)).sum() + (state * weights[1].to(state.dtype)).sum()
        return torch.autograd.grad(loss, inputs[used])

    names = ["output", "state", "query", "key", "value", "decay", "beta", "initial_state"]
    actual = [actual_output, actual_state, *gradients(actual_output, actual_state, actual_inputs)]
    truth = [output, state, *gradients(output, state, inputs)]
    for name, a, b in zip(names, actual, truth, strict=False):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 200])
def test_chunked_form_equals_the_recurrence(tokens, gates, dtype):
    for with_state in (True, False):
        inputs = make_inputs(tokens, gates, dtype)
        output, state = chunk_kda(*inputs[:5], inputs[5] if with_state else None)
        reference = expected(inputs, [0, tokens], with_state)
        assert_same(output, state, inputs, reference, with_state, PRECISION[dtype])


@pytest.mark.parametrize("gates", GATES)
def test_recurrent_form_equals_the_recurrence(gates):
    inputs = make_inputs(17, gates)
    output, state = recurrent_kda(*inputs)
    assert_same(output, state, inputs, expected(inputs, [0, 17], True), True, 1e-9)


@pytest.mark.parametrize("boundaries", [[0, 70, 71, 135, 200], [0, 3, 3, 150, 200], [0, 64, 128, 200]])
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_documents_are_separate_sequences(boundaries, with_state):
    inputs = make_inputs(200, "mixed", sequences=len(boundaries) - 1)
    documents = Documents.from_boundaries(boundaries, torch.device("cpu"))
    output, state = chunk_kda(*inputs[:5], inputs[5] if with_state else None, documents)
    if not with_state:
        inputs[5].data.zero_()
    assert_same(output, state, inputs, expected(inputs, boundaries, True), with_state, 1e-9)


def test_sequences_of_several_segments_are_recomputed_to_the_same_result():
    """Long enough that the backward pass computes segments again, with documents that end in different ones."""
    boundaries = [0, 2500, 2600, 4700]
    inputs = make_inputs(4700, sequences=3)
    documents = Documents.from_boundaries(boundaries, torch.device("cpu"))
    output, state = chunk_kda(*inputs, documents)
    weights = torch.randn_like(output), torch.randn_like(state)
    gradients = torch.autograd.grad((output * weights[0]).sum() + (state * weights[1]).sum(), inputs)
    for index, (start, end) in enumerate(zip(boundaries, boundaries[1:], strict=False)):
        alone = [x.detach()[:, start:end].requires_grad_() for x in inputs[:5]]
        alone.append(inputs[5].detach()[index : index + 1].requires_grad_())
        o, s = recurrent_kda(*alone)
        torch.testing.assert_close(output[:, start:end], o, rtol=1e-9, atol=1e-9)
        loss = (o * weights[0][:, start:end]).sum() + (s * weights[1][index : index + 1]).sum()
        for packed, single in zip(gradients, torch.autograd.grad(loss, alone), strict=True):
            packed = packed[index : index + 1] if packed.dim() == 4 and packed.shape[0] == 3 else packed[:, start:end]
            torch.testing.assert_close(packed, single, rtol=1e-8, atol=1e-8)


def test_rows_of_a_batch_are_separate_sequences():
    inputs = make_inputs(100, batch=3, sequences=3)
    output, state = chunk_kda(*inputs)
    for row in range(3):
        alone, alone_state = chunk_kda(*(x[row : row + 1] for x in inputs))
        torch.testing.assert_close(output[row : row + 1], alone)
        torch.testing.assert_close(state[row : row + 1], alone_state)


@pytest.mark.parametrize("tokens", [1, 16, 63, 130])
def test_equals_the_functions_of_transformers(tokens):
    query, key, value, decay, beta, state = (x.detach() for x in make_inputs(tokens, "usual", torch.float32))
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    ours = chunk_kda(query, key, value, decay, beta, state)
    for theirs in (chunk_kimi_delta_attention, recurrent_kimi_delta_attention):
        output, final = theirs(query, key, value, decay, beta, **options)
        torch.testing.assert_close(ours[0], output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], final, rtol=1e-4, atol=1e-5)


def test_plain_gate_equals_transformers_and_safe_gate_its_formula():
    class Config:
        linear_head_dim, linear_num_heads, hidden_size = 4, 3, 6

    gate = KimiLinearForgetGate(Config)
    torch.nn.init.normal_(gate.A_log)
    torch.nn.init.normal_(gate.dt_bias)
    hidden = torch.randn(2, 5, 6)
    raw = gate.f_b_proj(gate.f_a_proj(hidden)).unflatten(-1, (3, 4))
    torch.testing.assert_close(log_decay(raw, gate.A_log.flatten(), gate.dt_bias, None), gate(hidden))
    safe = log_decay(raw, gate.A_log.flatten(), gate.dt_bias, -5.0)
    for h in range(3):
        for c in range(4):
            x = gate.A_log.flatten()[h].exp() * (raw[..., h, c] + gate.dt_bias[h * 4 + c])
            torch.testing.assert_close(safe[..., h, c], -5.0 / (1 + torch.exp(-x)))
