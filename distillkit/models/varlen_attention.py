"""Full attention in packed documents without a mask, as an attention implementation of transformers: `varlen`.

Where documents are packed, transformers hands SDPA a mask [batch, 1, tokens, tokens] and SDPA computes every pair of
tokens: at 32k tokens that is a gigabyte, and most of the work is thrown away. Here all rows are one row of documents
and each document is attended to by itself: on CUDA, in 16 bits, by `torch.nn.attention.varlen`, and by one call of SDPA
per document elsewhere and for what that kernel cannot do (dropout, some head sizes). Boundaries come from the decoder's
`cu_seq_lens_q` and `max_length_q`, the names that transformers gives them for flash attention, or from `position_ids`;
whatever is not one row without a mask goes to SDPA as ever.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "varlen"
_KERNEL_CAPABILITY = (8, 0)
_KERNEL_HEAD_SIZES = range(8, 257, 8)


def use_varlen_attention(model: PreTrainedModel, compute_dtype: torch.dtype) -> bool:
    """Exchange SDPA for varlen attention where its kernel runs; whether it was exchanged.

    It runs on CUDA (Ampere and newer) in 16 bits, for models that transformers can run with flash attention.
    """
    device = next(model.parameters()).device
    if (
        model.config._attn_implementation != "sdpa"
        or not model._supports_flash_attn
        or device.type != "cuda"
        or torch.cuda.get_device_capability(device) < _KERNEL_CAPABILITY
        or compute_dtype not in (torch.bfloat16, torch.float16)
    ):
        return False
    model.set_attn_implementation(VARLEN)
    return True


def document_boundaries(position_ids: Int[Tensor, "1 tokens"]) -> tuple[Int[Tensor, " documents_and_1"], int]:
    """`cu_seqlens` (int32) of the documents of a row, which start where positions do not go on, and the longest."""
    positions = position_ids.flatten()
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[1:] = positions.diff() != 1
    cu_seqlens = F.pad(starts.nonzero().squeeze(-1), (0, 1), value=len(positions)).int()
    return cu_seqlens, int(cu_seqlens.diff().max())


@torch.compiler.disable
def varlen_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads kv_tokens head_dim"],
    value: Float[Tensor, "batch kv_heads kv_tokens value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Int[Tensor, " documents_and_1"] | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch tokens heads value_dim"], None]:
    """Causal attention within documents; an attention function of transformers.

    Raises ValueError for boundaries with more than one row, or with a mask.
    """
    one_row = query.shape[0] == 1 and attention_mask is None and query.shape[2] == key.shape[2]
    if cu_seq_lens_q is not None and not one_row:
        raise ValueError("cu_seq_lens_q needs one row that holds all documents, no attention_mask and no cache")
    if not one_row or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if cu_seq_lens_q is None or max_length_q is None:
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(query.shape[2], device=query.device)
        cu_seq_lens_q, max_length_q = document_boundaries(position_ids)
    dtype = attention_dtype(value)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query, key, value = (x.to(dtype)[0].transpose(0, 1) for x in (query, key, value))
    if _kernel_can(query, value, dropout):
        output = _by_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        output = _by_document(query, key, value, cu_seq_lens_q, scaling, sliding_window, dropout)
    return output.unsqueeze(0), None


def attention_dtype(value: Float[Tensor, "*shape"]) -> torch.dtype:
    """In which it is computed. Kernels of PyTorch's own are cast by autocast; for this one it has no rule."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def _kernel_can(
    query: Float[Tensor, "tokens heads head_dim"], value: Float[Tensor, "tokens heads value_dim"], dropout: float
) -> bool:
    """It has no dropout, and one head size for queries, keys and values (multi-head latent attention has two)."""
    head_dim = query.shape[-1]
    in_16_bits = query.dtype in (torch.bfloat16, torch.float16)
    sizes = head_dim in _KERNEL_HEAD_SIZES and value.shape[-1] == head_dim
    return query.is_cuda and in_16_bits and sizes and dropout == 0


def _by_kernel(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens heads head_dim"],
    value: Float[Tensor, "tokens heads head_dim"],
    cu_seqlens: Int[Tensor, " documents_and_1"],
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Float[Tensor, "tokens heads head_dim"]:
    before = -1 if sliding_window is None else sliding_window - 1
    output = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(before, 0)
    )
    assert isinstance(output, Tensor)
    return output


def _by_document(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens heads head_dim"],
    value: Float[Tensor, "tokens heads value_dim"],
    cu_seqlens: Int[Tensor, " documents_and_1"],
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
) -> Float[Tensor, "tokens heads value_dim"]:
    lengths = cu_seqlens.diff().tolist()
    batches = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # of one row, as fused kernels want them
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in batches), strict=True):
        tokens = q.shape[2]
        band = None
        if sliding_window is not None and tokens > sliding_window:
            band = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def varlen_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask that SDPA would get; none for one row without padding, where boundaries do its work."""
    if batch_size == 1 and q_length == kv_length and attention_mask is None:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
