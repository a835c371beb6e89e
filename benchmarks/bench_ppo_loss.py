"""The room `ppo_loss` under pytest-benchmark; cases: kernels/ppo_loss/bench.py."""

ROOM = "ppo_loss"


def test_op(measure, case, candidate):
    measure(case, candidate)
