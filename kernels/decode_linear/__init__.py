"""A linear layer for the few rows of a decode step."""

from .op import decode_linear

__all__ = ["decode_linear"]
