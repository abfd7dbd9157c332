"""What a KDA layer remembers between two calls: a few inputs of the short convolution, and the recurrent state.

transformers' own ``LinearAttentionLayer`` does not count tokens, so a cache made of such layers alone cannot answer
``get_seq_length``, which generation asks for. This layer counts.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer


class RecurrentCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """Convolution inputs ``[batch, conv_size - 1, channels]`` and state ``[batch, heads, key_dim, value_dim]``.

    Both have the same size after one token and after a million. A state cannot be taken back, so a cache that is to be
    cropped (``activate_past_recording``, as a draft's is) keeps the states before each call since the last crop, too.

    Args:
        static: of a ``StaticCache``, whose steps may be one graph: states and the count stay at their addresses.
    """

    is_compileable = False
    record_past: bool
    seen_tokens: int | torch.Tensor
    counter: CacheLayerMixin | None = None
    """The layer of the same cache that counts the tokens for this one, the first of full attention if there is any."""

    def __init__(self, *, static: bool = False) -> None:
        super().__init__()
        self.is_compileable = static
        self.seen_tokens = 0
        self.is_initialized = False
        self.recorded: list[tuple[int, torch.Tensor | None, torch.Tensor | None, Callable[[int], Any]]] = []

    @property
    def conv_state(self) -> Any:
        """A tensor, or None before the first token."""
        return self.conv_states[0]

    @property
    def recurrent_state(self) -> Any:
        """A tensor, or None before the first token."""
        return self.recurrent_states[0]

    def store(self, conv_state: torch.Tensor, recurrent_state: torch.Tensor) -> None:
        """Replace both states."""
        if self.is_compileable:
            if self.conv_state is None:
                self.lazy_initialization(conv_states=conv_state, recurrent_states=recurrent_state)
            self.conv_state.copy_(conv_state)
            self.recurrent_state.copy_(recurrent_state)
        else:
            self.conv_states[0], self.recurrent_states[0] = conv_state, recurrent_state
        self.dtype, self.device = conv_state.dtype, conv_state.device
        self._mark(initialized=True)

    def count(self, tokens: int) -> None:
        """So many tokens more."""
        if self.counter is not None:
            return
        if self.is_compileable and not isinstance(self.seen_tokens, torch.Tensor):
            self.seen_tokens = torch.tensor(self.seen_tokens, device=self.device)
            if not torch.compiler.is_dynamo_compiling():
                torch._dynamo.mark_static_address(self.seen_tokens)
        self.seen_tokens += tokens  # of a static cache: in place

    def _mark(self, *, initialized: bool) -> None:
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = initialized
        self.has_previous_state[0] = self.is_initialized = initialized

    def record(self, tokens: int, replay: Callable[[int], Any]) -> None:
        """Before a call with so many tokens; ``replay`` makes the call with the first few of them."""
        conv_state, state = (None if each is None else each.clone() for each in (self.conv_state, self.recurrent_state))
        self.recorded.append((tokens, conv_state, state, replay))

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Go back by ``-tokens_to_remove`` tokens; the next time no further than to here.

        Raises RuntimeError for more tokens than were recorded.
        """
        remove, recorded = -tokens_to_remove, sum(tokens for tokens, *_ in self.recorded)
        if not 0 <= remove <= recorded:
            raise RuntimeError(f"crop({tokens_to_remove}): the state can go back by the {recorded} tokens recorded")
        while remove > 0:
            tokens, self.conv_states[0], self.recurrent_states[0], replay = self.recorded.pop()
            self._mark(initialized=self.conv_state is not None)
            self.count(-tokens)
            if tokens > remove:
                replay(tokens - remove)
            remove -= tokens
        self.recorded = []

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a KDA layer has no keys and values to store")

    def get_seq_length(self) -> int | torch.Tensor:
        return self.seen_tokens if self.counter is None else self.counter.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.counter is not None:
            return self.counter.get_mask_sizes(query_length)
        return query_length, 0  # no layer is of full attention, so nothing looks at the mask

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all tokens; those of a static cache stay where they are, and keep their number of rows."""
        if self.is_compileable:
            super().reset()
        else:
            self.conv_states[0] = self.recurrent_states[0] = None
        self._mark(initialized=False)
        self.recorded = []
        if isinstance(self.seen_tokens, torch.Tensor):
            self.seen_tokens.zero_()
        else:
            self.seen_tokens = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.conv_state is not None and self.recurrent_state is not None:
            self.conv_states[0] = self.conv_state.repeat_interleave(repeats, dim=0)
            self.recurrent_states[0] = self.recurrent_state.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.conv_state is not None and self.recurrent_state is not None:
            self.conv_states[0] = self.conv_state[indices]
            self.recurrent_states[0] = self.recurrent_state[indices]
