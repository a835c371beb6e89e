"""`rlhf-fast doctor`: is this batch what PPO takes it for, and does this installation work?

With a file it examines a saved batch and explains what is wrong with it; without one it runs every
op on every backend that can serve here against float64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Our name -> the names under which trainers save the same thing.
NAMES = {
    "mask": ("mask", "response_mask", "action_mask", "attention_mask"),
    "ids": ("ids", "responses", "response_ids"),
    "logprob": ("logprob", "logprobs", "log_probs", "new_logprob"),
    "old_logprob": ("old_logprob", "old_logprobs", "old_log_probs"),
    "ref_logprob": ("ref_logprob", "ref_logprobs", "ref_log_prob", "ref_log_probs"),
    "values": ("values", "old_values"),
    "rewards": ("rewards", "token_level_rewards"),
    "advantages": ("advantages",),
    "returns": ("returns",),
}


class Finding(NamedTuple):
    """One sentence about the batch; `level` is "ok", "note" or "bad"."""

    level: str
    about: str
    text: str


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt or .safetensors file under our names."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        saved: Any = load_file(path)
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(saved).__name__}")
    tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    batch = {
        ours: next(tensors[name] for name in names if name in tensors)
        for ours, names in NAMES.items()
        if any(name in tensors for name in names)
    }
    if not batch:
        known = ", ".join(name for names in NAMES.values() for name in names)
        raise ValueError(f"{path}: expected one of the keys {known}, got {', '.join(saved)}")
    return batch


def examine(
    batch: dict[str, Tensor], *, eos_id: int | None = None, pad_id: int | None = None
) -> list[Finding]:
    """Everything there is to say about a batch of [B, T] tensors."""
    leading = batch.get("mask", next(iter(batch.values())))
    if leading.ndim != 2:
        return [Finding("bad", "shape", f"expected [B, T], got {tuple(leading.shape)}")]
    odd = {name: tuple(x.shape) for name, x in batch.items() if x.shape != leading.shape}
    if odd:
        text = f"expected {tuple(leading.shape)} for every tensor, got {odd}"
        return [Finding("bad", "shape", text)]
    mask = batch["mask"] != 0 if "mask" in batch else torch.ones_like(leading, dtype=torch.bool)
    findings = [*_mask(batch, mask), *_finite(batch, mask)]
    if mask.any():
        clean = {
            name: torch.where(mask, x.double(), 0.0).nan_to_num(0.0, 0.0, 0.0)
            for name, x in batch.items()
            if x.is_floating_point()
        }
        findings += [*_logprobs(clean, mask), *_rewards(batch, clean, mask)]
        findings += [*_advantages(clean, mask), *_ids(batch, mask, eos_id, pad_id)]
    return findings


def _last(mask: Tensor) -> Tensor:
    """Index of the last counted token of each row."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def _mask(batch: dict[str, Tensor], mask: Tensor) -> Iterator[Finding]:
    if "mask" not in batch:
        yield Finding("note", "mask", "there is none: every token is taken to count")
        return
    counts = mask.sum(1)
    text = f"{int(mask.sum())} of {mask.numel()} tokens count, {int(counts.min())} to "
    yield Finding("ok" if mask.any() else "bad", "mask", f"{text}{int(counts.max())} per row")
    if (counts == 0).any():
        text = f"{int((counts == 0).sum())} rows have no token; their score is dropped"
        yield Finding("note", "mask", text)
    if not ((batch["mask"] == 0) | (batch["mask"] == 1)).all():
        yield Finding("note", "mask", "has values beside 0 and 1; any non-zero number counts as 1")
    if ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any():
        text = 'some rows have holes (tool output?): "carry" skips them, "zero" runs through them'
        yield Finding("note", "mask", text)


def _finite(batch: dict[str, Tensor], mask: Tensor) -> Iterator[Finding]:
    for name, x in batch.items():
        if not x.is_floating_point():
            continue
        wrong = ~x.isfinite()
        if (wrong & mask).any():
            row, t = (wrong & mask).nonzero()[0].tolist()
            text = f"{int((wrong & mask).sum())} counted tokens are not finite, first [{row}, {t}]"
            yield Finding("bad", name, text)
        elif wrong.any():
            text = "not finite outside the mask: harmless in our ops, but x * mask makes it NaN"
            yield Finding("note", name, text)


def _logprobs(x: dict[str, Tensor], mask: Tensor) -> Iterator[Finding]:
    for name in ("logprob", "old_logprob", "ref_logprob"):
        if name in x and (x[name] > 1e-5).any():
            text = f"largest value {x[name].max():.3g}: a log-probability is never positive"
            yield Finding("bad", name, text)
    if "logprob" in x and "old_logprob" in x:
        gap = (x["logprob"] - x["old_logprob"]).abs().max().item()
        if gap <= 1e-5:
            yield Finding("ok", "ratio", "is 1 for every token, as it must be at the first step")
        else:
            why = "rounding of two different forwards" if gap < 0.1 else "another policy,"
            why += "" if gap < 0.1 else " temperature, dropout, or a shift by one token"
            text = f"|log ratio| up to {gap:.3g}; before the first update it should be 0 ({why})"
            yield Finding("note" if gap < 0.1 else "bad", "ratio", text)
    policy = x.get("old_logprob", x.get("logprob"))
    if policy is not None and "ref_logprob" in x:
        d = (policy - x["ref_logprob"])[mask]
        mean, error = d.mean().item(), (d.std() / len(d) ** 0.5).item() if len(d) > 1 else 0.0
        if mean >= -3 * error:
            yield Finding("ok", "kl", f"mean of log(policy/reference) {mean:.4g} +- {error:.2g}")
        else:
            text = f"mean {mean:.4g} +- {error:.2g} is negative, which no KL is: policy and "
            text += "reference swapped, or the tokens were not drawn from this policy"
            yield Finding("bad", "kl", text)


def _rewards(batch: dict[str, Tensor], x: dict[str, Tensor], mask: Tensor) -> Iterator[Finding]:
    if "rewards" not in x:
        return
    outside = (batch["rewards"].nan_to_num() != 0) & ~mask
    if outside.any():
        text = f"{int(outside.any(1).sum())} rows have a reward outside the mask, where it is lost"
        yield Finding("bad", "rewards", text)
    size = x["rewards"].abs()
    scored = (size.amax(1) > 0) & mask.any(1)
    wrong = scored & (size.argmax(1) != _last(mask))
    if wrong.any():
        text = f"in {int(wrong.sum())} of {int(scored.sum())} rows the largest reward is not on "
        yield Finding("note", "rewards", text + "the last counted token, where a score belongs")
    elif scored.any():
        yield Finding("ok", "rewards", "the largest of each row is on its last counted token")
    else:
        yield Finding("bad", "rewards", "all are 0: there is nothing to learn")


def _advantages(x: dict[str, Tensor], mask: Tensor) -> Iterator[Finding]:
    if "advantages" not in x:
        return
    a = x["advantages"][mask]
    mean, std = a.mean().item(), a.std().item() if len(a) > 1 else 0.0
    text = f"mean {mean:.4g}, standard deviation {std:.4g}"
    if std == 0:
        yield Finding("bad", "advantages", f"{text}: all equal, the policy gets no direction")
    elif abs(mean) < 0.01 and abs(std - 1) < 0.01:
        yield Finding("ok", "advantages", f"{text}: whitened")
    else:
        yield Finding("note", "advantages", f"{text}: not whitened over this batch")
    if {"returns", "values"} <= x.keys():
        gap = (x["returns"] - x["values"])[mask] - a
        if gap.abs().max() <= 1e-4 * max(1.0, a.abs().max().item()):
            yield Finding("ok", "returns", "are advantages + values, before any whitening")
        elif torch.corrcoef(torch.stack([a + gap, a]))[0, 1] > 0.999:
            yield Finding("ok", "returns", "are values + advantages before whitening")
        else:
            text = "are neither values + advantages nor a whitened version of it"
            yield Finding("note", "returns", text)


def _ids(
    batch: dict[str, Tensor], mask: Tensor, eos_id: int | None, pad_id: int | None
) -> Iterator[Finding]:
    if "ids" not in batch:
        return
    ids = batch["ids"]
    if eos_id is not None:
        eos = ids == eos_id
        after = ((eos & mask).cumsum(1) - (eos & mask).int() > 0) & mask
        if after.any():
            text = f"{int(after.any(1).sum())} rows count tokens behind the EOS"
            yield Finding("bad", "eos", text)
        last = _last(mask)
        rows = torch.arange(len(ids))
        follows = (last + 1).clamp(max=ids.shape[1] - 1)
        left_out = eos[rows, follows] & ~mask[rows, follows] & ~eos[rows, last]
        if left_out.any() and eos_id != pad_id:
            text = f"{int(left_out.sum())} rows leave the EOS out of the mask: stopping is not "
            yield Finding("bad", "eos", text + "trained")
        text = f"{int((eos & mask).any(1).sum())} of {len(ids)} rows end with a counted EOS"
        yield Finding("ok", "eos", text)
    if pad_id is not None and pad_id != eos_id and ((ids == pad_id) & mask).any():
        text = f"{int(((ids == pad_id) & mask).sum())} counted tokens are padding"
        yield Finding("bad", "pad", text)


def self_check(only: str | None = None) -> list[Finding]:
    """Every op on every backend (or `only` one) that can serve here, against float64."""
    from rlhf_fast import _dispatch, testing
    from rlhf_fast.bench import case as bench_case

    if only is not None and only not in _dispatch.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_dispatch.BACKENDS)}, got {only!r}")
    findings = []
    for case in bench_case.cases(quick=True):
        for backend, state in _dispatch.backends()[case.op].items():
            if only not in (None, backend):
                continue
            about = f"{case.op} {backend}"
            if state is not True:
                findings.append(Finding("note", about, f"not available: {state}"))
                continue
            findings.append(_compare(case, testing.device_of(backend), backend, about))
    return findings


def _compare(case: Any, device: str, backend: str, about: str) -> Finding:
    from rlhf_fast.bench import runner

    try:
        error = runner.check(case, device, backend)
    except Exception as failure:  # the report must reach the last op
        text = f"{type(failure).__name__}: {failure}"
        return Finding("bad", about, f"{case.shape} {case.dtype_name}: {text}")
    text = f"{case.shape} {case.dtype_name} {case.direction}: error {error:.1e}"
    return Finding("ok", about, text)


def report(findings: list[Finding]) -> int:
    """Print the findings; 1 if one of them is bad."""
    width = max((len(finding.about) for finding in findings), default=0)
    for level, about, text in findings:
        print(f"{level:<5} {about:<{width}} {text}")
    bad = sum(finding.level == "bad" for finding in findings)
    print(f"{len(findings)} findings, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(report(self_check()))
