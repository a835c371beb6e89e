"""Ranking loss of the reward model: checks, schema, fake, autograd."""

from __future__ import annotations

import torch

from rlhf_fast import _args, _dispatch
from rlhf_fast.kernels.ppo_loss.op import drop_units, register_unit_gradients

_dispatch.implementations("ranking_loss", __package__)


def _fake(scores, *_):
    return scores.new_empty(()), scores.new_empty(scores.shape)


_dispatch.define(
    "ranking_loss",
    "ranking_loss(Tensor scores, Tensor ranks, Tensor? mask, float margin, str backend) -> "
    "(Tensor, Tensor)",
    fake=_fake,
)
register_unit_gradients("ranking_loss", (0,), 5)


def ranking_loss(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    margin: float = 0.0,
) -> torch.Tensor:
    """Loss of a reward model on ranked completions: all pairs of a prompt at once.

        loss = mean_p mean_{(w, l) of p} -log sigmoid(scores[p, w] - scores[p, l] - margin)

    over the pairs with ranks[p, w] < ranks[p, l] and over the prompts p that have one. Each of the
    K completions is scored once, not once per pair. Source: Ouyang et al., "Training language
    models to follow instructions with human feedback", 2022, eq. 1; the margin from Touvron et al.,
    "Llama 2", 2023.

    Args:
        scores: `[P, K]` rewards of K completions of each prompt.
        ranks: `[P, K]` numbers of any type, lower is better; equal ranks make no pair.
        mask: `[P, K]`; completions where it is 0 make no pair. None: all are there.
        margin: how far apart the scores should be.

    Returns:
        A scalar, float32 (float64 for float64 scores), differentiable in `scores`; 0 where there
        is no pair at all.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or margin.

    >>> rlhf_fast.ranking_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]))
    tensor(0.3133)
    """
    _args.check_float_tensor("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores: expected shape [P, K], got {tuple(scores.shape)}")
    if not isinstance(ranks, torch.Tensor):
        raise TypeError(f"ranks: expected a tensor, got {type(ranks).__name__}")
    if ranks.is_complex():
        raise TypeError(f"ranks: expected real numbers, got {str(ranks.dtype)[6:]}")
    _args.check_shape("ranks", ranks, scores.shape, "that of scores")
    _args.check_device("ranks", ranks, scores.device, "scores")
    mask = _args.as_mask("mask", mask, scores.shape, scores.device, "that of scores")
    margin = _args.number("margin", margin)
    return drop_units(
        torch.ops.rlhf_fast.ranking_loss,
        scores.to(_args.compute_dtype(scores.dtype)).contiguous(), ranks.detach().contiguous(),
        mask if mask is None else mask.contiguous(), margin, _dispatch.requested("ranking_loss"),
    )[0]  # fmt: skip
