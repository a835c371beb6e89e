"""Other projects' functions for the same work, timed beside ours where they are installed.

None is a dependency: without its package a rival's rows say so, and hold no numbers. Its results
are compared with float64 too; what is beyond our tolerance is noted, and fails nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_fast.bench import machine


@dataclass(frozen=True)
class Rival:
    """One function of another project, in the words of a case.

    `backend` is what its rows show, `package` the distribution that it comes in. `load` imports it
    and returns a function of the case's inputs, by name, that gives what the case's `ours` gives.
    """

    backend: str
    package: str
    function: str
    load: Callable[[], Callable[..., tuple]]

    @property
    def note(self) -> str:
        """Package, version and function in one line."""
        return f"{self.package} {machine.version_of(self.package)}: {self.function}"

    def loaded(self) -> tuple[Callable[..., tuple] | None, str]:
        """(the function, its note), or (None, why not)."""
        if machine.version_of(self.package) is None:
            return None, f"{self.package} is not installed"
        try:
            return self.load(), self.note
        except Exception as error:  # a version whose names differ is a missing number
            return None, f"{self.note}: {type(error).__name__}: {str(error)[:200]}"


def _trl_logprob() -> Callable[..., tuple]:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, ids: (selective_log_softmax(logits, ids),)


def _trl_logprob_entropy() -> Callable[..., tuple]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda logits, ids: (selective_log_softmax(logits, ids), entropy_from_logits(logits))


# Columns of the head per tile: what TRL's trainers ask for.
TRL_CHUNK = 32768


def _trl_linear(outputs: tuple[str, ...]) -> Callable[[], Callable[..., tuple]]:
    def load() -> Callable[..., tuple]:
        from trl.kernels import ChunkedLogProbFunction

        def call(hidden, weight, ids):
            options = (1.0, TRL_CHUNK, None, 1.0, outputs)  # temperature, chunk, softcap, scale
            found = ChunkedLogProbFunction.apply(hidden, weight, None, ids, *options)
            return found[: 1 + len(outputs)]

        return call

    return load


def _liger_ppo() -> Callable[..., tuple]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def call(hidden, weight, ids, old_logprob, advantages, mask):
        # Its advantages are one per sequence: each token is a sequence of its own, all in one
        # chunk, whose logits it takes 2048 x 4096 at a time. "bnpo" is the mean over tokens.
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, compiled=False, loss_type="bnpo", chunk_size=len(ids)
        )
        sequences = (x.unsqueeze(1) for x in (hidden, ids, mask.to(hidden.dtype), old_logprob))
        hidden, ids, mask, old_logprob = sequences
        out = loss(hidden, weight, ids, mask, advantages, old_per_token_logps=old_logprob)
        return (out[0],)

    return call


_SELECTIVE, _CHUNKED = "selective_log_softmax", "ChunkedLogProbFunction"
RIVALS: dict[str, tuple[Rival, ...]] = {
    "logprob": (Rival("trl", "trl", _SELECTIVE, _trl_logprob),),
    "logprob_entropy": (
        Rival("trl", "trl", f"{_SELECTIVE} and entropy_from_logits", _trl_logprob_entropy),
    ),
    "linear_logprob": (Rival("trl", "trl", _CHUNKED, _trl_linear(())),),
    "linear_logprob_entropy": (Rival("trl", "trl", _CHUNKED, _trl_linear(("entropy",))),),
    "linear_ppo_loss": (Rival("liger", "liger-kernel", "LigerFusedLinearGRPOLoss", _liger_ppo),),
}


def of(op: str) -> tuple[Rival, ...]:
    """The rivals of `op`; none for most ops."""
    return RIVALS.get(op, ())
