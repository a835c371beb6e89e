"""Triton helpers that two rooms or more use. Importing this package does not import Triton."""
