"""The memory of rollouts (plan, release, reuse), and the decode loop as it runs on a GPU."""

import contextlib
import gc
import weakref

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
        one, four = (r.plan(PROMPTS[1:2], n=n, max_new_tokens=3) for n in (1, 4))
        assert (one.prompts, four.prompts) == (1, 1)
        # A prompt of 9 tokens is held once.
        assert four.kv_bytes * (9 + 3) == one.kv_bytes * (9 + 4 * 3)
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
            for x in (layer.keys, layer.values, layer.prompt_keys, layer.prompt_values):
                x.fill_(torch.nan)
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

    def padded(self, step, live):
        widths.append(min(1 << (live - 1).bit_length(), self.slots))
        step(widths[-1])

    monkeypatch.setattr(graphs.GraphedSteps, "run", padded)
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
        graphs.GraphedSteps, "run", lambda self, step, live: steps.append(step(live))
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


class FakeGenerator:
    """Its state: an object that a capture may spoil."""

    def __init__(self):
        self.state = "good"

    def clone_state(self):
        return "spare"

    def graphsafe_set_state(self, state):
        self.state = state


@pytest.fixture
def fake_cuda(monkeypatch):
    """What `graphs` uses of torch.cuda: generator, streams that were made current, modes."""
    generator, streams, modes = FakeGenerator(), [], []
    replaced = {
        "CUDAGraph": FakeGraph,
        "graph_pool_handle": lambda: 0,
        "device": lambda _: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "current_stream": lambda: "main",
        "set_stream": streams.append,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": modes.append,
        "default_generators": (generator,),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return generator, streams, modes


def test_a_width_is_captured_when_it_lasts(fake_cuda, monkeypatch):
    ran, captured = [], []

    class Capture:
        def __init__(self, graph, **_):
            self.graph = graph

        def __enter__(self):
            assert not gc.isenabled()  # an older graph must not be destroyed now
            captured.append(len(ran))

        def __exit__(self, *_):
            self.graph.calls = [(ran.append, ran.pop())]

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    steps = graphs.GraphedSteps(torch.device("cuda"), slots=6)
    for _ in range(graphs.WARM_UP + 3):
        steps.run(ran.append, 3)
    for _ in range(2):
        steps.run(ran.append, 5)
    assert ran == [4] * (graphs.WARM_UP + 3) + [6, 6]
    assert captured == [graphs.WARM_UP] and list(steps.graphs) == [4]
    assert gc.isenabled() and fake_cuda[0].state == "good" and not fake_cuda[1]
    assert fake_cuda[2] == ["error", 0]  # the last step of the warm-up was watched


@pytest.mark.parametrize("fails_in", ["__enter__", "__exit__"])
def test_a_step_that_cannot_be_captured_runs_as_before(fake_cuda, monkeypatch, caplog, fails_in):
    ran = []

    class Capture:
        def __init__(self, graph, **_):
            pass

        def __enter__(self):
            if fails_in == "__enter__":
                raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *_):
            ran.pop()
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    steps = graphs.GraphedSteps(torch.device("cuda"), slots=6)
    for _ in range(graphs.WARM_UP + 5):
        steps.run(ran.append, 3)
    assert len(ran) == graphs.WARM_UP + 5 and not steps.graphs
    assert caplog.text.count("without CUDA graphs") == 1
    assert gc.isenabled() and fake_cuda[0].state == "spare" and fake_cuda[1] == ["main"]


def test_a_step_that_waits_is_not_captured(fake_cuda, caplog):
    ran, modes = [], fake_cuda[2]

    def step(width):
        if modes and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        ran.append(width)

    steps = graphs.GraphedSteps(torch.device("cuda"), slots=6)
    for _ in range(graphs.WARM_UP + 5):
        steps.run(step, 3)
    assert len(ran) == graphs.WARM_UP + 5 and not steps.graphs and modes == ["error", 0]
    assert caplog.text.count("without CUDA graphs") == 1


def test_a_loop_is_freed_without_the_garbage_collector(model, monkeypatch):
    """With it go the graphs of a call, which must not be destroyed at some later time."""
    loops = []
    original = loop.Loop.run
    monkeypatch.setattr(
        loop.Loop, "run", lambda self: (loops.append(weakref.ref(self)), original(self))
    )
    gc.disable()
    try:
        rlhf_fast.generate(model, PROMPTS, max_new_tokens=4)
        assert len(loops) == 1 and loops[0]() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LONG = {"n": 2, "max_new_tokens": 40, "eos_ids": (1, 2), "seed": 9, "max_slots": 5}


@pytest.fixture
def captures(monkeypatch):
    """The `GraphedSteps` of each capture, whether or not it succeeded."""
    made = []
    original = graphs.GraphedSteps._capture

    def capture(self, step, width):
        made.append(self)
        original(self, step, width)

    monkeypatch.setattr(graphs.GraphedSteps, "_capture", capture)
    return made


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_captured_steps_draw_what_plain_ones_draw(family, captures, monkeypatch):
    model = tiny(family).cuda()
    captured = rlhf_fast.generate(model, PROMPTS, **LONG)
    assert captures and captures[-1].graphs, "no step was captured"
    monkeypatch.setattr(graphs, "WARM_UP", 10**9)
    plain = rlhf_fast.generate(model, PROMPTS, **LONG)
    same_responses(captured, plain)


@needs_cuda
def test_garbage_with_a_graph_in_it_does_not_break_a_capture(captures):
    model = tiny().cuda()
    expected = rlhf_fast.generate(model, PROMPTS, **LONG)
    before = gc.get_threshold()
    gc.set_threshold(1)  # collect all the time
    try:
        for _ in range(3):
            cycle = [torch.cuda.CUDAGraph()]
            with torch.cuda.graph(cycle[0]):
                torch.zeros(8, device="cuda").add_(1)
            cycle.append(cycle)
            del cycle
            out = rlhf_fast.generate(model, PROMPTS, **LONG)
            assert_same_bits("ids", out.ids, expected.ids)
    finally:
        gc.set_threshold(*before)
    assert all(steps.on for steps in captures)


@needs_cuda
def test_a_model_that_waits_for_the_device_runs_without_graphs(captures, caplog):
    model = tiny().cuda()
    expected = rlhf_fast.generate(model, PROMPTS, **LONG)
    made = len(captures)
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: args[0].sum().item())
    try:
        for _ in range(2):
            out = rlhf_fast.generate(model, PROMPTS, **LONG)
            assert_same_bits("ids", out.ids, expected.ids)
    finally:
        hook.remove()
    assert "without CUDA graphs" in caplog.text and len(captures) == made
    again = rlhf_fast.generate(model, PROMPTS, **LONG)
    assert_same_bits("ids", again.ids, expected.ids)
    assert captures[-1].graphs


@needs_cuda
def test_batch_of_one_on_a_gpu_call_after_call():
    model = tiny().cuda()
    with rlhf_fast.rollout(model, max_slots=1) as r:
        first = r.generate(PROMPTS, max_new_tokens=30)
        for _ in range(3):
            assert_same_bits("ids", r.generate(PROMPTS, max_new_tokens=30).ids, first.ids)
