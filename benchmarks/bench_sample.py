"""The room `sample` under pytest-benchmark; cases: kernels/sample/bench.py."""

ROOM = "sample"


def test_op(measure, case, candidate):
    measure(case, candidate)
