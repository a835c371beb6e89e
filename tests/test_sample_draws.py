"""The draws of `sample`: Philox's known answers, frequencies, tails, independence of the batch."""

import math

import numpy
import pytest
import torch

import rlhf_fast
from rlhf_fast.kernels.sample import reference, reference_draw
from rlhf_fast.testing import (
    assert_same_bits,
    device_of,
    randn,
    usable_backends,
)
from tests.sample_truth import quick_backends

INF = math.inf
# Seeds are fixed, so that a test passes always or never; a right sampler fails one in 10**7.
ALPHA = 1e-7


@pytest.fixture(params=usable_backends("sample"))
def sampler(request):
    with rlhf_fast.use_backend(request.param, op="sample"):
        yield device_of(request.param)


@pytest.fixture(params=quick_backends("sample"))
def quick_sampler(request):
    with rlhf_fast.use_backend(request.param, op="sample"):
        yield device_of(request.param)


# ---------------------------------------------------------------------------------------- Philox


def philox(counter, key, bits):
    """Philox4xN-10 in Python's integers, N = 32 or 64: independent of the package."""
    m0, m1, w0, w1 = {
        32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85),
        64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
    }[bits]
    mask = 2**bits - 1
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> bits) ^ c1 ^ k0, p1 & mask, (p0 >> bits) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return c0, c1, c2, c3


def race_number(seed, position, token):
    """The exponential number of a token in Python's numbers."""
    seed, position = seed % 2**64, position % 2**64
    high, low = (
        philox((token >> 2, position % 2**32, position >> 32, half), (seed % 2**32, seed >> 32), 32)
        for half in (0, 1)
    )
    n = low[token & 3] + 2**32 * high[token & 3]
    x = (2 * n + 1) / 2**65  # one rounding, that of a quotient of integers
    return -math.log1p(-min(x, 1 - 2**-53))


# Random123's kat_vectors, philox4x32 10: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    counter, key, answer = (
        tuple(int(word, 16) for word in words.split()) for words in (counter, key, answer)
    )
    assert philox(counter, key, 32) == answer
    words = reference_draw.philox(
        tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key)
    )
    assert tuple(int(word) for word in words) == answer


def test_philox_of_this_file_is_that_of_numpy():
    """At 64 bits; the algorithm is one for both widths."""
    for counter, key in (((0, 0, 0, 0), (0, 0)), ((5, 2**64 - 1, 7, 2**63), (11, 2**64 - 3))):
        theirs = numpy.random.Philox(
            counter=numpy.array(counter, dtype=numpy.uint64),
            key=numpy.array(key, dtype=numpy.uint64),
        )
        after = (counter[0] + 1, *counter[1:])  # numpy counts up before it draws
        assert tuple(int(w) for w in theirs.random_raw(4)) == philox(after, key, 64)


def test_race_numbers_against_python():
    generator = numpy.random.default_rng(1)
    seeds = generator.integers(-(2**63), 2**63 - 1, 400)
    positions = generator.integers(-(2**63), 2**63 - 1, 400)
    positions[:200] %= 1000
    tokens = generator.integers(0, 200_000, 400)
    numbers = reference_draw.exponentials(*map(torch.from_numpy, (tokens, seeds, positions)))
    for k, number in enumerate(numbers.tolist()):
        expected = race_number(int(seeds[k]), int(positions[k]), int(tokens[k]))
        assert number == pytest.approx(expected, rel=1e-15)
    every = reference_draw.all_exponentials(7, torch.tensor([3]), torch.tensor([9]))
    bound = reference_draw.all_exponentials(7, torch.tensor([3]), torch.tensor([9]), bound=True)
    assert every.shape == bound.shape == (1, 7)
    for token in range(7):
        assert every[0, token].item() == pytest.approx(race_number(3, 9, token), rel=1e-15)
    assert (bound <= every).all() and (every - bound < 1e-7).all()


def test_uniforms_reach_both_ends():
    """No uniform is 0 or 1, and near 0 they are as dense as 64 bits allow."""
    words = torch.tensor([0, 1, 2**32 - 1])
    smallest = reference_draw._exponential(torch.zeros(3, dtype=torch.int64), words)
    assert smallest.tolist() == pytest.approx([2**-65, 3 * 2**-65, (2**32 - 0.5) * 2**-64])
    largest = reference_draw._exponential(torch.full((3,), 2**32 - 1), words)
    assert largest.isfinite().all() and (largest > 22).all()


def test_draws_against_python(sampler):
    """Every backend draws what Python's integers say, with and without filters."""
    logits = 2 * randn(30, 41, seed=1)
    seeds = [(-1) ** k * 7919**k % 2**64 for k in range(30)]
    positions = [k * 3**20 for k in range(30)]
    signed = [s - 2**64 if s >= 2**63 else s for s in seeds]
    for keep in (41, 6):
        out = rlhf_fast.sample(
            logits.to(sampler),
            top_k=keep,
            seed=torch.tensor(signed).to(sampler),
            position=torch.tensor(positions).to(sampler),
        )
        for row, seed, position, drawn in zip(
            logits.tolist(), seeds, positions, out.ids.tolist(), strict=True
        ):
            ranking = sorted(range(41), key=lambda v, row=row: -row[v])[:keep]
            expected = min(
                ranking,
                key=lambda v: race_number(seed, position, v) / math.exp(row[v] - max(row)),
            )
            assert drawn == expected


def test_seeds_and_positions_of_every_kind(quick_sampler):
    logits = torch.zeros(4, 1000, device=quick_sampler)

    def ids(seed, position=0):
        return rlhf_fast.sample(logits, seed=seed, position=position).ids

    def column(value, dtype):
        return torch.tensor([value] * 4, dtype=dtype, device=quick_sampler)

    first = ids(200, 100)
    assert (first == first[0]).all()
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.uint64):
        assert torch.equal(ids(column(200, dtype), column(100, dtype)), first)
    assert torch.equal(ids(2**64 - 1), ids(-1))
    assert torch.equal(ids(column(2**64 - 1, torch.uint64)), ids(-1))
    assert torch.equal(ids(0, 2**63 + 5), ids(0, 5 - 2**63))
    bits = [ids(s, p)[0].item() for k in range(64) for s, p in ((1 << k, 0), (0, 1 << k))]
    assert len(set(bits)) > 100  # each bit of both counts


# ------------------------------------------------------------------------------- distributions


def p_value(statistic: float, freedom: int) -> float:
    """The probability that a chi-square number of `freedom` degrees exceeds `statistic`."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def assert_frequencies(ids: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square of drawn ids; cells that expect fewer than 10 are thrown together."""
    counts = torch.bincount(ids, minlength=len(probabilities)).double()
    assert len(counts) == len(probabilities) and not counts[probabilities == 0].any()
    expected = probabilities.double() * len(ids)
    rare = expected < 10
    cells = [torch.stack((counts, expected))[:, ~rare]]
    if expected[rare].sum() > 0:
        cells.append(torch.stack((counts[rare].sum(), expected[rare].sum())).unsqueeze(-1))
    counts, expected = torch.cat(cells, -1)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert p_value(statistic, len(counts) - 1) > ALPHA, (statistic, len(counts) - 1)


DRAWS = 60_000


@pytest.mark.parametrize("what", ["seeds", "positions", "high halves", "both"])
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.6, "top_k": 9, "top_p": 0.9}])
def test_frequencies(what, parameters):
    """Over seeds, over positions, over slots of one batch: the probabilities of the kept set."""
    logits = (1.5 * randn(40, seed=3)).masked_fill(torch.arange(40) % 5 == 2, -INF)
    k = torch.arange(DRAWS)
    seed, position = {
        "seeds": (k, 11),
        "positions": (11, k),
        "high halves": (k << 32, 1),
        "both": (k * 7, k // 2),
    }[what]
    rows = logits.expand(DRAWS, -1)
    out = rlhf_fast.sample(rows, seed=seed, position=position, **parameters)
    every = logits.expand(40, -1)
    logq, _ = rlhf_fast.replay_logprob(every, torch.arange(40), **parameters)
    assert abs(logq.double().exp().sum() - 1) < 1e-6
    q = logq.double().exp()
    assert_frequencies(out.ids, q / q.sum())


def test_neighbouring_draws_are_independent():
    """Pairs of draws at consecutive positions, consecutive seeds, and (seed, position) swapped."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.2, -0.3])
    p = logits.softmax(0).double()
    k = torch.arange(DRAWS)

    def ids(seed, position):
        return rlhf_fast.sample(logits.expand(DRAWS, -1), seed=seed, position=position).ids

    pairs = {
        "positions": (ids(5, 2 * k), ids(5, 2 * k + 1)),
        "seeds": (ids(2 * k, 5), ids(2 * k + 1, 5)),
        "swapped": (ids(k, 1000), ids(1000, k)),
    }
    for a, b in pairs.values():
        assert_frequencies(6 * a + b, torch.outer(p, p).flatten())


def test_race_numbers_are_independent_exponentials():
    """Numbers of one Philox call, of neighbouring calls and seeds, on a 16 x 16 grid."""
    every = reference_draw.all_exponentials(
        64, torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    )
    cell = (16 * -torch.expm1(-every)).long()
    uniform = torch.full((256,), 1 / 256)
    assert_frequencies((16 * cell[:, ::2] + cell[:, 1::2]).flatten(), uniform)
    assert_frequencies((16 * cell[:, 3:-1:4] + cell[:, 4::4]).flatten(), uniform)
    assert_frequencies((16 * cell[:, ::4] + cell[:, 3::4]).flatten(), uniform)
    assert_frequencies((16 * cell[:-1:2] + cell[1::2]).flatten(), uniform)


def test_tail_of_the_race_numbers():
    """E < t as often as 1 - exp(-t) says, down to t = 1e-6, over 1e7 numbers: 10 are expected."""
    counts = dict.fromkeys((1e-2, 1e-4, 1e-5, 1e-6), 0)
    total, smallest = 0, INF
    for start in range(50):
        seeds = torch.arange(start * 1000, start * 1000 + 1000)
        numbers = reference_draw.all_exponentials(200, seeds, torch.zeros_like(seeds))
        total += numbers.numel()
        smallest = min(smallest, numbers.min().item())
        for t in counts:
            counts[t] += int((numbers < t).sum())
    for t, count in counts.items():
        expected = -math.expm1(-t) * total
        assert abs(count - expected) < 5.5 * math.sqrt(expected), (t, count, expected)
    assert 0 < smallest < 1e-6


def test_rare_tokens():
    """A token of probability 1e-4 at its rate over 4e5 draws, one of -inf never."""
    rate, draws = 1e-4, 100_000
    logits = torch.tensor([math.log(rate), -INF, math.log1p(-rate)]).expand(draws, -1)
    count = 0
    for block in range(4):
        ids = rlhf_fast.sample(logits, seed=block, position=torch.arange(draws)).ids
        assert not (ids == 1).any()
        count += int((ids == 0).sum())
    expected = 4 * draws * rate
    assert abs(count - expected) < 5.5 * math.sqrt(expected), (count, expected)


def test_a_token_wins_exactly_when_its_number_is_small_enough(sampler):
    """Put an unlikely token's number against its rival's, on both sides of the balance."""
    numbers = reference_draw.all_exponentials(2, torch.arange(2000), torch.zeros(2000).long())
    row, token = divmod(int(numbers.argmin()), 2)
    ratio = (numbers[row, token] / numbers[row, 1 - token]).item()
    assert ratio < 1e-2
    for factor, wins in ((1.01, True), (0.99, False)):
        logits = torch.zeros(1, 2)
        logits[0, token] = math.log(ratio * factor)
        out = rlhf_fast.sample(logits.to(sampler), seed=row, position=0)
        assert (out.ids.item() == token) == wins


@pytest.mark.parametrize("vocabulary", [2, 50])
def test_contenders_never_miss_the_winner(vocabulary, monkeypatch):
    """The bound by the high words against the whole race, with peaked rows and tiny weights."""
    rows = 2000
    u = 10 * randn(rows, vocabulary, seed=9)
    u[::2] = u[::2].round()
    top = u.amax(-1, keepdim=True)
    kept = u > -5
    seed, position = torch.arange(rows), torch.full((rows,), 77)
    numbers = reference_draw.all_exponentials(vocabulary, seed, position)
    r = torch.where(kept, numbers / (u.double() - top.double()).exp(), INF)
    alive = reference_draw._contenders(u, top, kept, seed, position)
    assert alive.gather(-1, r.argmin(-1, keepdim=True))[kept.any(-1)].all()
    assert not (alive & ~kept).any() and alive.sum() < 1.01 * rows
    winner = reference_draw.race(u, top, kept, seed, position)
    assert torch.equal(winner, torch.where(kept.any(-1), r.argmin(-1), -1))


def test_an_exact_tie_goes_to_the_lowest_id(monkeypatch):
    monkeypatch.setattr(
        reference_draw, "exponentials", lambda ids, *_: torch.full(ids.shape, 0.5).double()
    )
    u, kept = torch.zeros(2, 9), torch.arange(9) > torch.tensor([[2], [-1]])
    kept[1, 4:] = False
    kept[:, 7] = False
    zero = torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(reference_draw, "_contenders", lambda u, top, kept, *_: kept)
    assert reference_draw.race(u, torch.zeros(2, 1), kept, zero, zero).tolist() == [3, 0]


def test_a_row_alone_is_summed_like_a_row_among_others():
    x = randn(16, 50_257, seed=1).exp()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # torch splits a lone row among threads
    try:
        whole = reference._row_sums(x)
        for k in range(16):
            assert_same_bits("sum", reference._row_sums(x[k : k + 1]), whole[k : k + 1])
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------- nothing else matters


@pytest.mark.parametrize("rows, vocabulary", [(33, 1000), (4, 50_257)])
def test_rows_do_not_depend_on_the_batch(quick_sampler, rows, vocabulary):
    """Alone, permuted, in a larger batch, in another slot: the same bits."""
    logits = (3 * randn(rows, vocabulary, seed=5)).to(quick_sampler)
    seeds = torch.arange(rows, device=quick_sampler) * 12345
    position = torch.arange(rows, device=quick_sampler) % 3
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(quick_sampler)
    for parameters in ({}, {"top_k": 20}, {"top_p": 0.5, "temperature": 0.6}, {"min_p": 0.01}):
        whole = rlhf_fast.sample(logits, seed=seeds, position=position, **parameters)
        mixed = rlhf_fast.sample(
            logits[order], seed=seeds[order], position=position[order], **parameters
        )
        larger = rlhf_fast.sample(
            torch.cat((logits, logits[:2] / 2)),
            seed=torch.cat((seeds, seeds[:2])),
            position=torch.cat((position, position[:2])),
            **parameters,
        )
        for name, x, y, z in zip(whole._fields, whole, mixed, larger, strict=True):
            assert_same_bits(name, y, x[order])
            assert_same_bits(name, z[:rows], x)
        for b in (0, rows - 1):
            alone = rlhf_fast.sample(
                logits[b : b + 1], seed=int(seeds[b]), position=int(position[b]), **parameters
            )
            for name, x, y in zip(whole._fields, whole, alone, strict=True):
                assert_same_bits(name, y, x[b : b + 1])


def test_backends_draw_alike(sampler):
    logits = (2 * randn(24, 500, seed=6)).bfloat16()
    for parameters in ({}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02}):
        options = {"seed": 7, "position": 3, **parameters}
        out = rlhf_fast.sample(logits.to(sampler), **options)
        with rlhf_fast.use_backend("reference"):
            expected = rlhf_fast.sample(logits, **options)
        assert torch.equal(out.ids.cpu(), expected.ids)


def test_filters_do_not_change_the_noise():
    """What wins among all tokens wins among those kept, if it is one of them."""
    logits = 2 * randn(3000, 30, seed=7)
    position = torch.arange(3000)
    free = rlhf_fast.sample(logits, seed=1, position=position).ids
    kept = rlhf_fast.sample(logits, seed=1, position=position, top_k=10).ids
    inside = logits.gather(-1, free[:, None]) >= logits.topk(10).values[:, -1:]
    assert torch.equal(free[inside[:, 0]], kept[inside[:, 0]]) and not inside.all()


def test_nothing_else_is_random():
    logits = randn(4, 50, seed=8)
    state = torch.get_rng_state()
    first = rlhf_fast.sample(logits, seed=1, position=2).ids
    torch.manual_seed(99)
    assert torch.equal(rlhf_fast.sample(logits, seed=1, position=2).ids, first)
    torch.manual_seed(99)
    fresh = torch.get_rng_state()
    rlhf_fast.sample(logits, seed=1, position=2)
    assert torch.equal(torch.get_rng_state(), fresh)
    torch.set_rng_state(state)
