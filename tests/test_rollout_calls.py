"""Calls of rollouts: EOS, shapes, forms of prompts, errors, and which models are refused."""

import math
import subprocess
import sys

import pytest
import torch
import transformers

import rlhf_fast
from rlhf_fast.rollout import loop
from rlhf_fast.testing import assert_same_bits
from tests.rollout_models import PROMPTS, V, assert_same_state, greedy, state_of, tiny


@pytest.fixture
def model():
    return tiny()


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


def test_a_row_without_a_possible_token_is_an_error_on_cuda_too(model, monkeypatch):
    # There `sample` does not look at values and gives the id -1, which no embedding survives.
    def stuck(logits, *, position, **_):
        zeros = torch.zeros(len(logits))
        return rlhf_fast.Sample(torch.where(position == 2, -1, 1), zeros, zeros, zeros)

    monkeypatch.setattr(loop, "sample", stuck)
    with pytest.raises(ValueError, match="response 0 can be drawn at 2"):
        rlhf_fast.generate(model, PROMPTS, max_new_tokens=6)


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


@pytest.mark.parametrize(
    ("family", "option"),
    [("llama", {"is_causal": False}), ("gemma", {"use_bidirectional_attention": True})],
)
def test_attention_that_looks_ahead_is_refused(family, option):
    with pytest.raises(NotImplementedError, match="causal attention"):
        rlhf_fast.rollout(tiny(family, **option))


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


def test_import_is_light_and_the_name_is_the_function():
    code = (
        "import sys, rlhf_fast\n"
        "assert 'transformers' not in sys.modules\n"
        "import rlhf_fast.rollout\n"
        "from rlhf_fast.rollout.api import rollout\n"
        "assert rlhf_fast.rollout is rollout\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
