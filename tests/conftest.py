"""Fixtures of all tests. Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a Triton kernel is first imported


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
