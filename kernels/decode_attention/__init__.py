"""Attention of one query token per slot over the slot's KV cache."""

from .op import decode_attention

__all__ = ["decode_attention"]
