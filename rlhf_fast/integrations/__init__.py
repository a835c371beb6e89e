"""Drop-in use inside other trainers: `rlhf_fast.integrations.{trl,verl,openrlhf}.patch()`.

Importing this package imports none of them; `patch()` does.
"""

from rlhf_fast.integrations import openrlhf, trl, verl

__all__ = ["openrlhf", "trl", "verl"]
