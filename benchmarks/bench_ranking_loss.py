"""The room `ranking_loss` under pytest-benchmark; cases: kernels/ranking_loss/bench.py."""

ROOM = "ranking_loss"


def test_op(measure, case, candidate):
    measure(case, candidate)
