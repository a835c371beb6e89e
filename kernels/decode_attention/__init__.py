"""Attention of one query token per slot over the slot's KV cache."""

from .op import Prefix, decode_attention

__all__ = ["Prefix", "decode_attention"]
