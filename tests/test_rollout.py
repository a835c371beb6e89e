"""Rollouts against `model.generate`, teacher-forced forwards, and enumerated probabilities."""

import itertools
import math

import pytest
import torch
import transformers

import rlhf_fast
from rlhf_fast.rollout import loop
from rlhf_fast.rollout.models import FAMILIES
from rlhf_fast.rollout.prompts import _mix, row_seed
from rlhf_fast.rollout.rescore import _score
from tests.rollout_models import (
    PROMPTS,
    SAMPLINGS,
    V,
    assert_same_state,
    compare_with_forward,
    greedy,
    hf_greedy,
    plain_logits,
    state_of,
    tiny,
)


@pytest.fixture
def model():
    return tiny()


# --------------------------------------------------------------------------- the two promises


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate_and_logprobs_are_those_of_a_forward(family):
    model = tiny(family)
    with rlhf_fast.rollout(model, max_slots=3, max_len=64) as r:
        out = r.generate(PROMPTS, max_new_tokens=12, temperature=0.0)
        for prompt, ids in zip(PROMPTS, out.ids, strict=True):
            assert ids.tolist() == hf_greedy(model, prompt, 12).tolist()
        assert len(out.ids.unique()) > 5  # a model that repeats itself would prove little
        assert not out.logprob.any() and not out.log_mass.any() and not out.entropy.any()
        for sampling in SAMPLINGS:
            out = r.generate(PROMPTS, max_new_tokens=12, eos_ids=(3, 4, 5), seed=5, **sampling)
            compare_with_forward(model, PROMPTS, out, sampling)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_slots", [1, 2, 64])
def test_slots_and_refill_change_nothing(family, max_slots):
    model = tiny(family)
    options = {"n": 2, "max_new_tokens": 10, "eos_ids": (1, 2, 3, 4), "seed": 9}
    expected = rlhf_fast.generate(model, PROMPTS, max_slots=5, **options)
    out = rlhf_fast.generate(model, PROMPTS, max_slots=max_slots, **options)
    assert torch.equal(out.ids, expected.ids) and torch.equal(out.lengths, expected.lengths)
    torch.testing.assert_close(out.logprob, expected.logprob, rtol=0, atol=2e-5)
    assert len(expected.lengths.unique()) > 3


def test_every_sequence_is_as_likely_as_its_probability():
    model = tiny("gpt2", vocabulary=5, scale=4.0)
    prompt, samples, eos = torch.tensor([2, 0]), 20000, 4
    options = {"n": samples, "max_new_tokens": 3, "eos_ids": eos, "max_slots": 512}
    out = rlhf_fast.generate(model, [prompt], **options)
    drawn = [tuple(r[:n]) for r, n in zip(out.ids.tolist(), out.lengths.tolist(), strict=True)]
    probability = {}
    for ids in itertools.product(range(5), repeat=3):
        logits = plain_logits(model, prompt, torch.tensor(ids)).double()
        lp = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).flatten().tolist()
        length = ids.index(eos) + 1 if eos in ids else 3
        probability[ids[:length]] = math.exp(sum(lp[:length]))
    assert math.isclose(sum(probability.values()), 1.0, rel_tol=1e-6)
    assert set(drawn) <= set(probability)
    for ids, total in set(zip(drawn, out.logprob.sum(1).tolist(), strict=True)):
        assert math.isclose(total, math.log(probability[ids]), abs_tol=6e-5)
    # Chi-square over the sequences (rare ones pooled), at one in a million by Wilson and Hilferty.
    counts = dict.fromkeys(probability, 0)
    for ids in drawn:
        counts[ids] += 1
    often = [ids for ids, p in probability.items() if p * samples >= 5]
    cells = [(counts[ids], samples * probability[ids]) for ids in often]
    rest = samples - sum(e for _, e in cells)
    if rest > 5:
        cells.append((samples - sum(c for c, _ in cells), rest))
    chi = sum((c - e) ** 2 / e for c, e in cells)
    df = len(cells) - 1
    assert df > 20
    assert chi < df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3


# --------------------------------------------------------------------------- rescoring


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gpt2", torch.float32), ("llama", torch.float32), ("llama", torch.bfloat16)],
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rescored_ratio_of_the_first_step_is_one(family, dtype, sampling):
    model = tiny(family).to(dtype)
    options = {"max_new_tokens": 12, "eos_ids": (3, 4, 5), "max_slots": 3, **sampling}
    drawn = rlhf_fast.generate(model, PROMPTS, **options)
    out = rlhf_fast.generate(model, PROMPTS, logprobs="rescore", **options)
    assert torch.equal(out.ids, drawn.ids) and model.training
    ids, mask = torch.cat((out.prompt_ids, out.ids), 1), torch.cat((out.prompt_mask, out.mask), 1)
    model.eval()
    logits = model(
        ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
    ).logits[:, out.prompt_ids.shape[1] - 1 : -1]
    lp, log_mass = rlhf_fast.replay_logprob(logits, out.ids, **sampling)
    kept = out.mask & lp.isfinite()
    torch.testing.assert_close(out.logprob[kept], lp[kept], rtol=0, atol=1e-6)
    torch.testing.assert_close(out.log_mass[kept], log_mass[kept], rtol=0, atol=1e-6)
    assert out.logprob.isfinite().all() and not out.logprob[~out.mask].any()
    assert kept.sum() >= 0.9 * out.mask.sum()


def test_rescored_token_that_fell_out_of_the_kept_set_keeps_the_mass_of_its_draw():
    logits, ids = torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[1]])
    sampling = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0}
    mass, mask = torch.tensor([[-0.25]]), torch.ones(1, 1, dtype=torch.bool)
    logprob, log_mass, _ = _score(logits, ids, mask, mass, sampling)
    assert log_mass == -0.25
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[..., 1] + 0.25)


def test_rescored_greedy_draw_keeps_its_point_mass(model):
    out = greedy(model, PROMPTS, max_new_tokens=4, logprobs="rescore")
    assert not out.logprob.any() and not out.entropy.any()


def test_bfloat16_is_as_exact_as_a_forward():
    model, wide = tiny(scale=2.0).bfloat16(), tiny(scale=2.0).bfloat16().double()
    out = rlhf_fast.generate(model, PROMPTS, max_new_tokens=12, n=2)
    assert out.logprob.dtype == torch.float32
    for i, ids in enumerate(out.ids):
        truth, plain = (
            plain_logits(m, PROMPTS[i // 2], ids).double().log_softmax(-1).gather(1, ids[:, None])
            for m in (wide, model)
        )
        error, allowed = (
            (x - truth.flatten()).abs().mean() for x in (out.logprob[i], plain.flatten())
        )
        assert error <= 2 * allowed + 1e-3


# --------------------------------------------------------------------------- the model afterwards


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_module_is_put_back(model, implementation):
    model.set_attn_implementation(implementation)
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model(PROMPTS[0][None]).logits.sum().backward()
    before = state_of(model)
    with rlhf_fast.rollout(model) as r:
        assert_same_state(model, before)
        r.generate(PROMPTS, max_new_tokens=4, logprobs="rescore")
        assert_same_state(model, before)
    assert_same_state(model, before)
    model(PROMPTS[0][None]).logits.sum().backward()


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_error_inside_the_model(model, fails_at):
    expected = greedy(model, PROMPTS, max_new_tokens=6, max_slots=3)
    calls = itertools.count(1)

    def hook(module, args):
        if next(calls) == fails_at:
            raise RuntimeError("out of luck")

    handle = model.model.layers[1].register_forward_pre_hook(hook)
    before = state_of(model)
    with rlhf_fast.rollout(model, max_slots=3) as r:
        with pytest.raises(RuntimeError, match="out of luck"):
            r.generate(PROMPTS, max_new_tokens=6)
        assert_same_state(model, before)
        again = r.generate(PROMPTS, max_new_tokens=6, temperature=0.0)
    handle.remove()
    assert torch.equal(again.ids, expected.ids)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_is_off_in_a_module_that_trains(family):
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "llama": ("attention_dropout",)}
    model = tiny(family, **dict.fromkeys(dropout[family], 0.5))
    out = rlhf_fast.generate(model, PROMPTS, max_new_tokens=8)
    compare_with_forward(model, PROMPTS, out, {})
    assert all(m.training for m in model.modules())


def test_weights_are_those_of_the_call(model):
    with rlhf_fast.rollout(model) as r:
        first = r.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "k_proj" in name or "v_proj" in name:
                    parameter.data.mul_(-1.5)
        second = r.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
    assert not torch.equal(first.ids, second.ids)
    for prompt, ids in zip(PROMPTS, second.ids, strict=True):
        assert ids.tolist() == hf_greedy(model, prompt, 8).tolist()


def test_config_switches_of_the_model_do_not_matter(model):
    expected = rlhf_fast.generate(model, PROMPTS, max_new_tokens=5)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, max_new_tokens=2, eos_token_id=list(range(V)),
        repetition_penalty=3.0,
    )  # fmt: skip
    model.config.use_cache = False
    model.config.output_hidden_states = True
    model.model.gradient_checkpointing = True
    out = rlhf_fast.generate(model, PROMPTS, max_new_tokens=5)
    assert torch.equal(out.ids, expected.ids) and out.finish_reason == ["length"] * 7
    rescored = rlhf_fast.generate(model, PROMPTS, max_new_tokens=5, logprobs="rescore")
    torch.testing.assert_close(rescored.logprob, expected.logprob, rtol=0, atol=2e-5)


# --------------------------------------------------------------------------- rows and seeds


def test_a_row_depends_on_seed_prompt_index_and_sample_index_only(model):
    options = {"max_new_tokens": 8, "seed": 3}
    out = rlhf_fast.generate(model, PROMPTS, n=3, **options)
    assert out.ids.shape == (21, 8)
    fewer = rlhf_fast.generate(model, PROMPTS, n=2, max_slots=4, **options)
    assert torch.equal(out.ids.view(7, 3, 8)[:, :2], fewer.ids.view(7, 2, 8))
    head = rlhf_fast.generate(model, PROMPTS[:2], n=3, **options)
    assert torch.equal(out.ids[:6], head.ids)
    shorter = rlhf_fast.generate(model, PROMPTS, n=3, max_new_tokens=5, seed=3)
    assert torch.equal(out.ids[:, :5], shorter.ids)
    other = rlhf_fast.generate(model, PROMPTS, n=3, max_new_tokens=8, seed=3 + (1 << 32))
    assert not torch.equal(out.ids, other.ids)
    # The very draw: `sample` on the forward's logits, at the row's seed and the token's index.
    for p, j in ((0, 0), (4, 2)):
        ids = out.ids[3 * p + j]
        logits = plain_logits(model, PROMPTS[p], ids)
        drawn = rlhf_fast.sample(logits, seed=row_seed(3, p, j), position=torch.arange(8))
        assert torch.equal(drawn.ids, ids)


def test_row_seeds_differ_and_are_pinned():
    seeds = {row_seed(s, p, j) for s in range(-3, 3) for p in range(40) for j in range(40)}
    assert len(seeds) == 6 * 40 * 40
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)
    assert row_seed(-1, 2, 3) == row_seed((1 << 64) - 1, 2, 3)
    assert _mix(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from state 0
    assert row_seed(0, 0, 0) == 2558736989570252433


@pytest.mark.parametrize("max_slots", [1, 3, 4, 64])
@pytest.mark.parametrize("eos_ids", [(), (1, 2, 3, 4, 5)])
def test_the_keys_of_a_prompt_are_computed_once(model, max_slots, eos_ids, monkeypatch):
    """However its samples start, together or late, and they draw what each draws by itself."""
    fed = []
    forward = loop.Loop._forward

    def record(self, ids, positions, step, keep):
        fed.extend(step.packed or ())
        assert len(self.place) <= self.cache.room.prompts <= max_slots
        return forward(self, ids, positions, step, keep)

    options = {"max_new_tokens": 5, "seed": 3, "eos_ids": eos_ids}
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_forward", record)
        out = rlhf_fast.generate(model, PROMPTS, n=4, max_slots=max_slots, **options)
    assert fed == list(map(len, PROMPTS))
    alone = rlhf_fast.generate(model, PROMPTS, n=4, max_slots=1, **options)
    assert torch.equal(out.ids, alone.ids) and torch.equal(out.lengths, alone.lengths)
    assert (out.logprob - alone.logprob).abs().max() < 2e-5
