"""The room `logprob` under pytest-benchmark; cases: kernels/logprob/bench.py."""

ROOM = "logprob"


def test_op(measure, case, candidate):
    measure(case, candidate)
