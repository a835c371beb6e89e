"""`rlhf-fast bench`: every op against plain PyTorch, torch.compile and the machine's own limits.

`case.py` says what a case is, `kernels/<room>/bench.py` lists the cases of a room, `eager.py` holds
the plain PyTorch that they are compared with, `machine.py` measures the machine, `runner.py` checks
and times.
"""
