"""The ops of this room on the native row kernels of log-prob and KL: see `_chunks.py`."""

from rlhf_fast.kernels.kl import _native as _kl
from rlhf_fast.kernels.logprob import _native as _logprob
from rlhf_fast.kernels.ppo_loss import _native as _ppo_loss

from ._chunks import LinearHead

_head = LinearHead(_logprob, _kl, _ppo_loss)
linear_logprob = _head.linear_logprob
linear_logprob_entropy = _head.linear_logprob_entropy
linear_logprob_backward = _head.linear_logprob_backward
linear_kl = _head.linear_kl
linear_kl_backward = _head.linear_kl_backward
linear_ppo_loss = _head.linear_ppo_loss
