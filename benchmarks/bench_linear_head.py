"""The room `linear_head` under pytest-benchmark; cases: kernels/linear_head/bench.py."""

ROOM = "linear_head"


def test_op(measure, case, candidate):
    measure(case, candidate)
