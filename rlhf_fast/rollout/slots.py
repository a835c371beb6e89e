"""The KV cache of a rollout and the attention that reads it.

Two stores of preallocated keys and values, one token per column, without pads. The keys of a prompt
are computed once and serve all its samples; a slot holds what its response adds, so that each slot
has a length of its own and a finished one is refilled while the others go on. Two extension points
of transformers are used and nothing is patched: layers of `Cache`, and `AttentionInterface`, under
whose name models pass no mask at all.

A forward takes one of two shapes, described by a `Step`:

    prefill   new prompts packed into one row, each seeing itself only
    decode    one token of each of the first slots, by `decode_attention`, which looks at nothing
              behind a slot's length: what a slot's last owner left there needs no clearing
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_fast import _dispatch

ATTENTION = "rlhf_fast"


@dataclass
class Step:
    """Where the N tokens of one forward stand.

    rows, columns: `[N]` int64; of the prompt store in a prefill, of the slots in a decode step.
    packed: in a prefill the tokens of each packed prompt; None in a decode step.
    prompt, before: `[N]` int64 of a decode step: each slot's row of the prompt store, and how many
        columns of it the slot continues.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    packed: list[int] | None = None
    prompt: torch.Tensor | None = None
    before: torch.Tensor | None = None
    lengths: torch.Tensor = field(init=False)  # of the slots, with the tokens of a decode step
    backend: str = field(init=False)
    prefix: tuple[torch.Tensor, torch.Tensor] = field(init=False)  # of the layer that is running
    _places: dict[tuple[int, int], torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths = self.columns + 1
        self.backend = _dispatch.requested("decode_attention")

    def places(self, heads: int, columns: int) -> torch.Tensor:
        """`[N * heads]`: which rows of a `[rows * heads * columns, D]` view take the tokens.

        Made once per forward: the layers of a model are alike.
        """
        if (heads, columns) not in self._places:
            head = torch.arange(heads, device=self.rows.device)
            place = (self.rows[:, None] * heads + head) * columns + self.columns[:, None]
            self._places[heads, columns] = place.flatten()
        return self._places[heads, columns]


@dataclass(frozen=True)
class Room:
    """How many slots of how many columns, and prompts of how many."""

    slots: int
    columns: int
    prompts: int
    prompt_columns: int

    def holds(self, other: Room) -> bool:
        return (
            self.slots >= other.slots
            and self.columns >= other.columns
            and self.prompts >= other.prompts
            and self.prompt_columns >= other.prompt_columns
        )


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer: `[rows, key heads, columns, head size]` for slots and
    prompts."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor
    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor

    def __init__(self, room: Room):
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _, heads, _, size = key_states.shape
        # Under autocast a model's keys and values may differ in dtype; PyTorch's attention would
        # take both in this one.
        kind = key_states.device.type
        dtype = value_states.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)

        def pair(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (rows, heads, columns, size)
            return value_states.new_empty(shape, dtype=dtype), value_states.new_empty(
                shape, dtype=dtype
            )

        self.keys, self.values = pair(self.room.slots, self.room.columns)
        self.prompt_keys, self.prompt_values = pair(self.room.prompts, self.room.prompt_columns)
        self.is_initialized = True

    def update(self, key_states, value_states, step: Step):
        """Store the new keys and values; return those that this forward's attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        decode = step.packed is None
        stores = (self.keys, self.values) if decode else (self.prompt_keys, self.prompt_values)
        _, heads, columns, size = stores[0].shape
        places = step.places(heads, columns)
        for stored, new in zip(stores, (key_states, value_states), strict=True):
            rows = new.transpose(1, 2).reshape(-1, size).to(stored.dtype)
            stored.view(-1, size).index_copy_(0, places, rows)
        if not decode:
            return key_states, value_states
        live = len(step.rows)
        step.prefix = self.prompt_keys, self.prompt_values
        return self.keys[:live], self.values[:live]

    def move(self, source: int, target: int) -> None:
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    # The rest of the interface serves masks, which this attention name does not get.
    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.room.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


def _kind(model: Any) -> tuple[Any, ...]:
    """What the dtype and the device of a model's keys depend on."""
    weight = model.get_input_embeddings().weight
    device = weight.device.type
    enabled = torch.is_autocast_enabled(device)
    return weight.device, weight.dtype, enabled and torch.get_autocast_dtype(device)


class SlotCache(Cache):
    """The keys and values of all layers of a model, and the step that is running."""

    step: Step

    def __init__(self, model: Any, room: Room):
        self.room, self.kind = room, _kind(model)
        self.slot_layers = [SlotLayer(room) for _ in range(model.config.num_hidden_layers)]
        super().__init__(layers=list(self.slot_layers))

    def serves(self, model: Any, room: Room) -> bool:
        """Whether it has room for so much, in the dtype and on the device that `model` has now."""
        return self.room.holds(room) and _kind(model) == self.kind

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return self.slot_layers[layer_idx].update(key_states, value_states, self.step)

    def move(self, source: int, target: int) -> None:
        """Put what slot `source` holds into slot `target`."""
        for layer in self.slot_layers:
            layer.move(source, target)

    @property
    def bytes(self) -> int:
        """What the keys and values take now: 0 before the first forward."""
        return sum(
            x.numel() * x.itemsize
            for y in self.slot_layers
            if y.is_initialized
            for x in (y.keys, y.values, y.prompt_keys, y.prompt_values)
        )


def _causal(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """True where position `key` is at or before `query`, within the last `window` positions."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


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


def _decode(query, key, value, step: Step, scaling, window, softcap):
    """`[slots, heads, D]`. The torch op itself: a fifth of its time in a small model is checks."""
    return torch.ops.rlhf_fast.decode_attention(
        query.squeeze(2).to(key.dtype), key, value, step.lengths,
        [*step.prefix, step.prompt, step.before], scaling, window, softcap, step.backend,
    )  # fmt: skip


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
    if slot_step.packed is None:
        out = _decode(query, key, value, slot_step, scaling, sliding_window, softcap)
        return out.unsqueeze(1), None
    packed = slot_step.packed
    out = _prefill(query, key, value, packed, scaling, sliding_window, softcap)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)
