"""What the rooms' `_native.py` files share: addresses, kernels, and rows of logits.

Nothing else in the package turns tensors into addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rlhf_fast import _C

from .launch import flat, rows_of

# The numbers of csrc/common/dtype.h, and of the KL estimators in csrc/ppo_loss/formulas.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ESTIMATORS = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}


def address(x: torch.Tensor | None) -> int:
    """The address of the first element; 0 stands for None."""
    return 0 if x is None else x.data_ptr()


def kernel(name: str, x: torch.Tensor) -> Callable[..., Any]:
    """The native kernel `name` where `x` is: on torch's threads, or on the current stream."""
    if x.is_cuda:
        device = x.device.index
        stream = torch._C._cuda_getCurrentRawStream(device)
        return partial(getattr(_C, f"cuda_{name}"), device, stream)
    return partial(getattr(_C, f"cpu_{name}"), torch.get_num_threads())


def dtype_number(name: str, x: torch.Tensor) -> int:
    """The kernels' number of the dtype of the argument `name`."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise TypeError(f"{name}: expected one of {names}, got {str(x.dtype)[6:]}")
    return DTYPES[x.dtype]


class LogitRows:
    """Logits and what belongs to each row; keeps copies alive until the call is over.

    Logits are addressed by two strides where that is possible (`rows_of`) and copied where it is
    not; all else is a small vector per token.
    """

    def __init__(self, logits, ids, mask, temperature, temperatures, softcap, ignore_index) -> None:
        dtype = dtype_number("logits", logits)
        self.logits, *strides = rows_of(logits)
        self.vectors = flat(ids).to(torch.int64), flat(mask), flat(temperatures)
        self.arguments = (
            self.logits.data_ptr(), dtype, ids.numel(), logits.shape[-1], *strides,
            *map(address, self.vectors), min(temperature, 3e38), softcap or 0.0, ignore_index,
        )  # fmt: skip
