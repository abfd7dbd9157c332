"""The gated delta rule of Kimi Delta Attention (KDA) in plain PyTorch.

Kimi Linear (arXiv 2510.26692), eq. 1: with a state ``S`` of shape ``[key_dim, value_dim]`` per head,

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T          o_t = scale * S_t^T q_t

``g`` is the logarithm of the decay, one value per key channel, never positive. ``recurrent_kda`` applies the equation
token by token (decoding). ``chunk_kda`` computes the same for whole sequences, 64 tokens at a time (section 3 of the
paper: WY representation and UT transform); its choice is never to form ``exp`` of a positive number: decays between
two tokens are sums of logarithms over exactly the tokens between them, built by doubling the block from 1 to 64. So
it holds for any gate, from no decay to -20 a token and beyond, without a decay tensor of size tokens × 64 × key_dim.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .documents import CHUNK_SIZE, Documents

SEGMENT = 32  # chunks whose intermediate results exist at one time


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Scale the last axis of ``x`` to length one, as ``x / sqrt(|x|² + eps)``."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def log_decay(
    gate: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, lower_bound: float | None
) -> torch.Tensor:
    """Logarithm of the decay from the raw gate.

    Args:
        gate: ``[..., heads, key_dim]``, output of the gate projection.
        A_log: ``[heads]``. dt_bias: ``[heads * key_dim]``.
        lower_bound: ``None`` for the plain gate ``-exp(A_log) * softplus(gate + dt_bias)``; a negative number for the
            safe gate ``lower_bound * sigmoid(exp(A_log) * (gate + dt_bias))``, which stays in ``(lower_bound, 0)``.

    Returns: ``[..., heads, key_dim]``, float32 (float64 where the gate is).
    """
    dtype = torch.promote_types(gate.dtype, torch.float32)
    rate = A_log.to(dtype).exp().unsqueeze(-1)
    gate = gate.to(dtype) + dt_bias.to(dtype).view(A_log.shape[0], -1)
    if lower_bound is None:
        return -rate * F.softplus(gate)
    return lower_bound * torch.sigmoid(rate * gate)


def recurrent_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence itself, one token after the other; the form to decode with.

    Shapes as in ``chunk_kda``, without ``documents``.
    """
    query, key, value, decay, beta, state = _prepare(query, key, value, decay, beta, initial_state, query.shape[0])
    outputs = []
    for t in range(query.shape[1]):
        state = state * decay[:, t].exp().unsqueeze(-1)
        seen = (state * key[:, t].unsqueeze(-1)).sum(-2)
        delta = (value[:, t] - seen) * beta[:, t].unsqueeze(-1)
        state = state + key[:, t].unsqueeze(-1) * delta.unsqueeze(-2)
        outputs.append((state * query[:, t].unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, dim=1), state


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KDA over whole sequences, chunk by chunk; memory and time grow linearly with the tokens.

    Args:
        query, key: ``[batch, tokens, heads, key_dim]``; they are l2-normalized here and the query scaled by
            ``key_dim ** -0.5``.
        value: ``[batch, tokens, heads, value_dim]``.
        decay: ``[batch, tokens, heads, key_dim]``, logarithm of the decay, at most 0.
        beta: ``[batch, tokens, heads]`` in [0, 1].
        initial_state: ``[sequences, heads, key_dim, value_dim]``, zeros if not given.
        documents: boundaries where the state is reset; then ``batch`` is 1. Without it every row is one sequence.

    Returns: the output ``[batch, tokens, heads, value_dim]`` and the final state of every sequence, both in float32
        (float64 where the inputs are).
    """
    if documents is None:
        documents = Documents.rows(query.shape[0], query.shape[1], query.device)
    plan = documents.chunk_plan
    with torch.autocast(query.device.type, enabled=False):
        query, key, value, decay, beta, state = _prepare(query, key, value, decay, beta, initial_state, documents.count)
        batch, tokens, heads, value_dim = value.shape

        def to_chunks(x: torch.Tensor) -> torch.Tensor:  # [b, t, heads, ...] -> [chunks, heads, 64, ...]
            slots = x.new_zeros(plan.num_chunks * CHUNK_SIZE, *x.shape[2:])
            slots = slots.index_copy(0, plan.slots, x.flatten(0, 1))
            return slots.unflatten(0, (plan.num_chunks, CHUNK_SIZE)).transpose(1, 2)

        chunks = [to_chunks(x) for x in (query, key, value, decay, beta)]
        output, state = _in_segments(chunks, state.index_select(0, plan.order), plan.steps)
        output = output.transpose(1, 2).flatten(0, 1).index_select(0, plan.slots)
        return output.view(batch, tokens, heads, value_dim), torch.empty_like(state).index_copy(0, plan.order, state)


def _prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    sequences: int,
) -> tuple[torch.Tensor, ...]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value, decay, beta = (x.to(dtype) for x in (query, key, value, decay, beta))
    query = l2_normalize(query) * query.shape[-1] ** -0.5
    if initial_state is None:
        initial_state = value.new_zeros(sequences, value.shape[2], key.shape[-1], value.shape[-1])
    return query, l2_normalize(key), value, decay, beta, initial_state.to(dtype)


def _in_segments(
    chunks: list[torch.Tensor], state: torch.Tensor, steps: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunked delta rule, its intermediate results (some forty times the input) kept for one segment at a time.

    With several segments the backward pass computes each one again.
    """
    segments: list[list[int]] = [[]]
    for active in steps:
        if sum(segments[-1]) + active > SEGMENT and segments[-1]:
            segments.append([])
        segments[-1].append(active)
    if len(segments) == 1:
        query, key, value, decay, beta = chunks
        return _chunked_delta_rule(query, key, value, decay, beta, state, steps)
    outputs = []
    sizes = [sum(segment) for segment in segments]
    for segment, *inputs in zip(segments, *(x.split(sizes) for x in chunks), strict=True):
        running, finished = state[: segment[0]], state[segment[0] :]
        output, running = checkpoint(
            _chunked_delta_rule, *inputs, running, segment, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(output)
        state = torch.cat([running, finished])
    return torch.cat(outputs), state


def _chunked_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    steps: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """All chunks at once but for the state, which walks through ``steps`` (chunks in flight at each step)."""
    attention, overlap, prefix, suffix = _intra_chunk(query, key, decay)
    from_start = prefix.exp()
    # UT transform: (I + beta * overlap)^-1 applied to beta * [value, decayed key].
    beta = beta.unsqueeze(-1)
    system = beta * overlap + torch.eye(CHUNK_SIZE, dtype=beta.dtype, device=beta.device)
    right_hand_side = beta * torch.cat([value, key * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(system, right_hand_side, upper=False, unitriangular=True)
    new_value, correction = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    key_to_end = (key * suffix.exp()).transpose(-1, -2)
    chunk_decay = from_start[..., -1, :].unsqueeze(-1)

    # Sequences are sorted by length, so those that go on are always the first ones of the state.
    states, updates, final = [], [], []
    for v, w, k, d in zip(*(x.split(steps) for x in (new_value, correction, key_to_end, chunk_decay)), strict=True):
        if v.shape[0] < state.shape[0]:
            final.append(state[v.shape[0] :])
            state = state[: v.shape[0]]
        states.append(state)
        updates.append(v - w @ state)
        state = state * d + k @ updates[-1]
    final.append(state)
    output = attention @ torch.cat(updates) + (query * from_start) @ torch.cat(states)
    return output, torch.cat(final[::-1])


def _intra_chunk(
    query: torch.Tensor, key: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decayed products inside each chunk, and the decays from its start and to its end.

    Blocks of ``b`` tokens become blocks of ``2b`` until one block is the chunk. Between a token ``i`` of the second
    half and a token ``j`` of the first, the decay is exp(sum of ``decay`` after j to the end of the first half) times
    exp(sum from the start of the second half to i): two factors of at most one.

    Returns:
        attention: ``[..., 64, 64]``, ``q_i · (decay_ij k_j)`` for j ≤ i, else 0.
        overlap: ``[..., 64, 64]``, ``k_i · (decay_ij k_j)`` for j < i, else 0.
        prefix: ``[..., 64, key_dim]``, sum of ``decay`` up to and with the token.
        suffix: ``[..., 64, key_dim]``, sum of ``decay`` after the token.
    """
    lead, key_dim = query.shape[:-2], query.shape[-1]

    def halves(x: torch.Tensor, block: int) -> tuple[torch.Tensor, ...]:
        return x.reshape(*x.shape[:-2], -1, 2, block, x.shape[-1]).unbind(-3)

    rows = torch.stack([query, key])
    diagonal = (query * key).sum(-1)
    attention = diagonal.unsqueeze(-1).unsqueeze(-1)  # [..., blocks, b, b], lower triangular
    products = torch.stack([attention, torch.zeros_like(attention)])
    prefix, suffix = decay, torch.zeros_like(decay)  # within the block
    block = 1
    while block < CHUNK_SIZE:
        prefix_first, prefix_second = halves(prefix, block)
        suffix_first, suffix_second = halves(suffix, block)
        first_keys = halves(key, block)[0] * suffix_first.exp()
        second_rows = halves(rows, block)[1] * prefix_second.exp()
        below = second_rows @ first_keys.transpose(-1, -2)
        upper_left, lower_right = products.unflatten(-3, (-1, 2)).unbind(-3)
        top = torch.cat([upper_left, torch.zeros_like(below)], dim=-1)
        products = torch.cat([top, torch.cat([below, lower_right], dim=-1)], dim=-2)
        prefix = torch.cat([prefix_first, prefix_second + prefix_first[..., -1:, :]], dim=-2)
        suffix = torch.cat([suffix_first + prefix_second[..., -1:, :], suffix_second], dim=-2)
        prefix, suffix = (x.reshape(*lead, CHUNK_SIZE, key_dim) for x in (prefix, suffix))
        block *= 2
    products = products.squeeze(-3)
    return products[0], products[1], prefix, suffix
