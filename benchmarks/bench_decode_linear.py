"""The room `decode_linear` under pytest-benchmark; cases: kernels/decode_linear/bench.py."""

ROOM = "decode_linear"


def test_op(measure, case, candidate):
    measure(case, candidate)
