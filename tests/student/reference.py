"""Kimi Delta Attention as its equation reads, one token and one head at a time. Slow and obvious."""

import torch


def recurrence(query, key, value, decay, beta, initial_state=None):
    """Eq. 1 of Kimi Linear (arXiv 2510.26692) for one sequence.

    query, key, decay: ``[tokens, heads, key_dim]``; value: ``[tokens, heads, value_dim]``; beta: ``[tokens, heads]``;
    initial_state: ``[heads, key_dim, value_dim]``. Returns the outputs and the final state.
    """
    tokens, heads, key_dim = key.shape
    identity = torch.eye(key_dim, dtype=key.dtype)
    outputs, final = [], []
    for h in range(heads):
        state = torch.zeros(key_dim, value.shape[-1], dtype=key.dtype) if initial_state is None else initial_state[h]
        rows = []
        for t in range(tokens):
            q = query[t, h] / (query[t, h].square().sum() + 1e-6).sqrt() / key_dim**0.5
            k = key[t, h] / (key[t, h].square().sum() + 1e-6).sqrt()
            erase = identity - beta[t, h] * torch.outer(k, k)
            state = erase @ (decay[t, h].exp().diag() @ state) + beta[t, h] * torch.outer(k, value[t, h])
            rows.append(state.T @ q)
        outputs.append(torch.stack(rows))
        final.append(state)
    return torch.stack(outputs, dim=1), torch.stack(final)
