"""What a rollout will take in memory, said before it is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Bytes of one call of `Rollout.generate`, beside the model and the activations of a forward.

    Nothing of size [rows, max_new_tokens, vocabulary] is ever made. `logprobs="rescore"` adds the
    logits of as many responses as 2^26 numbers hold, and of one response at least.
    """

    slots: int  # responses computed at the same time
    columns: int  # tokens of the longest prompt and its response
    prompts: int  # prompts whose keys are held at the same time
    kv_bytes: int  # keys and values of all layers; held until `release`
    logits_bytes: int  # of one decode step or prefill: a row per slot
    output_bytes: int  # ids, log-probs, log-masses, entropies of all responses

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.logits_bytes + self.output_bytes


def plan(
    model: Any, slots: int, columns: int, *, prompts: int, rows: int, max_new_tokens: int
) -> Plan:
    """The plan of `rows` responses of at most `max_new_tokens` to `prompts` prompts at a time.

    `rows` is 0 for a call that is not known: each slot may then hold a prompt of its own. Keys and
    values have the dtype of the weights; under autocast they have its dtype instead.
    """
    config, head = model.config, model.get_output_embeddings().weight
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = slots * max_new_tokens + prompts * (columns - max_new_tokens)
    tokens = 2 * config.num_hidden_layers * held
    return Plan(
        slots=slots,
        columns=columns,
        prompts=prompts,
        kv_bytes=tokens * heads * size * head.itemsize,
        # The head's product, and a float32 copy of it inside some samplers.
        logits_bytes=slots * head.shape[0] * (head.itemsize + 4),
        # An int64 and three float32, with the spare row of the loop.
        output_bytes=(rows + 1) * max_new_tokens * 20 if rows else 0,
    )
