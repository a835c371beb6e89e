"""Presets against each project's formulas, written here as loops in float64."""

import inspect
import math

import pytest
import torch

import rlhf_fast
from rlhf_fast import preset
from rlhf_fast.testing import assert_accurate, randn

NAMES = ("trl", "verl", "openrlhf", "openai", "deepspeed")
B, T = 4, 9
GAMMA, LAM, KL = 0.97, 0.9, 0.07


def batch(*, holes: bool = False) -> dict[str, torch.Tensor]:
    """A rollout in float64: right padding, and tokens of a tool inside the rows (`holes`)."""
    lengths = torch.tensor([9, 5, 7, 1])
    mask = torch.arange(T) < lengths[:, None]
    if holes:
        mask[0, 3:5] = mask[2, 2] = False
    logprob = -0.2 - randn(B, T, seed=1, dtype=torch.float64).abs()
    return {
        "mask": mask,
        "logprob": logprob,
        "ref": logprob + 0.4 * randn(B, T, seed=2, dtype=torch.float64),
        "old": logprob + 0.3 * randn(B, T, seed=3, dtype=torch.float64),
        "values": randn(B, T, seed=4, dtype=torch.float64),
        "old_values": randn(B, T, seed=5, dtype=torch.float64),
        "scores": randn(B, seed=6, dtype=torch.float64),
    }


def rewards_of(d: dict[str, torch.Tensor], kl: torch.Tensor) -> torch.Tensor:
    """-coefficient x KL, and the score on the last token that counts."""
    rewards = torch.where(d["mask"], -KL * kl, 0.0)
    for b in range(B):
        last = max(t for t in range(T) if d["mask"][b, t])
        rewards[b, last] += d["scores"][b]
    return rewards


def gae_of_zeros(rewards, values, mask):
    """TRL, OpenRLHF, OpenAI, DeepSpeed-Chat: zeros behind the mask, the loop runs through them."""
    rewards, values, last = rewards * mask, values * mask, torch.zeros(B, dtype=torch.float64)
    columns = []
    for t in reversed(range(T)):
        following = values[:, t + 1] if t + 1 < T else 0.0
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        columns.insert(0, last)
    advantages = torch.stack(columns, 1)
    return advantages, advantages + values


def gae_that_carries(rewards, values, mask):
    """verl: a token that does not count leaves the next value and the trace as they were."""
    following, last = torch.zeros(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    columns = []
    for t in reversed(range(T)):
        counts = mask[:, t].double()
        new = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        following = values[:, t] * counts + (1 - counts) * following
        last = new * counts + (1 - counts) * last
        columns.insert(0, last)
    advantages = torch.stack(columns, 1)
    return advantages, advantages + values


def whitened(x, mask, *, ddof):
    kept = [x[b, t] for b in range(B) for t in range(T) if mask[b, t]]
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / (len(kept) - ddof)
    return (x - mean) / math.sqrt(variance + 1e-8)


GAE = dict.fromkeys(NAMES, gae_of_zeros) | {"verl": gae_that_carries}
DDOF = {"trl": 1, "verl": 1, "openrlhf": 0, "openai": 0}


def same(name, ours, truth, mask=None):
    assert_accurate(name, ours, truth if mask is None else torch.where(mask, truth, 0.0))


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_accepted_by_its_op(name):
    for op, keywords in preset(name).items():
        parameters = inspect.signature(getattr(rlhf_fast, op)).parameters
        assert set(keywords) <= set(parameters), op
        assert all(parameters[k].kind is inspect.Parameter.KEYWORD_ONLY for k in keywords)


def test_presets_are_fresh_and_their_names_are_listed():
    preset("verl")["gae"]["mask_mode"] = "changed"
    preset("verl")["ppo_loss"].clear()
    assert preset("verl")["gae"] == {"mask_mode": "carry"} and preset("verl")["ppo_loss"]
    with pytest.raises(ValueError, match="trl, verl, openrlhf, openai, deepspeed, got 'TRL'"):
        preset("TRL")


@pytest.mark.parametrize("name", NAMES)
def test_gae(name):
    d = batch(holes=name == "verl")
    rewards = torch.where(d["mask"], randn(B, T, seed=7, dtype=torch.float64), 0.0)
    advantages, returns = rlhf_fast.gae(
        rewards, d["values"], gamma=GAMMA, lam=LAM, mask=d["mask"], **preset(name).get("gae", {})
    )
    expected = GAE[name](rewards, d["values"], d["mask"])
    same("advantages", advantages, expected[0], d["mask"])
    same("returns", returns, expected[1], d["mask"])


@pytest.mark.parametrize("name", NAMES)
def test_whiten(name):
    d = batch()
    if name == "deepspeed":  # never whitens
        assert "whiten" not in preset(name) and preset(name)["ppo_advantages"]["whiten"] is False
        return
    out = rlhf_fast.whiten(d["values"], d["mask"], **preset(name)["whiten"])
    same("whiten", out, whitened(d["values"], d["mask"], ddof=DDOF[name]), d["mask"])


def kl_of(name: str, estimator: str, difference: torch.Tensor) -> torch.Tensor:
    d = difference
    if name == "verl" and estimator == "k3":
        d = d.clamp(-20, 20)
    kl = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
    clamped = name == "openrlhf" or (name == "verl" and estimator == "k3")
    return kl.clamp(-10, 10) if clamped else kl


@pytest.mark.parametrize(
    ("name", "estimator"),  # verl's entry is for k3, the only one that it clamps
    [(n, e) for n in NAMES for e in ("k1", "k2", "k3") if n != "verl" or e == "k3"],
)
def test_kl_estimate(name, estimator):
    difference = torch.tensor([-25.0, -15.0, -3.0, -0.1, 0.0, 0.7, 4.0, 12.0, 30.0]).double()
    out = rlhf_fast.kl_estimate(
        difference - 40, torch.full_like(difference, -40), estimator=estimator,
        **preset(name)["kl_estimate"],
    )  # fmt: skip
    truth = kl_of(name, estimator, difference)
    for k in range(len(difference)):
        same(f"{estimator} of {difference[k]}", out[k], truth[k])


def test_measured_values_of_openrlhf():
    """Numbers that OpenRLHF 0.11.2 gives."""
    lp, ref = torch.tensor([-1.0, -30.0]), torch.tensor([-1.5, -1.0])
    options = preset("openrlhf")["kl_estimate"]
    for estimator, expected in (("k1", (0.5, -10.0)), ("k2", (0.125, 10)), ("k3", (0.1065, 10))):
        out = rlhf_fast.kl_estimate(lp, ref, estimator=estimator, **options)
        torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_shaped_rewards_and_all_of_it_in_one_launch(name):
    d = batch(holes=name == "verl")
    kl = kl_of(name, "k1", d["logprob"] - d["ref"])
    expected = rewards_of(d, kl)
    inputs = (d["scores"], d["logprob"], d["ref"])
    rewards, _ = rlhf_fast.shaped_rewards(
        *inputs, d["mask"], kl_coef=KL, **preset(name).get("shaped_rewards", {})
    )
    same("rewards", rewards, expected)
    out = rlhf_fast.ppo_advantages(
        *inputs, d["values"], d["mask"], kl_coef=KL, gamma=GAMMA, lam=LAM,
        **preset(name).get("ppo_advantages", {}),
    )  # fmt: skip
    advantages, returns = GAE[name](expected, d["values"], d["mask"])
    if name != "deepspeed":
        advantages = whitened(advantages, d["mask"], ddof=DDOF[name])
    same("rewards", out.rewards, expected)
    same("kl", out.kl, kl, d["mask"])
    same("advantages", out.advantages, advantages, d["mask"])
    same("returns", out.returns, returns, d["mask"])


@pytest.mark.parametrize(("name", "eps"), [("trl", 1e-4), ("verl", 1e-6), ("openrlhf", 1e-9)])
def test_group_advantages(name, eps):
    scores = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 1.0 + 1e-5]).double()
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    out = rlhf_fast.group_advantages(scores, groups, **preset(name)["group_advantages"])
    expected = torch.empty_like(scores)
    for g in (0, 1):
        r = scores[groups == g]
        std = math.sqrt(sum((v - r.mean()) ** 2 for v in r) / (len(r) - 1))
        expected[groups == g] = (r - r.mean()) / (std + eps)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_losses(name):
    d = batch()
    mask, count = d["mask"], d["mask"].sum()
    advantages = 3 * randn(B, T, seed=8, dtype=torch.float64)
    returns = randn(B, T, seed=9, dtype=torch.float64)
    old = d["old"] - torch.where(advantages < -3, 2.0, 0.0)  # ratios that reach the dual clip
    rho = (d["logprob"] - old).exp()
    policy = torch.maximum(-advantages * rho, -advantages * rho.clamp(0.8, 1.2))
    if name == "verl":
        bound = torch.minimum(policy, -3.0 * advantages)
        assert (bound < policy)[mask & (advantages < 0)].any()
        policy = torch.where(advantages < 0, bound, policy)
    near = d["old_values"] + (d["values"] - d["old_values"]).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((d["values"] - returns) ** 2, (near - returns) ** 2)
    policy, value = (torch.where(mask, x, 0.0).sum() / count for x in (policy, value))
    presets = preset(name)
    tokens, states = (d["logprob"], old, advantages), (d["values"], d["old_values"], returns)
    ours = rlhf_fast.policy_loss(*tokens, mask, **presets.get("policy_loss", {})).loss
    same("policy", ours, policy)
    ours = rlhf_fast.value_loss(*states, mask, **presets.get("value_loss", {})).loss
    same("value", ours, value)
    ours = rlhf_fast.ppo_loss(
        *tokens, *states, mask, value_coef=0.5, **presets.get("ppo_loss", {})
    ).loss
    same("both", ours, policy + 0.5 * value)
