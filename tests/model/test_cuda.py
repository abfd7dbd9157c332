"""On CUDA: flash-linear-attention's kernels against the equation and against the PyTorch form."""

import pytest
import torch

from distillkit.model import kda_attention
from distillkit.model.kda_attention import KimiDeltaAttention

from .students import LAYOUTS, student, tokens

pytestmark = pytest.mark.gpu
BOUNDARIES = [0, 3, 131, 132, 400]


@pytest.fixture(autouse=True)
def no_tf32():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    assert kda_attention.FLA_AVAILABLE, "flash-linear-attention is not installed"
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


HEADS = {64: (9, 3), 128: (20, 4)}
"""Query and key/value heads of SmolLM2-135M and AFM-4.5B, by size: kernels are tuned for each number of heads."""


def layer_of(head_dim, gate_lower_bound, dtype=torch.float32, grouped=True):
    """As in a model: what decides the decay stays in float32."""
    torch.manual_seed(0)
    heads, kv_heads = HEADS[head_dim]
    layer = KimiDeltaAttention(
        256, heads, kv_heads if grouped else heads, head_dim, 0, gate_lower_bound=gate_lower_bound
    )
    for name, parameter in layer.named_parameters():
        if name in ("A_log", "dt_bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            parameter.data = parameter.data.to(dtype)
    return layer.cuda()


def run(layer, hidden_states, documents, kernels, monkeypatch):
    monkeypatch.setattr(kda_attention, "FLA_AVAILABLE", kernels)
    layer.zero_grad()
    hidden_states = hidden_states.detach().requires_grad_()
    output, _ = layer(hidden_states, documents=documents)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    (output * weights).sum().backward()
    return {"output": output, "input": hidden_states.grad} | {n: p.grad for n, p in layer.named_parameters()}


@pytest.mark.timeout(1200)  # the kernels are tuned for minutes at each shape, in float32 for more than five
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    ("head_dim", "gate_lower_bound", "dtype", "tolerance"),
    [
        (64, -5.0, torch.bfloat16, 3e-2),
        (128, -5.0, torch.bfloat16, 3e-2),
        (64, None, torch.bfloat16, 3e-2),
        (64, -5.0, torch.float32, 5e-3),
    ],
    ids=["head 64", "head 128", "plain gate", "float32"],
)
def test_kernels_equal_the_pytorch_form(head_dim, gate_lower_bound, packed, dtype, tolerance, monkeypatch):
    """Both from the same inputs; the PyTorch form computes in float32 inside."""
    layer = layer_of(head_dim, gate_lower_bound, dtype)
    hidden_states = torch.randn(1 if packed else 2, 400, 256, device="cuda", dtype=dtype)
    documents = None
    if packed:
        documents = kda_attention.Documents.from_boundaries(BOUNDARIES, hidden_states.device)
    kernels = run(layer, hidden_states, documents, True, monkeypatch)
    plain = run(layer, hidden_states, documents, False, monkeypatch)
    for name, expected in plain.items():
        error = (kernels[name].float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_cached_logits_equal_uncached(layout):
    model = student(layout=layout).cuda()
    ids = tokens(2, 150).cuda()
    expected = model(ids, use_cache=False).logits
    output = model(ids[:, :100], use_cache=True)
    pieces = [output.logits]
    for start, end in [(100, 130), *((t, t + 1) for t in range(130, 150))]:
        output = model(ids[:, start:end], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_on_cuda_equal_those_on_the_cpu(layout):
    """Padded on the left, so that documents, convolution and state all take part."""
    model = student(layout=layout)
    ids, mask = tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[0, :37] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    logits = model.cuda()(ids.cuda(), attention_mask=mask.cuda(), use_cache=False).logits.cpu()
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=5e-3)


def test_weights_load_into_and_from_flash_linear_attention():
    from fla.layers import KimiDeltaAttention as FlaLayer

    ours = layer_of(64, -5.0, torch.bfloat16, grouped=False)
    theirs = FlaLayer(hidden_size=256, head_dim=64, num_heads=9, safe_gate=True, lower_bound=-5.0).cuda().bfloat16()
    theirs.A_log.data, theirs.dt_bias.data = theirs.A_log.data.float(), theirs.dt_bias.data.float()
    theirs.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, 200, 256, device="cuda", dtype=torch.bfloat16)
    expected = theirs(hidden_states)[0]
    error = (ours(hidden_states)[0] - expected).float().norm() / expected.float().norm()
    assert error < 2e-2
    ours.load_state_dict(theirs.state_dict())
