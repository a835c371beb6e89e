"""The KV cache of a rollout and the attention that reads it.

A slot is a row of preallocated keys and values, one token per column: the key in column c is that
of position c, so there are no pads, each slot has its own length, and a finished slot is refilled
while the others go on. Two extension points of transformers are used and nothing is patched: layers
of `Cache`, and `AttentionInterface`, under whose name models pass no mask at all.

A forward takes one of two shapes, described by a `Step`:

    prefill   the prompts of new slots packed into one row, each seeing itself only
    decode    one token of each live slot; live slots are always the first ones, so that their keys
              are a view of the cache and never copied
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "rlhf_fast"


@dataclass
class Step:
    """Where the N tokens of one forward stand.

    rows, columns: `[N]` int64, the slot and the position of each token.
    lengths: in a prefill the tokens of each packed prompt; None in a decode step.
    width: in a decode step, how many columns the longest live slot uses.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    lengths: list[int] | None = None
    width: int = 0
    _visible: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def visible(self, window: int | None) -> torch.Tensor:
        """`[N, 1, 1, width]`: the columns that each decoded token sees, made once per forward."""
        if window not in self._visible:
            column = torch.arange(self.width, device=self.columns.device)
            self._visible[window] = _causal(self.columns[:, None, None, None], column, window)
        return self._visible[window]


def _causal(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """True where position `key` is at or before `query`, within the last `window` positions."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer: `[slots, key heads, columns, head size]`, from zeros."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, slots: int, columns: int):
        super().__init__()
        self.slots, self.columns = slots, columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def zeros(like: torch.Tensor) -> torch.Tensor:
            _, heads, _, size = like.shape
            return like.new_zeros(self.slots, heads, self.columns, size)

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.is_initialized = True

    def update(self, key_states, value_states, step: Step):
        """Store the new keys and values; return those that this forward's attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if step.lengths is not None:
                # What the last owner left behind is masked, but a NaN would get through a mask.
                stored[step.rows.unique_consecutive()] = 0
            stored[step.rows, :, step.columns] = new.transpose(1, 2).flatten(0, 1)
        if step.lengths is not None:
            return key_states, value_states
        live = len(step.rows)
        return self.keys[:live, :, : step.width], self.values[:live, :, : step.width]

    def move(self, source: int, target: int) -> None:
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    # The rest of the interface serves masks, which this attention name does not get.
    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class SlotCache(Cache):
    """`slots` x `columns` tokens for each layer of a model, and the step that is running."""

    step: Step

    def __init__(self, layers: int, slots: int, columns: int):
        self.slot_layers = [SlotLayer(slots, columns) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return self.slot_layers[layer_idx].update(key_states, value_states, self.step)

    def move(self, source: int, target: int) -> None:
        """Put what slot `source` holds into slot `target`."""
        for layer in self.slot_layers:
            layer.move(source, target)


def _attention(query, key, value, seen, scaling, softcap):
    """Attention of `[B, Hq, Q, D]` queries over `[B, Hk, K, D]` keys; `seen` None is causal."""
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, seen, scale=scaling, is_causal=seen is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value.repeat_interleave(groups, 1)


def _prefill(query, key, value, lengths, scaling, window, softcap):
    outputs = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        seen, n = None, q.shape[2]
        if softcap is not None or (window is not None and window < n):
            position = torch.arange(n, device=q.device)
            seen = _causal(position[:, None], position, window)
        outputs.append(_attention(q, k, v, seen, scaling, softcap))
    return torch.cat(outputs, 2)


def _decode(query, key, value, seen, scaling, softcap):
    """One query per slot: the heads that share a key head become queries of that head."""
    heads = query.shape[1]
    query = query.unflatten(1, (key.shape[1], heads // key.shape[1])).squeeze(3)
    out = _attention(query, key, value, seen, scaling, softcap)
    return out.flatten(1, 2).unsqueeze(2)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    slot_step: Step,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention that a model runs inside a rollout, in `AttentionInterface`'s form.

    Args:
        query: `[1, heads, N, D]` in a prefill, `[slots, heads, 1, D]` in a decode step.
        key, value: what `SlotLayer.update` returned.
        slot_step: handed to the model as a keyword, which it passes through to here.
        sliding_window, softcap: those of the layer, None where it has none.

    Returns:
        (`[1, N, heads, D]` or `[slots, 1, heads, D]`, None).
    """
    if slot_step.lengths is None:
        seen = slot_step.visible(sliding_window)
        out = _decode(query, key, value, seen, scaling, softcap)
    else:
        lengths = slot_step.lengths
        out = _prefill(query, key, value, lengths, scaling, sliding_window, softcap)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)
