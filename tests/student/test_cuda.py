"""On CUDA: flash-linear-attention's kernels against the equation and against the PyTorch form."""

import pytest
import torch

from distillkit.student.network import kda_attention
from distillkit.student.network.delta_rule import log_decay
from distillkit.student.network.documents import Documents
from distillkit.student.network.kda_attention import KimiDeltaAttention

from .reference import recurrence
from .students import LAYOUTS, student, tokens

pytestmark = pytest.mark.gpu
BOUNDARIES = [0, 3, 131, 132, 400]
HEADS = {64: (3, 1), 128: (4, 2)}
"""Query and key/value heads by their size: few, and the same in all tests, which then share what is compiled."""

KERNELS = pytest.mark.parametrize(
    ("head_dim", "gate_lower_bound", "dtype", "tolerance"),
    [
        (64, -5.0, torch.bfloat16, 3e-2),
        (128, -5.0, torch.bfloat16, 3e-2),
        (64, None, torch.bfloat16, 3e-2),
        (64, -5.0, torch.float32, 5e-3),
    ],
    ids=["head 64", "head 128", "plain gate", "float32"],
)


@pytest.fixture(autouse=True)
def no_tf32():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    assert kda_attention.FLA_AVAILABLE, "flash-linear-attention is not installed"
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


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


def assert_near(found, expected, tolerance):
    """By relative error. `A_log` has twice the tolerance: its gradient is the small difference of large sums, and from
    bf16 inputs the PyTorch form itself is up to 2.6e-2 from float64, where every other tensor is below 7e-3."""
    errors = {
        name: (found[name].cpu() - x.cpu()).float().norm() / x.float().norm().cpu() for name, x in expected.items()
    }
    far = [
        f"{name} {error:.1e}"
        for name, error in errors.items()
        if not error < (2 * tolerance if name.removeprefix("d ") == "A_log" else tolerance)
    ]
    assert not far, "relative errors: " + ", ".join(far)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@KERNELS
def test_kernels_equal_the_pytorch_form(head_dim, gate_lower_bound, packed, dtype, tolerance, monkeypatch):
    """Both from the same inputs; the PyTorch form computes in float32 inside."""
    layer = layer_of(head_dim, gate_lower_bound, dtype)
    hidden_states = torch.randn(1 if packed else 2, 400, 256, device="cuda", dtype=dtype)
    documents = Documents.from_boundaries(BOUNDARIES, hidden_states.device) if packed else None
    expected = run(layer, hidden_states, documents, False, monkeypatch)
    assert_near(run(layer, hidden_states, documents, True, monkeypatch), expected, tolerance)


def test_kept_intermediates_give_the_gradients_of_those_made_again(monkeypatch):
    layer = layer_of(64, -5.0, torch.bfloat16)
    hidden_states = torch.randn(1, 400, 256, device="cuda", dtype=torch.bfloat16)
    documents = Documents.from_boundaries(BOUNDARIES, hidden_states.device)
    expected = run(layer, hidden_states, documents, True, monkeypatch)
    layer.keep_intermediates = True
    assert_near(run(layer, hidden_states, documents, True, monkeypatch), expected, 1e-2)


def attention_inputs(layer, count, boundaries, dtype):
    """Query, key, value and the raw gates of packed documents, and the state that each starts from."""
    heads, size = layer.num_heads, layer.head_dim
    shapes = {"query": (heads, size), "key": (heads, size), "value": (heads, size), "gate": (heads, size)}
    shapes["beta"] = (heads,)
    inputs = {name: torch.randn(1, boundaries[-1], *shape).to(dtype) for name, shape in shapes.items()}
    inputs["gate"] = 2 * inputs["gate"] - 3  # some forget at once, some remember for hundreds of tokens
    return inputs | {"initial_state": torch.randn(count, heads, size, size)}


def by_the_equation(layer, inputs, boundaries):
    """Outputs, final states and gradients in float64, one document after the other."""
    inputs = {name: x.double().requires_grad_() for name, x in inputs.items()}
    A_log, dt_bias = (x.detach().cpu().double().requires_grad_() for x in (layer.A_log, layer.dt_bias))
    decay = log_decay(inputs["gate"], A_log, dt_bias, layer.gate_lower_bound)
    sequence = (inputs["query"], inputs["key"], inputs["value"], decay, inputs["beta"].sigmoid())
    outputs, states = zip(
        *(
            recurrence(*(x[0, start:end] for x in sequence), inputs["initial_state"][index])
            for index, (start, end) in enumerate(zip(boundaries, boundaries[1:], strict=False))
        ),
        strict=True,
    )
    leaves = inputs | {"A_log": A_log, "dt_bias": dt_bias}
    return with_gradients(torch.cat(outputs).unsqueeze(0), torch.stack(states), leaves)


def with_gradients(output, state, leaves):
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in (output, state))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output, "state": state} | {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}


@KERNELS
def test_kernels_equal_the_equation(head_dim, gate_lower_bound, dtype, tolerance):
    """Documents that start from states, as a cache holds them; those of few tokens also by the kernel that decodes."""
    layer = layer_of(head_dim, gate_lower_bound, dtype)
    for boundaries in ([0, 3, 67, 68, 150], [0, 1, 2, 40]):
        inputs = attention_inputs(layer, len(boundaries) - 1, boundaries, dtype)
        expected = by_the_equation(layer, inputs, boundaries)
        leaves = {name: x.cuda().requires_grad_() for name, x in inputs.items()}
        *sequence, state = leaves.values()
        documents = Documents.from_boundaries(boundaries, state.device)
        found = with_gradients(
            *layer._attend_with_kernels(sequence, [layer.A_log, layer.dt_bias], state, documents, True),
            leaves | {"A_log": layer.A_log, "dt_bias": layer.dt_bias},
        )
        assert_near(found, expected, tolerance)
        with torch.no_grad():
            output, state = layer._attend_with_kernels(sequence, [layer.A_log, layer.dt_bias], state, documents, True)
        assert_near(
            {"output": output, "state": state}, {name: expected[name] for name in ("output", "state")}, tolerance
        )


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
    options = {"hidden_size": 256, "head_dim": 64, "num_heads": ours.num_heads, "safe_gate": True, "lower_bound": -5.0}
    theirs = FlaLayer(**options).cuda().bfloat16()
    theirs.A_log.data, theirs.dt_bias.data = theirs.A_log.data.float(), theirs.dt_bias.data.float()
    theirs.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, 200, 256, device="cuda", dtype=torch.bfloat16)
    expected = theirs(hidden_states)[0]
    error = (ours(hidden_states)[0] - expected).float().norm() / expected.float().norm()
    assert error < 2e-2
    ours.load_state_dict(theirs.state_dict())
