"""The room `decode_attention` under pytest-benchmark; cases: kernels/decode_attention/bench.py."""

ROOM = "decode_attention"


def test_op(measure, case, candidate):
    measure(case, candidate)
