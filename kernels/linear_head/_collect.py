"""From the gradient of a chunk's logits to those of head and hidden states, chunk after chunk.

A collector says where the row kernel writes a chunk's gradient (`target`), is told when that has
happened (`written`) and when there is no more (`finish`):

* `InPlace`, in the arithmetic's dtype: over the logits, multiplied at once.
* `Stacked`, in half precision: the gradients of many chunks, one below the other, are multiplied
  together, because each product reads and writes the float32 gradient of the head.
* `ActiveRows`, where the library has products whose number of rows lies on the device: one product
  over the rows that have a gradient at all. Masked, clipped and advantage-less tokens have none.
"""

from __future__ import annotations

import torch

from ._gradients import Gradients
from ._logits import Logits, chunk_bytes

# Gathering a logit's gradient takes 0.46 ns, its two products with 512 columns 4.9 ns: rows are
# left out where they are more than an eighth.
_WORTH_GATHERING = 7 / 8
# A stack has the bytes of this many chunks: 8192 rows of 131072 columns by default.
_STACK = 4
# Where `torch._grouped_mm` has kernels of its own; elsewhere it waits for the device.
_CAPABILITIES = ((9, 0), (10, 0))


class InPlace:
    """Rows whose gradient turns out to be 0 take no part in the products, on the CPU."""

    def __init__(self, logits: Logits, gradients: Gradients) -> None:
        self.logits, self.gradients = logits, gradients

    def target(self, z, block, g, h) -> tuple[torch.Tensor, None]:
        self.dz, self.kept = z, None
        # With an entropy term every token that counts has a gradient.
        if h is None and not self.logits.rows.invariant and not g.is_cuda and not g.all():
            kept = g.nonzero().squeeze(-1)
            if len(kept) <= _WORTH_GATHERING * len(g):
                self.kept = kept
        return z, None

    def written(self, block: slice) -> None:
        self.logits.carry(self.gradients, self.dz, block, self.kept)

    def finish(self) -> None:
        pass


class Stacked:
    def __init__(self, logits: Logits, gradients: Gradients, stack: torch.Tensor) -> None:
        """`stack` has room for some chunks."""
        self.logits, self.gradients, self.stack = logits, gradients, stack
        self.first = self.stop = 0  # the rows in the stack

    def target(self, z, block, g, h) -> tuple[torch.Tensor, None]:
        if block.stop - self.first > len(self.stack):
            self.finish()
        self.stop = block.stop
        return self.stack[block.start - self.first : block.stop - self.first], None

    def written(self, block: slice) -> None:
        pass

    def finish(self) -> None:
        filled = self.stack[: self.stop - self.first]
        self.logits.carry(self.gradients, filled, slice(self.first, self.stop))
        self.first = self.stop


class ActiveRows:
    """The gradients of the rows that have one, in their order, at the beginning of the stack.

    The products are `torch._grouped_mm` with one group that ends where a tensor says: the host
    launches them without waiting, and they take the time of the rows that there are. Their results
    are bfloat16, rounded once.
    """

    def __init__(self, logits: Logits, gradients: Gradients, stack: torch.Tensor) -> None:
        """`stack` has room for the gradients of all rows of the call."""
        self.logits, self.gradients, self.stack = logits, gradients, stack
        self.wants_weight = gradients.weight is not None
        gradients.weight = None  # its float32 memory is not needed
        self.stack[:1].zero_()  # where no row has a gradient, a product is taken over this one
        self.count = torch.zeros((), dtype=torch.int64, device=stack.device)
        self.active: list[torch.Tensor] = []

    def target(self, z, block, g, h) -> tuple[torch.Tensor, torch.Tensor]:
        """The stack, and for each row of the chunk its place there, -1 where it has none."""
        active = self.logits.rows.live[block] & (g != 0 if h is None else (g != 0) | (h != 0))
        upto = active.cumsum(0) + self.count
        self.count = upto[-1]
        self.active.append(active)
        return self.stack, torch.where(active, upto - 1, -1)

    def written(self, block: slice) -> None:
        pass

    def finish(self) -> None:
        order = torch.argsort(~torch.cat(self.active), stable=True)
        inside = (torch.arange(len(order), device=order.device) < self.count).unsqueeze(-1)
        end = self.count.clamp(min=1).to(torch.int32).view(1)
        into = self.gradients
        if self.wants_weight:
            x = torch.where(inside, self.logits.rows.operand.index_select(0, order), 0.0)
            into.weight = torch._grouped_mm(self.stack.t(), x, offs=end)[0]
        if into.hidden is not None:
            weight = self.logits.head.weight.unsqueeze(0)
            dx = torch.where(inside, torch._grouped_mm(self.stack, weight, offs=end), 0.0)
            into.hidden.index_copy_(0, order, dx.to(into.hidden.dtype))


def has_grouped_products(x: torch.Tensor) -> bool:
    """Whether a product of `x` may end where a tensor on the device says."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) in _CAPABILITIES


def _active_rows_serve(logits: Logits, needs: list[bool]) -> bool:
    """Whether all that is needed comes from such products, and they take these operands."""
    weight, operand = logits.head.weight, logits.rows.operand
    aligned = all(
        x.stride(-1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in (weight, operand)
    )
    return (
        aligned
        and weight.shape[0] % 8 == 0
        and logits.gradient_dtype == torch.bfloat16
        and logits.head.logit_scale == 1.0
        and not any(needs[2:])
        and has_grouped_products(weight)
    )


def collector(
    logits: Logits, gradients: Gradients, needs: list[bool]
) -> InPlace | Stacked | ActiveRows:
    """The collector of a call, whose chunks have `logits.rows.block` rows."""
    rows, vocabulary = logits.rows, logits.head.weight.shape[0]
    count = rows.hidden.shape[0]
    if logits.gradient_dtype == rows.hidden.dtype or count == 0:
        return InPlace(logits, gradients)
    room = _STACK * chunk_bytes(rows.hidden.device.type) // (2 * vocabulary)
    size = min(max(room, rows.block), count)
    stack = rows.hidden.new_empty(size, vocabulary, dtype=logits.gradient_dtype)
    if size == count and _active_rows_serve(logits, needs):
        return ActiveRows(logits, gradients, stack)
    return Stacked(logits, gradients, stack)
