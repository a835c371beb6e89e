"""The room `kl` under pytest-benchmark; cases: kernels/kl/bench.py."""

ROOM = "kl"


def test_op(measure, case, candidate):
    measure(case, candidate)
