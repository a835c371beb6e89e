"""Rollouts against `model.generate`, teacher-forced forwards, and enumerated probabilities."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import transformers

import rlhf_fast
from rlhf_fast.rollout.models import FAMILIES
from rlhf_fast.rollout.prompts import _mix, row_seed
from rlhf_fast.rollout.slots import SlotCache, Step
from rlhf_fast.testing import assert_same_bits

V = 67
TRUNCATED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
SAMPLINGS = ({}, {"temperature": 0.7}, TRUNCATED, {"temperature": 1.3, "min_p": 0.05})


def tiny(family="llama", *, vocabulary=V, scale=6.0, **options):
    """A random model of `family` whose logits are far enough apart that no argmax is a tie."""
    config = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family not in ("gpt2", "gpt_neox", "opt"):
        config["num_key_value_heads"] = 2
    config |= {
        "gemma": {"head_dim": 8},
        "gemma2": {
            "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0, "query_pre_attn_scalar": 8,
        },
        "gpt2": {"n_inner": 48, "scale_attn_by_inverse_layer_idx": True},
        "mistral": {"sliding_window": 6, "head_dim": 8},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
        "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "qwen3": {"head_dim": 8},
    }.get(family, {})  # fmt: skip
    torch.manual_seed(0)
    auto = transformers.AutoConfig.for_model(family, **config | options)
    model = transformers.AutoModelForCausalLM.from_config(auto)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.train()


def some_prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator) for n in lengths]


PROMPTS = some_prompts(3, 9, 1, 12, 5, 7, 2)


@pytest.fixture
def model():
    return tiny()


def greedy(model, prompts, **options):
    return rlhf_fast.generate(model, prompts, temperature=0.0, **options)


def plain_logits(model, prompt, response):
    """`[T, V]`: the rows that predict the response, by one forward without a cache."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        logits = model(torch.cat((prompt, response))[None], use_cache=False).logits
    for module, mode in modes:
        module.training = mode
    return logits[0, len(prompt) - 1 : -1]


def hf_greedy(model, prompt, max_new_tokens):
    """The response of transformers' own `generate`."""
    model.eval()
    model.generation_config.eos_token_id = None
    out = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), pad_token_id=0,
        do_sample=False, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    model.train()
    return out[0, len(prompt) :]


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


def compare_with_forward(model, prompts, out, sampling):
    for i, prompt in enumerate(prompts):
        ids = out.ids[i, : out.lengths[i]]
        logits = plain_logits(model, prompt, ids)
        lp, log_mass = rlhf_fast.replay_logprob(logits, ids, **sampling)
        options = {"temperature": sampling.get("temperature", 1.0)}
        entropy = rlhf_fast.logprob_entropy(logits, ids, **options).entropy
        for ours, truth in ((out.logprob, lp), (out.log_mass, log_mass), (out.entropy, entropy)):
            torch.testing.assert_close(ours[i, : len(ids)], truth, rtol=0, atol=2e-5)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rescored_ratio_of_the_first_step_is_one(dtype, sampling):
    model = tiny("llama", attention_dropout=0.3).to(dtype)
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


def state_of(model):
    return {
        "modes": [m.training for m in model.modules()],
        "attention": [
            m.config._attn_implementation for m in model.modules() if "config" in vars(m)
        ],
        "config": [model.config.to_dict()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forward": [vars(m).get("forward") for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": [torch.get_rng_state()],
        "grad mode": [torch.is_grad_enabled()],
    }


def assert_same_state(model, before):
    for name, value in state_of(model).items():
        for now, then in zip(value, before[name], strict=True):
            same = torch.equal(now, then) if torch.is_tensor(now) else now == then
            assert same, name


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
    model.gradient_checkpointing_enable()
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


# --------------------------------------------------------------------------- EOS and shapes


def cut(ids, eos_ids):
    """(response up to its first EOS, why it ended)."""
    for t, token in enumerate(ids):
        if token in eos_ids:
            return ids[: t + 1], "eos"
    return ids, "length"


def test_eos_by_lengths(model):
    free = greedy(model, PROMPTS, max_new_tokens=9).ids.tolist()
    first, last = free[0][0], free[1][8]
    for eos_ids in ((), first, last, [first, last], (0,), torch.tensor([free[3][4], 0]), {last}):
        chosen = eos_ids if not isinstance(eos_ids, int) else (eos_ids,)
        chosen = [int(i) for i in chosen]
        out = greedy(model, PROMPTS, max_new_tokens=9, eos_ids=eos_ids, max_slots=2)
        expected = [cut(ids, chosen) for ids in free]
        assert out.finish_reason == [reason for _, reason in expected]
        assert out.lengths.tolist() == [len(ids) for ids, _ in expected]
        assert out.ids.shape[1] == max(len(ids) for ids, _ in expected)
        for row, mask, (ids, _) in zip(out.ids, out.mask, expected, strict=True):
            assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any()
            assert mask.tolist() == [t < len(ids) for t in range(len(row))]


def test_everything_ends_at_once(model):
    out = rlhf_fast.generate(model, PROMPTS, max_new_tokens=9, eos_ids=range(V))
    assert out.ids.shape == (7, 1) and out.finish_reason == ["eos"] * 7
    assert (out.logprob < 0).all()  # the EOS token has its log-prob


def test_output(model):
    with torch.inference_mode():
        out = rlhf_fast.generate(model, PROMPTS, n=2, max_new_tokens=9, eos_ids=(1, 2, 3, 4, 5, 6))
    n, t = out.ids.shape
    assert n == 14 and t == out.lengths.max() and len(out.lengths.unique()) > 2
    assert out.ids.dtype == out.lengths.dtype == out.prompt_ids.dtype == torch.int64
    assert out.mask.dtype == out.prompt_mask.dtype == torch.bool
    for x in (out.logprob, out.log_mass, out.entropy):
        assert x.dtype == torch.float32 and x.shape == (n, t)
        assert not x[~out.mask].any() and x.isfinite().all()
        (x * torch.ones(t, requires_grad=True)).sum().backward()
    assert not out.ids[~out.mask].any()
    tensors = [x for x in vars(out).values() if torch.is_tensor(x)]
    assert len(tensors) == 8 and not any(x.is_inference() or x.requires_grad for x in tensors)
    for i in range(n):
        prompt = PROMPTS[i // 2]
        row = [0] * (12 - len(prompt)) + prompt.tolist()
        assert out.prompt_ids[i].tolist() == row
        assert out.prompt_mask[i].tolist() == [c >= 12 - len(prompt) for c in range(12)]
    assert out.seconds > 0
    assert out.tokens_per_second == pytest.approx(int(out.lengths.sum()) / out.seconds)


def padded(prompts, side, garbage):
    width = max(map(len, prompts)) + 2
    ids = torch.tensor(garbage).repeat(len(prompts), width)[:, :width]
    mask = torch.zeros(len(prompts), width)
    for i, p in enumerate(prompts):
        place = slice(1, 1 + len(p)) if side == "right" else slice(width - len(p), width)
        ids[i, place], mask[i, place] = p, 0.5
    return ids, mask


def test_forms_of_prompts(model):
    expected = rlhf_fast.generate(model, PROMPTS, max_new_tokens=6)
    for prompts in (
        [p.tolist() for p in PROMPTS],
        tuple(PROMPTS),
        [p.int() for p in PROMPTS],
        padded(PROMPTS, "left", [0]),
        padded(PROMPTS, "right", [-5, 10**6]),
    ):
        out = rlhf_fast.generate(model, prompts, max_new_tokens=6)
        assert_same_bits("logprob", out.logprob, expected.logprob)
        for name in ("ids", "prompt_ids", "prompt_mask"):
            assert torch.equal(getattr(out, name), getattr(expected, name))


def test_no_prompts(model):
    out = rlhf_fast.generate(model, [], max_new_tokens=4, logprobs="rescore")
    assert out.ids.shape == out.logprob.shape == (0, 0) and out.finish_reason == []


def test_progress_bar(model, capsys):
    rlhf_fast.generate(model, PROMPTS, max_new_tokens=2, progress=True)
    assert "7/7" in capsys.readouterr().err
    rlhf_fast.generate(model, PROMPTS, max_new_tokens=2)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------- errors

IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompts": [[1], []]}, ValueError),
        ({"prompts": (IDS, torch.tensor([[1, 1, 1], [0, 0, 0]]))}, ValueError),
        ({"prompts": (IDS, torch.ones(2, 4))}, ValueError),
        ({"prompts": [[1, V]]}, ValueError),
        ({"prompts": [[-1]]}, ValueError),
        ({"prompts": [torch.ones(1, 2, dtype=torch.long)]}, ValueError),
        ({"prompts": [[0.5]]}, TypeError),
        ({"prompts": ["hello"]}, TypeError),
        ({"prompts": "hello"}, TypeError),
        ({"prompts": 3}, TypeError),
        ({"prompts": [[1] * 30], "max_new_tokens": 3}, ValueError),
        ({"max_new_tokens": 0}, ValueError),
        ({"max_new_tokens": 2.5}, TypeError),
        ({"n": 0}, ValueError),
        ({"temperature": -0.1}, ValueError),
        ({"temperature": math.nan}, ValueError),
        ({"temperature": math.inf}, ValueError),
        ({"temperature": "hot"}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.5}, ValueError),
        ({"min_p": -0.5}, ValueError),
        ({"min_p": 2}, ValueError),
        ({"eos_ids": V}, ValueError),
        ({"eos_ids": None}, TypeError),
        ({"seed": 1 << 64}, ValueError),
        ({"seed": 0.5}, TypeError),
        ({"logprobs": "raw"}, ValueError),
    ],
)  # fmt: skip
def test_bad_arguments_before_anything_is_generated(model, options, error):
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    before = state_of(model)
    with rlhf_fast.rollout(model, max_len=32) as r, pytest.raises(error):
        r.generate(**{"prompts": PROMPTS, "max_new_tokens": 2} | options)
    assert_same_state(model, before)


def test_positions_that_end():
    model = tiny("gpt2")
    assert greedy(model, [[1] * 60], max_new_tokens=4).ids.shape == (1, 4)
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        greedy(model, [[1] * 60], max_new_tokens=5)


@pytest.mark.parametrize("slots", [{"max_slots": 0}, {"max_len": 0}])
def test_bad_slots(model, slots):
    with pytest.raises(ValueError, match=next(iter(slots))):
        rlhf_fast.rollout(model, **slots)


def test_nan_logits_are_an_error_and_leave_nothing_behind(model):
    expected = greedy(model, PROMPTS, max_new_tokens=6)
    weight = model.lm_head.weight.detach().clone()
    model.lm_head.weight.data[3] = torch.nan
    with rlhf_fast.rollout(model) as r:
        with pytest.raises(ValueError, match="logits"):
            r.generate(PROMPTS, max_new_tokens=6)
        model.lm_head.weight.data.copy_(weight)
        assert torch.equal(r.generate(PROMPTS, max_new_tokens=6, temperature=0.0).ids, expected.ids)


# --------------------------------------------------------------------------- which models

SMALL = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def build(auto, family, **options):
    return getattr(transformers, auto).from_config(
        transformers.AutoConfig.for_model(family, **SMALL | {"intermediate_size": 32} | options)
    )


@pytest.mark.parametrize("family", ["bloom", "gptj", "falcon", "mamba", "gpt_neo"])
def test_models_that_cannot_be_driven(family):
    options = {
        "gptj": {"rotary_dim": 4},
        "gpt_neo": {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]},
    }.get(family, {})
    if family == "gpt_neo":
        config = transformers.AutoConfig.for_model(family, vocab_size=V, hidden_size=32, **options)
        other = transformers.AutoModelForCausalLM.from_config(config)
    else:
        other = build("AutoModelForCausalLM", family, **options)
    before = state_of(other)
    with pytest.raises(NotImplementedError, match=family):
        rlhf_fast.rollout(other)
    assert_same_state(other, before)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_embeddings_that_look_at_the_batch_are_refused(rope):
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                       "original_max_position_embeddings": 32}  # fmt: skip
    with pytest.raises(NotImplementedError, match=rope):
        rlhf_fast.rollout(tiny("llama", rope_parameters=parameters))


def test_what_is_no_causal_lm(model):
    t5 = transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    others = (
        torch.nn.Linear(2, 2),
        None,
        model.model,
        build("AutoModelForMaskedLM", "bert"),
        build("AutoModelForSequenceClassification", "llama"),
        transformers.T5ForConditionalGeneration(t5),
    )
    for other in others:
        with pytest.raises(TypeError, match="causal LM"):
            rlhf_fast.rollout(other)


# --------------------------------------------------------------------------- parts


def test_a_refilled_slot_holds_nothing_of_its_last_owner():
    cache = SlotCache(layers=1, slots=2, columns=6)
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    new = torch.ones(1, 2, 3, 4)
    cache.step = Step(rows, columns, lengths=[2, 1])
    cache.update(new, new, 0)
    cache.layers[0].keys.fill_(torch.nan)
    cache.step = Step(rows[:2], columns[:2], lengths=[2])
    cache.update(new[:, :, :2], new[:, :, :2], 0)
    assert cache.layers[0].keys[0, :, :, 0].tolist() == [[1, 1, 0, 0, 0, 0]] * 2
    assert cache.layers[0].keys[1].isnan().all()


def test_import_is_light_and_the_name_is_the_function():
    code = (
        "import sys, rlhf_fast\n"
        "assert 'transformers' not in sys.modules\n"
        "import rlhf_fast.rollout\n"
        "from rlhf_fast.rollout.api import rollout\n"
        "assert rlhf_fast.rollout is rollout\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
