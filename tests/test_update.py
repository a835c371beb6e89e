"""An optimiser step of PPO: micro-batches and ranks, in one sweep over the head each, have the
gradients and the metrics of the whole batch by way of its log-probs."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rlhf_fast
from rlhf_fast import testing
from rlhf_fast.train import experience, ppo
from rlhf_fast.train.run import Run
from tests import train_fixtures as toy

OPTIONS = {
    "ppo": {},
    "ppo with all terms": {"entropy_coef": 0.05, "dual_clip": 1.5, "clip_high": 0.4},
    "a2c": {"algorithm": "a2c"},
    "reinforce": {"algorithm": "reinforce"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toy.make(tmp_path_factory.mktemp("toy"))


def config_of(files, output, name, micro_batch):
    options = OPTIONS[name] | {"micro_batch": micro_batch, "temperature": 0.8}
    return toy.config("ppo", files, output, reward_model=files["judge"], **options)


def rollout_of(run, actors):
    """Eight responses of two lengths, from which policy and values have moved since."""
    rollout = actors.collect(toy.PROMPTS[:8], 3, run.device)
    length = rollout.ids.shape[1]
    rollout.mask[1::2, length // 2 :] = False
    rollout.sequence_mask[:, -length:] = rollout.mask
    moved = 0.5 * rollout.mask
    rollout.logprob = rollout.logprob + moved * testing.randn(*moved.shape, seed=1)
    rollout.values = rollout.values + moved * testing.randn(*moved.shape, seed=2)
    return rollout


def loss_of_logprobs(config, actors, rollout):
    """(loss, the statistics that are logged) of a rollout from log-probs in the graph."""
    wants = config.algorithm == "ppo" and config.entropy_coef != 0
    logprob, *more = experience.response_logprobs(
        actors.policy, rollout, config.temperature, entropy=wants
    )
    policy, mask = (logprob, rollout.logprob, rollout.advantages), rollout.mask
    if config.algorithm == "reinforce":
        out = rlhf_fast.policy_loss(*policy, mask, kind="reinforce")
        return out.loss, out.stats_dict()
    value = (experience.response_values(actors.value, rollout), rollout.values, rollout.returns)
    if config.algorithm == "a2c":
        parts = (
            rlhf_fast.policy_loss(*policy, mask, kind="a2c"),
            rlhf_fast.value_loss(*value, mask, clip=config.value_clip),
        )
        stats = dict(zip(rlhf_fast.Loss.stats_names, sum(p.stats for p in parts), strict=True))
        return parts[0].loss + config.value_coef * parts[1].loss, stats
    out = rlhf_fast.ppo_loss(
        *policy, *value, mask, clip_low=config.clip_low, clip_high=config.clip_high,
        dual_clip=config.dual_clip, value_clip=config.value_clip, value_coef=config.value_coef,
        entropy=more[0] if more else None, entropy_coef=config.entropy_coef,
    )  # fmt: skip
    return out.loss, out.stats_dict()


def expected_update(run, actors, rollout):
    """(gradients, statistics) of the whole rollout."""
    loss, stats = loss_of_logprobs(run.config, actors, rollout)
    loss.backward()
    capture = toy.Capture(actors.policy, actors.value)
    capture(None)
    return capture.found, {name: float(x) for name, x in stats.items()}


def assert_same_update(metrics, found, stats, expected):
    for name in ("policy_loss", "value_loss", *ppo.LOGGED):
        assert metrics[name] == pytest.approx(stats[name], rel=2e-5, abs=1e-6), name
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batches(files, tmp_path, name, micro_batch):
    config = config_of(files, tmp_path / "run", name, micro_batch)
    run = Run("ppo", config)
    actors = toy.actors(files, files["judge"], config)
    rollout = rollout_of(run, actors)
    ppo.add_advantages(run, rollout, 0.1)
    run.update = capture = toy.Capture(actors.policy, actors.value)
    metrics = ppo.update(run, actors.policy, actors.value, None, rollout, [])
    expected, stats = expected_update(run, actors, rollout)
    assert_same_update(metrics, capture.found, stats, expected)
    if config.algorithm == "ppo":
        assert 0 < stats["clip_fraction"] < 1 and 0 < stats["value_clip_fraction"] < 1


def two_ranks(rank, files, name, folder):
    """One update of two processes, of which the first has the long responses."""
    torch.set_num_threads(1)
    # accelerate looks for these, and takes a process group that is there; no port is needed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    config = config_of(files, folder / "run", name, 3)
    run = Run("ppo", config)
    actors = toy.actors(files, files["judge"], config)
    whole = rollout_of(run, actors)
    ppo.add_advantages(run, whole, 0.1)  # of the same rows on both ranks
    expected, stats = expected_update(run, actors, whole)
    (policy, value), optimizer = run.prepare(actors.policy, actors.value)
    assert isinstance(policy, torch.nn.parallel.DistributedDataParallel)
    run.update = capture = toy.Capture(actors.policy, actors.value)
    part = whole.take(torch.arange(rank, 8, 2))
    metrics = ppo.update(run, policy, value, optimizer, part, [])
    assert_same_update(metrics, capture.found, stats, expected)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)
@pytest.mark.parametrize("name", ["ppo with all terms", "a2c"])
def test_two_ranks(files, tmp_path, name):
    mp.spawn(two_ranks, (files, name, tmp_path), nprocs=2)
