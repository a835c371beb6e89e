"""The memory of rollouts (plan, release, reuse), and the decode loop as it runs on a GPU."""

import pytest
import torch

import rlhf_fast
from rlhf_fast.rollout import graphs, loop
from rlhf_fast.rollout.models import FAMILIES
from rlhf_fast.testing import assert_same_bits
from tests.rollout_models import PROMPTS, V, compare_with_forward, tiny


@pytest.fixture
def model():
    return tiny()


def same_responses(a, b):
    assert torch.equal(a.ids, b.ids) and torch.equal(a.lengths, b.lengths)
    for name in ("logprob", "log_mass", "entropy"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=2e-5)


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_says_what_the_cache_takes(family, dtype):
    model = tiny(family).to(dtype)
    with rlhf_fast.rollout(model, max_slots=3, max_len=40) as r:
        plan = r.plan(PROMPTS, n=2, max_new_tokens=4)
        assert (plan.slots, plan.columns) == (3, 16)
        assert r.release() == 0
        r.generate(PROMPTS, n=2, max_new_tokens=4)
        assert r.release() == plan.kv_bytes > 0
        assert r.release() == 0
        most = r.plan()
        assert most.kv_bytes == plan.kv_bytes * 40 // 16
    assert plan.total_bytes == plan.kv_bytes + plan.logits_bytes + plan.output_bytes


def test_plan_of_few_rows_and_bad_ones(model):
    with rlhf_fast.rollout(model, max_len=20) as r:
        assert r.plan(PROMPTS[:2], max_new_tokens=3).slots == 2
        assert r.plan([], max_new_tokens=3).kv_bytes == 0
        with pytest.raises(ValueError, match="max_len"):
            r.plan(PROMPTS, max_new_tokens=9)
        with pytest.raises(TypeError, match="max_new_tokens"):
            r.plan(PROMPTS)


def test_memory_is_kept_from_call_to_call_and_released_at_the_end(model):
    r = rlhf_fast.rollout(model, max_slots=4)
    with r:
        r.generate(PROMPTS, max_new_tokens=8)
        first = r._cache
        r.generate(PROMPTS, max_new_tokens=3)  # less room is enough
        assert r._cache is first
        r.generate(PROMPTS, max_new_tokens=9)
        assert r._cache is not first
        held = r._cache
        model.bfloat16()
        r.generate(PROMPTS, max_new_tokens=2)
        assert r._cache is not held and r._cache.layers[0].keys.dtype == torch.bfloat16
    assert r._cache is None


def test_what_a_slot_held_before_is_never_seen(model):
    """Neither by the next owner of a slot nor by the next call: not even a NaN comes through."""
    options = {"max_new_tokens": 10, "eos_ids": (1, 2, 3, 4), "n": 2, "seed": 9}
    with rlhf_fast.rollout(model, max_slots=3) as r:
        expected = r.generate(PROMPTS, **options)
        for layer in r._cache.slot_layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        again = r.generate(PROMPTS, **options)
    for name in ("ids", "logprob", "log_mass", "entropy"):
        assert_same_bits(name, getattr(again, name), getattr(expected, name))


def test_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        out = rlhf_fast.generate(model, PROMPTS, max_new_tokens=6)
    assert out.logprob.isfinite().all() and out.lengths.tolist() == [6] * 7
    # Keys and queries that are normalised come out in float32 there, values do not.
    with torch.autocast("cpu", torch.bfloat16):
        out = rlhf_fast.generate(tiny("qwen3"), PROMPTS, max_new_tokens=6)
    assert out.logprob.isfinite().all()


def test_no_tensor_has_the_size_of_all_logits(model):
    """The largest tensor of a call that has room for many responses is a step's logits."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            parts = out if isinstance(out, tuple | list) else [out]
            sizes.extend(x.numel() for x in parts if isinstance(x, torch.Tensor))
            return out

    with Watch():
        rlhf_fast.generate(model, PROMPTS, n=6, max_slots=4, max_new_tokens=30)
    weights = max(p.numel() for p in model.parameters())
    cache = rlhf_fast.rollout(model, max_slots=4).plan(PROMPTS, max_new_tokens=30).kv_bytes // 16
    assert max(sizes) <= max(weights, cache, 4 * V, 43 * 30)


# --------------------------------------------------------------------------- the loop of a GPU


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("look_every", [2, 3, 8, 100])
@pytest.mark.parametrize("max_slots", [1, 3, 6])
def test_looking_every_few_steps_at_widths_of_powers_of_two(
    family, look_every, max_slots, monkeypatch
):
    """Responses that have ended, and slots that are free, take part in steps and leave no trace."""
    model, widths = tiny(family), []
    options = {"n": 2, "max_new_tokens": 10, "eos_ids": (1, 2, 3, 4), "seed": 9}
    expected = rlhf_fast.generate(model, PROMPTS, max_slots=max_slots, **options)

    def padded(self, live):
        widths.append(min(1 << (live - 1).bit_length(), self.slots))
        self.step(widths[-1])

    monkeypatch.setattr(graphs.GraphedStep, "__call__", padded)
    monkeypatch.setattr(loop, "LOOK_EVERY", {"cpu": look_every})
    out = rlhf_fast.generate(model, PROMPTS, max_slots=max_slots, **options)
    same_responses(out, expected)
    assert out.finish_reason == expected.finish_reason
    compare_with_forward(model, [p for p in PROMPTS for _ in range(2)], out, {})
    assert set(widths) <= {1, 2, 3, 4, 6}


def test_no_step_behind_the_last_token(model, monkeypatch):
    """The host knows when the longest response must have ended, and looks then."""
    steps = []
    monkeypatch.setattr(loop, "LOOK_EVERY", {"cpu": 100})
    monkeypatch.setattr(
        graphs.GraphedStep, "__call__", lambda self, live: steps.append(self.step(live))
    )
    rlhf_fast.generate(model, PROMPTS, max_new_tokens=6)
    assert len(steps) == 5


def test_a_row_without_a_possible_token_is_named_at_the_next_look(model, monkeypatch):
    def stuck(logits, *, position, **_):
        zeros = torch.zeros(len(logits))
        return rlhf_fast.Sample(torch.where(position == 2, -1, 1), zeros, zeros, zeros)

    monkeypatch.setattr(loop, "LOOK_EVERY", {"cpu": 4})
    monkeypatch.setattr(loop, "sample", stuck)
    with pytest.raises(ValueError, match="response 0 can be drawn at 2"):
        rlhf_fast.generate(model, PROMPTS, max_new_tokens=12)


class FakeGraph:
    """Replays what was called while it was captured."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for step, width in self.calls:
            step(width)


def test_a_width_is_captured_when_it_lasts(monkeypatch):
    ran, captured = [], []

    class Capture:
        def __init__(self, graph, **_):
            self.graph = graph

        def __enter__(self):
            captured.append(len(ran))

        def __exit__(self, *_):
            self.graph.calls = [(ran.append, ran.pop())]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    step = graphs.GraphedStep(ran.append, torch.device("cuda"), slots=6)
    for _ in range(graphs.WARM_UP + 3):
        step(3)
    for _ in range(2):
        step(5)
    assert ran == [4] * (graphs.WARM_UP + 3) + [6, 6]
    assert captured == [graphs.WARM_UP] and list(step.graphs) == [4]


def test_a_step_that_cannot_be_captured_runs_as_before(monkeypatch, caplog):
    ran = []

    class Capture:
        def __init__(self, graph, **_):
            pass

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    step = graphs.GraphedStep(ran.append, torch.device("cuda"), slots=6)
    for _ in range(graphs.WARM_UP + 5):
        step(3)
    assert len(ran) == graphs.WARM_UP + 5 and not step.graphs
    assert caplog.text.count("without CUDA graphs") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_captured_steps_draw_what_plain_ones_draw(family, monkeypatch):
    model = tiny(family).cuda()
    prompts = [p.cuda() for p in PROMPTS]
    options = {"n": 2, "max_new_tokens": 40, "eos_ids": (1, 2), "seed": 9, "max_slots": 5}
    made = []
    original = graphs.GraphedStep._capture
    monkeypatch.setattr(
        graphs.GraphedStep,
        "_capture",
        lambda self, width: made.append(original(self, width) or self),
    )
    captured = rlhf_fast.generate(model, prompts, **options)
    assert made and made[-1].graphs, "no step was captured"
    monkeypatch.setattr(graphs, "WARM_UP", 10**9)
    plain = rlhf_fast.generate(model, prompts, **options)
    assert_same_bits("ids", captured.ids, plain.ids)
    assert_same_bits("logprob", captured.logprob, plain.logprob)
