"""The room `advantages` under pytest-benchmark; cases: kernels/advantages/bench.py."""

ROOM = "advantages"


def test_op(measure, case, candidate):
    measure(case, candidate)
