"""Log-prob and entropy from hidden states: checks, schemas, fakes, autograd.

`kl.py` and `ppo.py` beside this file are the same for `linear_kl` and `linear_ppo_loss`.
"""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor

from rlhf_fast import _args, _dispatch, _invariant
from rlhf_fast.kernels.logprob.op import LogprobEntropy, as_temperature, check_token_values
from rlhf_fast.kernels.logprob.reference import live_tokens

for _op in ("linear_logprob", "linear_logprob_entropy"):
    _dispatch.implementations(_op, __package__)

ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "Tensor? mask, float temperature, Tensor? temperatures, float? softcap, float logit_scale, "
    "float scaling, int ignore_index, str group, bool invariant"
)


def check_head_values(hidden, weight, ids, mask, temperatures, ignore_index, group) -> None:
    """Value checks before the op runs; with a group, ids are checked where its size is known."""
    if not group:
        check_token_values(weight.t(), ids, mask, temperatures, ignore_index)
    elif temperatures is not None:
        live = live_tokens(ids, mask, ignore_index)
        check_token_values(ids.new_empty(0, 1), torch.zeros_like(ids), live, temperatures, -1)


def check_values(
    hidden, weight, ids, bias, lora_a, lora_b, mask, temperature, temperatures, softcap,
    logit_scale, scaling, ignore_index, group, *_,
) -> None:  # fmt: skip
    check_head_values(hidden, weight, ids, mask, temperatures, ignore_index, group)


def new_rows(hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """`count` empty [N] tensors of the arithmetic's dtype."""
    dtype = _args.compute_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(count))


def new_kept(hidden: torch.Tensor, weight: torch.Tensor, others: tuple) -> torch.Tensor:
    """An empty tensor for the logits that are kept, given the arguments behind `weight`."""
    return hidden.new_empty(others[-2], weight.shape[0], dtype=_args.compute_dtype(hidden.dtype))


def kept_rows(
    op: str, hidden, weight, ids, mask, ignore_index, invariant, inputs: tuple, heads: int = 1
) -> int:
    """How many rows' logits a call of `op` keeps for its backward pass.

    None where no gradient is asked of `inputs`, and none under torch.compile: the number depends on
    the mask.
    """
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not needed or torch.compiler.is_compiling() or isinstance(hidden, FakeTensor):
        return 0
    served = _dispatch.choose(op, hidden.device.type, hidden.dtype, _dispatch.requested(op))
    head = getattr(served, "__self__", None)  # the reference keeps nothing
    if head is None:
        return 0
    live = live_tokens(hidden.new_zeros(len(hidden)) if ids is None else ids, mask, ignore_index)
    return head.kept_rows(weight.shape[0], live, invariant, heads)


def new_gradients(hidden: torch.Tensor, inputs: tuple, needs: list[bool]) -> tuple:
    """Empty gradients of `inputs`; of size 0 where not needed."""
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _fake_backward(grad_logprob, grad_entropy, hidden, weight, ids, bias, lora_a, lora_b, *others):
    needs = others[-2]
    return new_gradients(hidden, (hidden, weight, bias, lora_a, lora_b), needs)


_dispatch.define(
    "linear_logprob",
    f"linear_logprob({ARGUMENTS}, int keep, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda hidden, weight, *others: (*new_rows(hidden, 3), new_kept(hidden, weight, others)),
    check=check_values,
)
_dispatch.define(
    "linear_logprob_entropy",
    f"linear_logprob_entropy({ARGUMENTS}, int keep, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda hidden, weight, *others: (*new_rows(hidden, 4), new_kept(hidden, weight, others)),
    check=check_values,
)
_dispatch.define(
    "linear_logprob",
    f"linear_logprob_backward(Tensor grad_logprob, Tensor? grad_entropy, {ARGUMENTS}, "
    "Tensor logprob, Tensor row_max, Tensor log_sum, Tensor? entropy, Tensor kept, bool[] needs, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    dtype_of=2,
)
_dispatch.once_differentiable("linear_logprob_backward")

# Where hidden, weight, bias, A and B, the inputs that may get a gradient, stand in the schema.
GRADIENTS = (0, 1, 3, 4, 5)


def _setup_context(ctx, inputs, output) -> None:
    *arguments, _, backend = inputs
    logprob, *entropy, row_max, log_sum, kept = output
    ctx.mark_non_differentiable(row_max, log_sum, kept)
    ctx.set_materialize_grads(False)  # zeros as large as what is kept
    ctx.tensors = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
    ctx.arguments = [None if isinstance(x, torch.Tensor) else x for x in arguments]
    ctx.backend = backend
    ctx.save_for_backward(
        *(arguments[i] for i in ctx.tensors), logprob, row_max, log_sum, kept, *entropy
    )


def _gradient(ctx, grad_logprob, grad_entropy):
    arguments, count = list(ctx.arguments), len(ctx.tensors)
    saved = ctx.saved_tensors  # once: checkpointing allows no second look
    for i, x in zip(ctx.tensors, saved, strict=False):
        arguments[i] = x
    logprob, row_max, log_sum, kept, *entropy = saved[count:]
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(logprob)
    if grad_entropy is None:
        entropy = []
    needs = [ctx.needs_input_grad[i] for i in GRADIENTS]
    grads = torch.ops.rlhf_fast.linear_logprob_backward(
        grad_logprob, grad_entropy, *arguments, logprob, row_max, log_sum,
        entropy[0] if entropy else None, kept, needs, ctx.backend,
    )  # fmt: skip
    out = [None] * (len(arguments) + 2)
    for i, need, grad in zip(GRADIENTS, needs, grads, strict=True):
        out[i] = grad if need else None
    return tuple(out)


def _backward_logprob(ctx, grad_logprob, *_):
    return _gradient(ctx, grad_logprob, None)


_dispatch.differentiable("linear_logprob", setup_context=_setup_context, backward=_backward_logprob)
_dispatch.differentiable(
    "linear_logprob_entropy",
    setup_context=_setup_context,
    backward=lambda ctx, grad, grad_entropy, *_: _gradient(ctx, grad, grad_entropy),
)


def check_head(
    hidden: torch.Tensor, weight: torch.Tensor, names: tuple[str, str], *, sharded: bool = False
) -> None:
    """Raise unless hidden [..., H] and weight [V, H] fit together."""
    name, weight_name = names
    _args.check_float_tensor(name, hidden)
    _args.check_float_tensor(weight_name, weight)
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., H] with H >= 1, got {tuple(hidden.shape)}")
    size = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != size or (weight.shape[0] < 1 and not sharded):
        raise ValueError(
            f"{weight_name}: expected shape [V, {size}] with V >= 1 ({name}'s last axis is "
            f"{size}), got {tuple(weight.shape)}"
        )
    _args.check_dtype(weight_name, weight, hidden.dtype, name)
    _args.check_device(weight_name, weight, hidden.device, name)


def _check_lora(lora, hidden: torch.Tensor, weight: torch.Tensor) -> tuple:
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, tuple | list):
        raise TypeError(f"lora: expected a tuple (A, B, scaling), got {type(lora).__name__}")
    if len(lora) != 3:
        raise ValueError(f"lora: expected three entries (A, B, scaling), got {len(lora)}")
    a, b, scaling = lora
    for name, x in (("lora A", a), ("lora B", b)):
        _args.check_float_tensor(name, x)
        _args.check_device(name, x, hidden.device, "hidden")
        if x.ndim != 2:
            raise ValueError(f"{name}: expected two axes, got shape {tuple(x.shape)}")
    _args.check_shape("lora A", a, (a.shape[0], weight.shape[1]), "[r, H]")
    _args.check_shape("lora B", b, (weight.shape[0], a.shape[0]), "[V, r]")
    return a, b, _args.number("lora scaling", scaling)


def _group_name(group) -> str:
    if group is None:
        return ""
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"group: expected None or a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    return group.group_name


def prepare(
    hidden, weight, ids, bias, temperature, mask, ignore_index, softcap, logit_scale, lora, group
) -> tuple:
    """Check the public arguments and put them in the schema's order, with rows flattened to [N]."""
    name = _group_name(group)
    check_head(hidden, weight, ("hidden", "weight"), sharded=bool(name))
    _args.check_ids("ids", ids)
    _args.check_shape("ids", ids, hidden.shape[:-1], "hidden's shape without H")
    _args.check_device("ids", ids, hidden.device, "hidden")
    if bias is not None:
        _args.check_float_tensor("bias", bias)
        _args.check_shape("bias", bias, weight.shape[:1], "[V]")
        _args.check_device("bias", bias, hidden.device, "hidden")
    a, b, scaling = _check_lora(lora, hidden, weight)
    mask = _args.as_mask("mask", mask, ids.shape, ids.device, "that of ids")
    if softcap is not None:
        softcap = _args.number("softcap", softcap, low=0.0, exclusive_low=True)
    scale = _args.number("logit_scale", logit_scale)
    number, tensor = as_temperature(
        temperature, ids.shape, ids.device, _args.compute_dtype(hidden.dtype)
    )
    mask = None if mask is None else mask.reshape(-1)
    tensor = None if tensor is None else tensor.reshape(-1)
    return (
        hidden.reshape(-1, hidden.shape[-1]), weight, ids.reshape(-1), bias, a, b, mask, number,
        tensor, softcap, scale, scaling, _args.integer("ignore_index", ignore_index), name,
        _invariant.requested(),
    )  # fmt: skip


def _keep(op: str, arguments: tuple) -> int:
    """`kept_rows` of the arguments that `prepare` gives."""
    some = (arguments[i] for i in (0, 1, 2, 6, 12, -1))
    return kept_rows(op, *some, tuple(arguments[i] for i in GRADIENTS))


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Log-probability of each token from hidden states, without the [N, V] logits, in nats.

        z = logit_scale * hidden (weight + scaling B A)^T + bias
        u = softcap * tanh(z / softcap) / temperature
        logprob[...] = u[..., ids] - log sum_v exp(u[..., v])

    Logits exist one chunk of rows at a time, in float32. If a gradient is needed, the last chunk is
    kept until the backward pass, which computes the others again: a call that fits into a chunk
    takes three products, not four (under torch.compile and `batch_invariant()` nothing is kept).
    `RLHF_FAST_CHUNK_BYTES` is the size of a chunk: 64 MiB on the CPU, 512 MiB on CUDA, never fewer
    than 64 rows. A backward pass holds the kept chunk, a tile of logits (a quarter of a chunk; on
    CUDA a chunk and a half) and the gradients; that of `weight` is summed in float32, slice by
    slice, and rounded once. The reference keeps nothing and walks in smaller tiles. Products and
    sums are float32 (float64 for float64), under `torch.autocast` too; on CUDA, half-precision
    operands are multiplied as they are, with float32 sums, and the gradient of the logits is
    rounded to their dtype before its products. Gradients that are not needed cost nothing; on the
    CPU, masked tokens cost nothing and tokens with upstream gradient 0 no backward pass. With a
    `group`, what travels is four numbers per token and the gradients of `hidden` and `A`. Sources:
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Wijmans et al., "Cut
    Your Losses in Large-Vocabulary Language Models", 2024; Hu et al., "LoRA", 2021.

    Args:
        hidden: `[..., H]` float64, float32, float16 or bfloat16 hidden states, of any strides.
        weight: `[V, H]` the head, of hidden's dtype.
        ids: `[...]` int32 or int64 token ids in [0, V).
        bias: `[V]`, any of the four dtypes.
        temperature: a positive number, or a tensor that broadcasts to `ids`.
        mask: `[...]` bool, integer or float; where it is 0 the result and the gradient are 0.
        ignore_index: an id that counts as masked.
        softcap: cap c of `c * tanh(z / c)`, applied before the temperature; None is off.
        logit_scale: factor of the product, before `bias`.
        lora: `(A[r, H], B[V, r], scaling)`, any of the four dtypes.
        group: a process group over which the vocabulary is split: `weight`, `bias` and `B` are
            this rank's slice (ranks in order, sizes may differ), `ids` are global. Every rank
            calls with the same hidden, ids and upstream gradient and gets the full result, the
            full gradient of `hidden` and `A`, and its slice's gradient of the others.

    Returns:
        `[...]` float32 (float64 for float64), differentiable in `hidden`, `weight`, `bias`, `A`
        and `B`; each gradient has its input's dtype. Rows are bitwise independent of each other
        inside `rlhf_fast.batch_invariant()`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value.
        IndexError: an id out of range that is neither masked nor `ignore_index` (on CPU).

    >>> rlhf_fast.linear_logprob(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
    tensor([-1.3863])
    """
    arguments = prepare(
        hidden, weight, ids, bias, temperature, mask, ignore_index, softcap, logit_scale, lora,
        group,
    )  # fmt: skip
    keep = _keep("linear_logprob", arguments)
    backend = _dispatch.requested("linear_logprob")
    out = torch.ops.rlhf_fast.linear_logprob(*arguments, keep, backend)
    return out[0].reshape(ids.shape)


def linear_logprob_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> LogprobEntropy:
    """Log-probability of each token and the entropy of its distribution, from hidden states.

        entropy[...] = -sum_v p_v log p_v,   p = softmax(u),   u as in `linear_logprob`

    Both are differentiable, in one sweep over the vocabulary forward and one backward.

    Args and Raises: those of `linear_logprob`.

    Returns:
        `LogprobEntropy(logprob, entropy)`, each `[...]` float32 (float64 for float64), in nats.

    >>> x, w = torch.ones(1, 2), torch.zeros(4, 2)
    >>> rlhf_fast.linear_logprob_entropy(x, w, torch.tensor([3])).entropy
    tensor([1.3863])
    """
    arguments = prepare(
        hidden, weight, ids, bias, temperature, mask, ignore_index, softcap, logit_scale, lora,
        group,
    )  # fmt: skip
    keep = _keep("linear_logprob_entropy", arguments)
    backend = _dispatch.requested("linear_logprob_entropy")
    out = torch.ops.rlhf_fast.linear_logprob_entropy(*arguments, keep, backend)
    return LogprobEntropy(out[0].reshape(ids.shape), out[1].reshape(ids.shape))
