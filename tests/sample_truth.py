"""What the tests of sampling hold its results against: Hugging Face's processors, float64 loops."""

import math

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import usable_backends

INF = math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PARAMETERS = (
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
)


def quick_backends(op):
    """Those for tests of many rows: all but Triton's interpreter, which takes 0.1 s for one."""
    return [b for b in usable_backends(op) if b != "triton" or not _dispatch.interpreting()]


def hugging_face(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Scores after Hugging Face's processors, in the logits' dtype; -inf where a token went."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        processors.append(MinPLogitsWarper(min_p))
    return processors(None, logits)


def replay_all(logits, **parameters):
    """[N, V] the replayed log-prob of every token of every row, and the log-mass of each row."""
    rows, vocabulary = logits.shape
    ids = torch.arange(vocabulary, device=logits.device).expand(rows, -1)
    every = logits.unsqueeze(1).expand(rows, vocabulary, vocabulary)
    logprob, log_mass = rlhf_fast.replay_logprob(every, ids, **parameters)
    assert (log_mass == log_mass[:, :1]).all()
    return logprob, log_mass[:, 0]


def truth_of_row(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(log q of every token, log-mass, entropy) of one row of numbers, by the definition."""
    if temperature == 0:
        best = row.index(max(row))
        return [0.0 if v == best else -INF for v in range(len(row))], 0.0, 0.0
    u = [z / temperature for z in row]
    top = max(u)
    weight = [math.exp(x - top) for x in u]
    ranking = sorted((v for v in range(len(u)) if u[v] > -INF), key=lambda v: (-u[v], v))
    if 0 < top_k < len(row) and top_k < len(ranking):
        edge = u[ranking[top_k - 1]]
        ranking = [v for v in ranking if u[v] >= edge]
    if top_p < 1:
        whole, mass, nucleus = math.fsum(weight[v] for v in ranking), 0.0, []
        for v in ranking:
            nucleus.append(v)
            mass += weight[v]
            if mass >= top_p * whole:
                break
        ranking = nucleus
    ranking = [v for v in ranking if weight[v] >= min_p]
    total, part = math.fsum(weight), math.fsum(weight[v] for v in ranking)
    logq = [-INF] * len(row)
    for v in ranking:
        logq[v] = u[v] - top - math.log(part)
    p = [w / total for w in weight]
    entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
    return logq, math.log(part / total), entropy


def truth(logits, **parameters):
    """`truth_of_row` for [N, V] logits, as float64 tensors; parameters may be tensors [N]."""
    rows = []
    for n, row in enumerate(logits.double().tolist()):
        mine = {k: x[n].item() if torch.is_tensor(x) else x for k, x in parameters.items()}
        rows.append(truth_of_row(row, **mine))
    return tuple(torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
