"""How the gradient of a tile of logits is made, and what it gives to hidden states and head."""

from __future__ import annotations

import torch

from ._tiles import Head, Rows, finite, product


def accumulate(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """total = beta total + alpha a @ b, in the dtype of `total`; beta 0 overwrites even NaN."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha, beta=beta)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=alpha, beta=beta, out=total)


def put(du: torch.Tensor, ids: torch.Tensor, columns: slice, value: torch.Tensor) -> None:
    """Write `value` to each row's id where the id lies in this slice."""
    owned = (ids >= columns.start) & (ids < columns.stop)
    index = torch.where(owned, ids - columns.start, 0).to(torch.int64).unsqueeze(-1)
    value = torch.where(owned.unsqueeze(-1), value.unsqueeze(-1), du.gather(-1, index))
    du.scatter_(-1, index, value)


class Gradients:
    """Accumulates what a tile's gradient gives to hidden, weight, bias, A and B, where needed."""

    def __init__(
        self,
        head: Head,
        rows: Rows,
        down: torch.Tensor | None,
        needs: list[bool],
        slicewise: bool = True,
    ):
        """With `slicewise` a slice is entered once, and rounded when it is left.

        Without, slices are entered again and again, and all gradients stay in the arithmetic's
        dtype.
        """
        self.head, self.rows, self.down, self.slicewise = head, rows, down, slicewise
        hidden, weight, bias, lora_a, lora_b = needs

        def new(x: torch.Tensor, needed: bool, make=torch.zeros) -> torch.Tensor | None:
            if not needed:
                return None
            dtype = x.dtype if slicewise else rows.hidden.dtype
            return make(x.shape, dtype=dtype, device=x.device)

        # Not zeroed, which takes 25 ms for 32000 x 512: the first product overwrites it.
        self.unwritten = torch.empty if rows.hidden.shape[0] else torch.zeros
        self.entered: set[int] = set()
        self.hidden = rows.new(rows.hidden.shape[1]) if hidden else None
        self.weight = new(head.weight, weight, self.unwritten)
        self.bias, self.lora_b = new(head.bias, bias), new(head.lora_b, lora_b)
        self.wants_a = lora_a
        through = down is not None and (hidden or lora_a)
        self.down_grad = torch.zeros_like(down) if through else None

    def enter(self, columns: slice) -> None:
        """Start a slice: its gradients are in the arithmetic's dtype until `leave` rounds them."""
        dtype = self.rows.hidden.dtype

        def part(whole: torch.Tensor | None, make=torch.zeros) -> torch.Tensor | None:
            if whole is None or whole.dtype == dtype:
                return whole if whole is None else whole[columns]
            return make(whole[columns].shape, dtype=dtype, device=whole.device)

        self.beta = 1.0 if columns.start in self.entered else 0.0
        self.entered.add(columns.start)
        self.slice_weight = part(self.weight, self.unwritten)
        self.slice_bias, self.slice_b = part(self.bias), part(self.lora_b)

    def add(
        self,
        dz: torch.Tensor,
        block: slice | torch.Tensor,
        weight: torch.Tensor,
        up: torch.Tensor | None,
    ) -> None:
        """Add the tile whose gradient of logit_scale * product + bias is `dz`.

        `block` is a slice of the rows, or the indices of some.
        """
        scale = self.head.logit_scale
        if self.slice_bias is not None:
            self.slice_bias += dz.sum(0, dtype=self.slice_bias.dtype)
        if self.slice_b is not None:
            accumulate(self.slice_b, dz.t(), self.down[block], scale * self.head.scaling)
        if self.down_grad is not None:
            self._add_rows(self.down_grad, block, dz, up)
        dz = dz.to(self.rows.operand.dtype)
        if self.slice_weight is not None:
            accumulate(self.slice_weight, dz.t(), self.rows.operand[block], scale, self.beta)
            self.beta = 1.0
        if self.hidden is not None:
            self._add_rows(self.hidden, block, dz, weight)

    def _add_rows(self, grad, block, dz: torch.Tensor, factor: torch.Tensor) -> None:
        """Add dz times `factor` to the gradient of some rows."""
        scale = self.head.logit_scale
        if isinstance(block, torch.Tensor):
            grad.index_add_(0, block, product(dz, factor, self.rows.invariant), alpha=scale)
        elif self.rows.invariant:
            grad[block].add_(product(dz, factor, True), alpha=scale)
        else:
            accumulate(grad[block], dz, factor, scale)

    def leave(self, columns: slice) -> None:
        """Round the slice's gradients, once."""
        for whole, part in (
            (self.weight, self.slice_weight),
            (self.bias, self.slice_bias),
            (self.lora_b, self.slice_b),
        ):
            if whole is not None and whole.dtype != part.dtype:
                whole[columns] = part.to(whole.dtype)

    def finish(self, reduce) -> list[torch.Tensor | None]:
        """(hidden, weight, bias, A, B), hidden's not yet rounded; `reduce` sums over ranks."""
        lora_a = None
        if self.down_grad is not None:
            self.down_grad = reduce(self.down_grad)
        if self.wants_a:
            lora_a = self.down_grad.t() @ self.rows.hidden
            lora_a = lora_a.to(self.head.lora_a.dtype) if self.slicewise else lora_a
        hidden = None
        if self.hidden is not None:
            hidden = reduce(self.hidden)
            if self.down_grad is not None:
                a = self.head.lora_a.to(hidden.dtype)
                for block in self.rows.blocks():
                    hidden[block] += product(self.down_grad[block], a, self.rows.invariant)
            hidden = self.rows.whole(hidden)
        return [hidden, self.weight, self.bias, lora_a, self.lora_b]


class Upstream:
    """The upstream gradients g of log-prob and h of entropy, ready to be spread over a tile.

    With e = exp(u - m) and mean = sum p (u - m), the gradient of the logits is e (b + a (u - m))
    where a = -h / (s t) and b = (h mean - g) / (s t), s being the sum of e. At y it is
    (-g expm1(logprob) - h p_y (logprob + entropy)) / t, where 1 - p_y does not cancel.
    """

    def __init__(self, rows: Rows, local: torch.Tensor):
        self.rows, self.local = rows, local
        self.a, self.b, self.at_y, self.inverse, self.shift = (rows.new(1) for _ in range(5))
        self.with_entropy = False

    def put(
        self,
        block: slice,
        row_max: torch.Tensor,
        log_sum: torch.Tensor,
        logprob: torch.Tensor,
        grad_logprob: torch.Tensor,
        entropy: torch.Tensor | None = None,
        grad_entropy: torch.Tensor | None = None,
    ) -> None:
        """Prepare the rows of `block`; rows that do not count or have log-prob -inf get no g."""
        live = self.rows.live[block]
        possible = live & (logprob != -torch.inf)
        g = torch.where(possible, grad_logprob, 0.0)
        at_y = -g * torch.expm1(logprob)
        a, b = torch.zeros_like(g), -g
        self.with_entropy = grad_entropy is not None
        if self.with_entropy:
            h = torch.where(live, grad_entropy, 0.0)
            a, b = -h, h * (log_sum - entropy) - g
            at_y = at_y - h * logprob.exp() * (logprob + entropy)
        inverse = torch.where(live, torch.exp(-log_sum), 0.0)
        values = (a * inverse, b * inverse, torch.where(possible, at_y, 0.0), inverse)
        targets = (self.a, self.b, self.at_y, self.inverse)
        for target, value in zip(targets, values, strict=True):
            target[block] = self.rows.temper(value.unsqueeze(-1), block)
        # A shift of +inf makes e exactly 0 in the rows that do not count.
        self.shift[block] = torch.where(live, finite(row_max), torch.inf).unsqueeze(-1)

    def spread(
        self, u: torch.Tensor, block: slice, columns: slice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(gradient of a tile of logits before the temperature, e or None without entropy).

        Leaves u - m in `u`, except where there is no entropy: `u` is then the gradient itself.
        """
        # Below -1e4 e is exactly 0, in float64 too: 0 times a finite number instead of -inf.
        u.sub_(self.shift[block]).clamp_(min=-1e4)
        if self.with_entropy:
            e = torch.exp(u, out=self.rows.scratch("exp", block, columns))
            du = self.rows.scratch("gradient", block, columns)
            torch.addcmul(self.b[block], u, self.a[block], out=du).mul_(e)
        else:
            e, du = None, u.exp_().mul_(self.b[block])
        put(du, self.local[block], columns, self.at_y[block].squeeze(-1))
        return du, e
