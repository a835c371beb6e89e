"""Log-probs of finished responses under the model's own forward, as a trainer computes them."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_fast.kernels.logprob import logprob_entropy
from rlhf_fast.kernels.sample import replay_logprob

# Logits per forward, 256 MiB in float32: rows are taken in chunks, one row at least.
_LOGITS = 1 << 26


def rescore(
    model: Any,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    log_mass: torch.Tensor,
    sampling: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, log_mass, entropy), each `[N, T]` float32 and 0 where `mask` is.

    One forward over prompt and response, under the attention that the model trains with, with
    position ids that count unmasked tokens; then the ops that a trainer uses, `logprob_entropy`
    without truncation and `replay_logprob` with it. A token that sits at the edge of the kept set
    may fall out of it by the rounding of this other forward: it keeps the mass of its draw, so that
    its log-prob stays finite.

    Args:
        prompt_ids, prompt_mask: `[N, S]`, left-padded.
        ids, mask: `[N, T]`, right-padded.
        log_mass: `[N, T]` of the draws.
        sampling: temperature (not 0), top_k, top_p, min_p.
    """
    whole, whole_mask = torch.cat((prompt_ids, ids), 1), torch.cat((prompt_mask, mask), 1)
    positions = (whole_mask.cumsum(1) - 1).clamp(min=0)
    rows = max(1, _LOGITS // ((ids.shape[1] + 1) * model.get_output_embeddings().weight.shape[0]))
    parts = []
    for first in range(0, len(ids), rows):
        part = slice(first, first + rows)
        logits = model(
            input_ids=whole[part], attention_mask=whole_mask[part], position_ids=positions[part],
            logits_to_keep=ids.shape[1] + 1, use_cache=False, return_dict=True,
        ).logits[:, :-1]  # fmt: skip
        parts.append(_score(logits, ids[part], mask[part], log_mass[part], sampling))
    logprob, log_mass, entropy = (
        torch.cat(columns).float() for columns in zip(*parts, strict=True)
    )
    return logprob, log_mass, entropy


def _score(logits, ids, mask, drawn_mass, sampling) -> tuple[torch.Tensor, ...]:
    whole = logprob_entropy(logits, ids, temperature=sampling["temperature"], mask=mask)
    if sampling["top_k"] == 0 and sampling["top_p"] == 1 and sampling["min_p"] == 0:
        return whole.logprob, torch.zeros_like(whole.logprob), whole.entropy
    logprob, log_mass = replay_logprob(logits, ids, **sampling)
    drawn_mass = drawn_mass.to(logprob.dtype)
    lost = logprob == -torch.inf
    logprob = torch.where(lost, whole.logprob - drawn_mass, logprob)
    log_mass = torch.where(lost, drawn_mass, log_mass)
    return logprob.where(mask, 0.0), log_mass.where(mask, 0.0), whole.entropy
