"""SFT, reward model and PPO at toy size: the numbers they log, and what they do with gradients."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rlhf_fast
from rlhf_fast.train import batches, ppo, reward, sft
from rlhf_fast.train.config import Config
from rlhf_fast.train.data import Record, load
from rlhf_fast.train.models import (
    ScalarModel,
    at_last_token,
    check_fit,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    positions,
)
from rlhf_fast.train.run import Run, epochs_to_steps
from tests import train_fixtures as toy


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toy.make(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def judge(files, tmp_path_factory):
    """A reward model that the reward stage has trained."""
    output = tmp_path_factory.mktemp("judge") / "run"
    reward.train(toy.config("reward", files, output, steps=10))
    return str(output)


def rl_config(files, judge, output, **options):
    options = {"reward_model": judge, "gold": "tests.train_fixtures:gold"} | options
    return toy.config("ppo", files, output, **options)


# ------------------------------------------------------------------------------------------ batches


def test_order_visits_everything_once_per_pass_and_needs_no_memory():
    order = batches.Order(10, seed=3)
    places = [order[i] for i in range(20)]
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    assert places[:10] != places[10:]
    assert batches.Order(10, seed=3)[17] == places[17]
    assert order.batch(1, 4) == places[4:8]
    halves = [order.batch(1, 4, rank, 2) for rank in range(2)]
    assert sorted(itertools.chain(*halves)) == sorted(places[4:8])


def test_encode_cuts_the_prompt_in_front_and_the_response_behind(files):
    tokenizer = load_tokenizer(files["model"])
    config = Config(max_prompt_tokens=3, max_response_tokens=4)
    whole = tokenizer("abcdef").input_ids
    short = batches.encode(tokenizer, config, "abcdef", "xy")
    assert short.ids[:3] == whole[-3:] and short.prompt == 3
    assert short.ids[-1] == tokenizer.eos_token_id
    long = batches.encode(tokenizer, config, "abcdef", "uvwxyzuvwxyz")
    assert len(long.ids) == 7 and tokenizer.eos_token_id not in long.ids


def test_text_becomes_blocks_that_lose_nothing(files):
    tokenizer = load_tokenizer(files["model"])
    config = Config(max_prompt_tokens=4, max_response_tokens=3)
    text = "The list, then the next one of the list."
    blocks = batches.text_blocks(tokenizer, config, [Record("", (text,))])
    assert all(len(block.ids) <= 7 and block.prompt == 0 for block in blocks)
    ids = [i for block in blocks for i in block.ids]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_pad_marks_tokens_and_responses():
    sequences = [batches.Example([5, 6, 7], 1), batches.Example([8], 1)]
    batch = batches.pad(sequences, 0, torch.device("cpu"))
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.response.tolist() == [[False, True, True], [False] * 3]


# ---------------------------------------------------------------------------------------------- SFT


def test_sft_logs_the_mean_cross_entropy_and_learns(files, tmp_path):
    config = toy.config("sft", files, tmp_path / "run", steps=20, batch_size=8, micro_batch=3)
    result = sft.train(config)
    assert result["loss"] < result["loss_before"] - 0.5
    lines = toy.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    # The first step again, in plain PyTorch: one batch, no dropout difference (attention only).
    tokenizer, model = load_tokenizer(files["model"]), load_causal_lm(files["model"]).double()
    held_out = batches.split(config, "sft")[1]
    examples = batches.examples(tokenizer, config, held_out)
    batch = batches.pad(examples[:8], 0, torch.device("cpu"))
    logits = model.eval()(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
    labels = torch.where(batch.response, batch.ids, -100)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert result["loss_before"] == pytest.approx(expected.item(), rel=1e-5)


def test_micro_batches_add_up_to_the_batch(files, tmp_path):
    """Whole batches and pieces of different token counts take the same step."""
    losses = []
    for micro in (8, 3):
        output = tmp_path / str(micro)
        plain = {"model": toy.without_dropout(files, tmp_path / "plain")}
        config = toy.config("sft", files | plain, output, batch_size=8, micro_batch=micro, steps=3)
        sft.train(config)
        losses.append([line["loss"] for line in toy.metrics(output)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ------------------------------------------------------------------------------------- reward model


def test_each_completion_is_scored_once_and_all_pairs_count(files):
    tokenizer, model = load_tokenizer(files["model"]), load_scalar_model(files["model"]).eval()
    config = Config(max_prompt_tokens=12, max_response_tokens=12)
    prompts = reward.encode_ranked(tokenizer, config, load(files["ranked"]))[:5]
    rows = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    scores, ranks, mask = reward.scores_and_ranks(model, prompts, 0, torch.device("cpu"))
    assert rows == [sum(len(p.completions) for p in prompts)]
    per_prompt = []
    for p, prompt in enumerate(prompts):
        terms = []
        for i, j in itertools.permutations(range(len(prompt.ranks)), 2):
            if prompt.ranks[i] < prompt.ranks[j]:
                terms.append(-F.logsigmoid(scores[p, i] - scores[p, j]))
        per_prompt.append(torch.stack(terms).mean())
    expected = torch.stack(per_prompt).mean()
    assert rlhf_fast.ranking_loss(scores, ranks, mask).item() == pytest.approx(expected.item())
    alone = batches.pad([prompts[1].completions[0]], 0, torch.device("cpu"))
    single = at_last_token(model(alone.ids, alone.mask), alone.mask)
    assert scores[1, 0].item() == pytest.approx(single.item(), abs=1e-5)


def test_reward_learns_and_centres_the_best_completions(files, judge):
    tokenizer, model = load_tokenizer(judge), load_scalar_model(judge).eval()
    lines = toy.metrics(Path(judge))
    assert lines[-1]["eval_accuracy"] > 0.9
    config = toy.config("reward", files, Path(judge))
    prompts = reward.encode_ranked(tokenizer, config, batches.split(config, "reward")[0])
    best = [p.completions[0] for p in prompts]
    batch = batches.pad(best, 0, torch.device("cpu"))
    assert at_last_token(model(batch.ids, batch.mask), batch.mask).mean().abs() < 1e-4


def test_ordered_pairs_counts_ties_as_half():
    scores = torch.tensor([[1.0, 1.0, 0.0, 9.0]])
    ranks = torch.tensor([[0, 1, 2, 2]])
    mask = torch.tensor([[True, True, True, False]])
    right, pairs = reward.ordered_pairs(scores, ranks, mask)
    assert (right.item(), pairs.item()) == (2.5, 3)


def test_scalar_model_survives_saving_and_does_not_see_padding(files, tmp_path):
    model = load_scalar_model(files["model"]).eval()
    (tmp_path / "saved").mkdir()
    model.save_pretrained(tmp_path / "saved")
    again = load_scalar_model(str(tmp_path / "saved")).eval()
    ids = torch.randint(3, 50, (1, 5))
    ones = torch.ones_like(ids, dtype=torch.bool)
    whole = model(ids, ones)
    assert torch.equal(whole, again(ids, ones))
    for left, right in ((3, 0), (0, 3)):
        padded = F.pad(ids, (left, right), value=7)
        mask = F.pad(ones, (left, right), value=False)
        assert torch.allclose(model(padded, mask)[:, left : left + 5], whole, atol=1e-5)


# ---------------------------------------------------------------------------------------------- PPO


def test_a_rollout_is_what_plain_pytorch_says(files, judge, tmp_path):
    config = rl_config(
        files, judge, tmp_path, temperature=0.8, samples_per_prompt=2, missing_eos_penalty=3.0
    )
    actors = toy.actors(files, judge, config)
    rollout = actors.collect(toy.PROMPTS[:5], 7, torch.device("cpu"))
    assert len(rollout) == 10 and rollout.mask.any(1).all()
    length = rollout.ids.shape[1]
    assert torch.equal(rollout.sequence[:, -length:], rollout.ids)
    where = positions(rollout.sequence_mask)
    options = {"attention_mask": rollout.sequence_mask, "position_ids": where}
    logits = actors.policy(input_ids=rollout.sequence, **options).logits[:, -length - 1 : -1]
    logp = (logits.double() / 0.8).log_softmax(-1)
    chosen = logp.gather(-1, rollout.ids.unsqueeze(-1)).squeeze(-1)
    chosen = torch.where(rollout.mask, chosen, 0.0)
    assert (rollout.logprob - chosen).abs().max() < 2e-5
    assert (rollout.sampled_logprob - chosen).abs().max() < 2e-5
    assert torch.equal(rollout.logprob, rollout.ref_logprob)
    entropy = torch.where(rollout.mask, -(logp.exp() * logp).sum(-1), 0.0)
    assert (rollout.entropy - entropy).abs().max() < 2e-5
    hidden = actors.value(rollout.sequence, rollout.sequence_mask)
    values = torch.where(rollout.mask, hidden[:, -length - 1 : -1], 0.0)
    assert torch.allclose(rollout.values, values, atol=1e-5)
    for row in range(10):
        tokens = rollout.sequence[row, rollout.sequence_mask[row]].unsqueeze(0)
        score = actors.reward(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1]
        ended = bool(tokens[0, -1] == actors.tokenizer.eos_token_id)
        assert bool(rollout.finished[row]) == ended
        expected = score.item() - (0.0 if ended else 3.0)
        assert rollout.scores[row].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "reinforce"])
def test_the_score_rises(files, judge, tmp_path, algorithm):
    config = rl_config(
        files, judge, tmp_path / "run", algorithm=algorithm, steps=12, batch_size=8,
        micro_batch=64, kl_coef=0.01, samples_per_prompt=8, eval_fraction=0.3,
    )  # fmt: skip
    result = ppo.train(config)
    assert result["score"] > result["score_before"]
    assert result["kl_before"] == pytest.approx(0.0, abs=1e-4) and abs(result["kl"]) > 0.01
    lines = toy.metrics(tmp_path / "run")
    assert lines[0]["step"] == 0 and "eval_gold" in lines[0]
    first = lines[1]
    assert first["kl"] == pytest.approx(0.0, abs=1e-4) and first["sampler_gap"] < 2e-5
    assert first["sampler_gap"] <= first["sampler_max"] < 1e-4 and abs(first["sampler_k3"]) < 1e-9
    assert first["sampler_ess"] == pytest.approx(1.0, abs=1e-6)
    text = (tmp_path / "run" / "samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    assert {line["step"] for line in samples} == {0, 12}
    assert set(samples[0]) == {"step", "prompt", "response", "score", "gold"}


def test_the_ratio_of_the_first_pass_is_one(files, judge, tmp_path):
    config = rl_config(files, judge, tmp_path / "run", steps=1, ppo_epochs=1)
    ppo.train(config)
    assert toy.metrics(tmp_path / "run")[-1]["ratio_mean"] == pytest.approx(1.0, abs=1e-5)


def test_ptx_is_one_more_gradient_term_of_the_same_step(files, judge, tmp_path):
    """grad = grad PPO + ptx_coef * grad of the pretraining cross-entropy, whatever the pieces."""
    found = {}
    for name, options in {
        "ppo": {},
        "both": {"ptx_coef": 0.7, "pretraining_data": files["text"], "ptx_batch": 6},
        "small": {
            "ptx_coef": 0.7, "pretraining_data": files["text"], "ptx_batch": 6, "micro_batch": 1,
        },
    }.items():  # fmt: skip
        config = rl_config(files, judge, tmp_path / name, micro_batch=4)
        for key, value in options.items():
            setattr(config, key, value)
        run = Run("ppo", config)
        actors = toy.actors(files, judge, config)
        rollout = actors.collect(toy.PROMPTS[:4], 3, run.device)
        ppo.add_advantages(run, rollout, 0.1)
        capture = toy.Capture(actors.policy, actors.value)
        run.update = capture
        text = []
        if config.ptx_coef:
            text = ppo.Pretraining(run, actors.tokenizer).batch(0, 1)
        metrics = ppo.update(run, actors.policy, actors.value, None, rollout, text)
        found[name] = capture.found
        if name == "both":
            assert sum(len(part.ids) for part in text) == 6
            nats = sum(sft.cross_entropy(actors.policy, part) for part in text)
            nats = nats / sum(part.response[:, 1:].sum() for part in text)
            assert metrics["ptx_loss"] == pytest.approx(nats.item(), rel=1e-5)
            nats.backward()
            ptx = {f"policy.{n}": p.grad.clone() for n, p in actors.policy.named_parameters()}
    for name, gradient in found["both"].items():
        expected = found["ppo"][name] + 0.7 * ptx.get(name, 0.0)
        assert torch.allclose(gradient, expected, atol=1e-5, rtol=1e-4), name
        assert torch.allclose(found["small"][name], expected, atol=1e-5, rtol=1e-4), name


def test_rewards_and_advantages_of_a_step(files, judge, tmp_path):
    """-kl_coef * log(policy / reference) per token, the score on the last, GAE, whitening."""
    config = rl_config(files, judge, tmp_path / "run", gamma=0.9, lam=0.8)
    run = Run("ppo", config)
    rollout = toy.actors(files, judge, config).collect(toy.PROMPTS[:4], 1, run.device)
    rollout.ref_logprob = rollout.logprob - 0.3 * rollout.mask
    rewards = ppo.add_advantages(run, rollout, 0.5)
    raw = torch.zeros_like(rewards).double()
    for row in range(4):
        n = int(rollout.mask[row].sum())
        r = [-0.5 * 0.3] * n
        r[-1] += rollout.scores[row].item()
        assert rewards[row, :n].tolist() == pytest.approx(r, abs=1e-5)
        v, trace = [*rollout.values[row, :n].tolist(), 0.0], 0.0
        for t in reversed(range(n)):
            trace = r[t] + 0.9 * v[t + 1] - v[t] + 0.9 * 0.8 * trace
            raw[row, t] = trace
            assert rollout.returns[row, t].item() == pytest.approx(trace + v[t], abs=1e-4)
    flat = raw[rollout.mask]
    white = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    assert torch.allclose(rollout.advantages[rollout.mask].double(), white, atol=1e-4)


def test_statistics_of_a2c_are_those_of_both_losses(files, judge, tmp_path):
    config = rl_config(files, judge, tmp_path / "run", algorithm="a2c")
    run = Run("ppo", config)
    actors = toy.actors(files, judge, config)
    rollout = actors.collect(toy.PROMPTS[:4], 1, run.device)
    ppo.add_advantages(run, rollout, 0.1)
    for sign in (1, -1):  # a policy loss may have either sign
        rollout.advantages = sign * rollout.mask.float()
        out = ppo.policy_gradient_loss(
            config, actors.policy, actors.value, rollout, rollout.mask.sum()
        )
        stats = out.stats_dict()
        assert stats["policy_loss"] == pytest.approx(
            -sign * rollout.logprob.sum().item() / stats["tokens"], rel=1e-4
        )
        squares = (rollout.values - rollout.returns)[rollout.mask] ** 2
        assert stats["value_loss"] == pytest.approx(squares.mean().item() / 2, rel=1e-4)
        total = stats["policy_loss"] + config.value_coef * stats["value_loss"]
        assert out.loss.item() == pytest.approx(total, rel=1e-5)


def test_epochs_are_passes_over_the_data():
    assert epochs_to_steps(Config(batch_size=16, epochs=3), 24) == 5  # 72 items, not 96
    assert epochs_to_steps(Config(batch_size=32, epochs=1), 24) == 1
    assert epochs_to_steps(Config(batch_size=16, epochs=3, steps=7), 24) == 7


def test_kl_controller():
    controller = ppo.KLController(Config(kl_coef=0.1, kl_target=6.0, kl_horizon=1000))
    controller.update(6.6, 64)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 64 / 1000))
    controller.update(100.0, 64)  # the error is clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 64 / 1000) * (1 + 0.2 * 64 / 1000))
    fixed = ppo.KLController(Config(kl_coef=0.1))
    fixed.update(100.0, 64)
    assert fixed.coef == 0.1
    again = ppo.KLController(Config())
    again.load_state_dict(copy.deepcopy(controller.state_dict()))
    assert again.coef == controller.coef


def test_mistakes_are_named(files, judge, tmp_path):
    with pytest.raises(ValueError, match="ppo needs --reward_model"):
        ppo.train(rl_config(files, "", tmp_path / "a"))
    with pytest.raises(ValueError, match="--pretraining_data"):
        ppo.train(rl_config(files, judge, tmp_path / "b", ptx_coef=1.0))
    with pytest.raises(ValueError, match="gold: expected module:function"):
        ppo.train(rl_config(files, judge, tmp_path / "c", gold="tests.train_fixtures:nothing"))
    with pytest.raises(ValueError, match=r"gold: expected.*No module named 'nowhere'"):
        ppo.train(rl_config(files, judge, tmp_path / "c", overwrite=True, gold="nowhere:gold"))
    with pytest.raises(ValueError, match="temperature: expected a number > 0"):
        ppo.train(rl_config(files, judge, tmp_path / "e", temperature=0.0))
    with pytest.raises(ValueError, match="minibatches: expected at most 4"):
        ppo.train(rl_config(files, judge, tmp_path / "f", minibatches=5))
    with pytest.raises(ValueError, match="reward_model: expected the output of the reward stage"):
        ppo.train(rl_config(files, files["model"], tmp_path / "g"))
    with pytest.raises(ValueError, match="no pair"):
        reward.train(toy.config("reward", files, tmp_path / "d", data=files["answers"]))


def test_learning_rate_schedules(files, tmp_path):
    run = Run("sft", toy.config("sft", files, tmp_path / "run", warmup_steps=2, schedule="linear"))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = [run.set_learning_rate(optimizer, step, 6) / 1e-2 for step in range(6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    run.config.schedule = "cosine"
    assert run.set_learning_rate(optimizer, 4, 6) / 1e-2 == pytest.approx(0.5)
    assert math.isclose(optimizer.param_groups[0]["lr"], 5e-3)


def test_a_text_that_the_model_cannot_take_is_named(files):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=50, n_positions=8, n_layer=1, n_head=2, n_embd=16)
    for model in (GPT2LMHeadModel(shape), ScalarModel(GPT2LMHeadModel(shape).transformer)):
        check_fit(model, 0, [1] * 8, [49])
        with pytest.raises(
            ValueError, match=r"max_response_tokens: expected .* at most 8 .* got 9"
        ):
            check_fit(model, 0, [1], [1] * 9)
        for filler, ids in ((0, [3, 50]), (50, [3])):
            with pytest.raises(ValueError, match=r"tokenizer with ids below 50.*got 50"):
                check_fit(model, filler, ids)


def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    for name in ("outputs/typo", "/no/such/folder", "./typo", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such folder"):
            load_tokenizer(name)
    with pytest.raises(OSError, match="outputs: expected a folder with model and tokenizer"):
        load_tokenizer("outputs")


def test_scores_stay_float32_under_mixed_precision(files):
    """bfloat16 has 8 bits: scores of long training would tie."""
    model = load_scalar_model(files["model"]).eval()
    ids = torch.randint(3, 50, (4, 9))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        scores = model(ids, torch.ones_like(ids, dtype=torch.bool))
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_a_scalar_model_of_each_family():
    """The head reads hidden states of any transformer, whatever its configuration calls them."""
    from transformers import AutoModel, GPT2Config, Qwen2Config

    small = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    for shape in (GPT2Config(**small), Qwen2Config(**small, num_key_value_heads=1)):
        model = ScalarModel(AutoModel.from_config(shape))
        ids = torch.ones(2, 3, dtype=torch.int64)
        assert model(ids, torch.ones(2, 3, dtype=torch.bool)).shape == (2, 3)
