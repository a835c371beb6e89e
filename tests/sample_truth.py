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
from rlhf_fast.kernels.sample import reference
from rlhf_fast.testing import (
    assert_same_bits,
    generator,
    poisoned_memory,
    randn,
    usable_backends,
)

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


# ------------------------------------------------------- implementations beside the reference


def arguments(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """A number or a tensor each, as the torch ops take them."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    out = []
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, value in values.items():
        tensor = torch.is_tensor(value)
        out += [off[name], value] if tensor else [value, None]
    return out


def kept_of(u, tau, last):
    tau, last = tau.unsqueeze(-1), last.unsqueeze(-1)
    inside = (u > tau) | ((u == tau) & (torch.arange(u.shape[-1]) <= last))
    return inside & (u > -INF)


def assert_like_reference(room, logits, seed=5, position=9, mask=None, **parameters):
    """`room.sample` draws the ids and keeps the sets of the reference, and agrees with
    `room.replay_logprob` bit for bit; returns what it drew."""
    rows = len(logits)
    seeds = torch.arange(rows) * 7919 + seed
    call = arguments(**parameters)
    draw = 0, seeds, position, None
    ids = reference.sample(logits, mask, *call, *draw)[0]
    z = logits.float() if mask is None else logits.float().masked_fill(~mask, -INF)
    theirs = reference.replay_logprob(z, ids, *call)
    t = parameters.get("temperature", 1.0)
    t = torch.as_tensor(t, dtype=torch.float32).expand(rows).unsqueeze(-1)
    u = z / torch.where(t == 0, 1.0, t)
    with poisoned_memory():
        out = room.sample(logits, mask, *call, *draw)
        mine = room.replay_logprob(z, ids, *call)
    assert torch.equal(out[0], ids)
    assert torch.equal(kept_of(u, mine[2], mine[3]), kept_of(u, theirs[2], theirs[3]))
    assert_same_bits("logprob", out[1], mine[0])
    assert_same_bits("log_mass", out[2], mine[1])
    assert (out[1] <= 0).all() and (out[2] <= 0).all() and (out[3] >= 0).all()
    return out


def any_case(rows, seed, vocabulary, scale, temperature, top_k, top_p, min_p, per_row):
    """Arguments of `assert_like_reference` from drawn numbers: every third seed has ties, every
    second one a mask; with `per_row` the last row is cut by nothing."""
    logits = scale * randn(rows, vocabulary, seed=seed)
    logits = logits.round() / 2 if seed % 3 == 0 else logits
    mask = torch.rand(rows, vocabulary, generator=generator(seed)) < 0.8 if seed % 2 else None
    if mask is not None:
        mask[:, seed % vocabulary] = True
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if per_row:
        dtypes = torch.float32, torch.int64, torch.float64, torch.float64
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        parameters = {
            name: torch.tensor([value] * (rows - 1) + [off[name]]).to(dtype)
            for (name, value), dtype in zip(parameters.items(), dtypes, strict=True)
        }
    return {"logits": logits, "seed": seed, "mask": mask, **parameters}
