"""The room `gae` under pytest-benchmark; cases: kernels/gae/bench.py."""

ROOM = "gae"


def test_op(measure, case, candidate):
    measure(case, candidate)
