"""The vocabulary over several processes: each holds a slice of the head, ranks in order."""

from __future__ import annotations

import torch
import torch.distributed as dist


def resolve(group: str) -> dist.ProcessGroup | None:
    """The process group called `group`, or None for ""."""
    return dist.distributed_c10d._resolve_process_group(group) if group else None


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`x` of every rank, stacked in rank order."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def place(size: int, group: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(first id of this rank's slice, size of the whole vocabulary) as tensors, without a sync."""
    mine = torch.full((), size, device=device)  # filled there: no copy, no synchronisation
    if not group:
        return torch.zeros_like(mine), mine
    ranks = resolve(group)
    sizes = _gather(mine, ranks)
    return sizes[: ranks.rank()].sum(), sizes.sum()


def gather_stats(stats: list[torch.Tensor], group: str) -> list[list[torch.Tensor]]:
    """The row statistics of every rank, in rank order, in one collective."""
    if not group:
        return [stats]
    return [list(rank.unbind()) for rank in _gather(torch.stack(stats), resolve(group))]


def sum_over_ranks(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of `x` over the ranks of `group`, in place."""
    if group:
        dist.all_reduce(x, group=resolve(group))
    return x
