"""Checkpoints: a resumed run is bit for bit the uninterrupted one, and a killed one is readable."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_fast import cli
from rlhf_fast.train import ppo, reward, run, sft
from tests import train_fixtures as toy

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"sft": sft, "reward": reward, "ppo": ppo}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toy.make(tmp_path_factory.mktemp("toy"))


def options_of(case, files):
    """(stage, options) of a named case."""
    stage, _, algorithm = case.partition(" ")
    options = {}
    if stage == "ppo":
        options = {
            "reward_model": files["judge"], "algorithm": algorithm or "ppo", "kl_target": 0.5,
            "kl_horizon": 8.0, "minibatches": 2, "ppo_epochs": 2,
        }  # fmt: skip
        if not algorithm:
            options |= {"ptx_coef": 0.1, "pretraining_data": files["text"]}
    return stage, options


@pytest.mark.parametrize("case", ["sft", "reward", "ppo", "ppo a2c", "ppo reinforce"])
def test_four_steps_are_two_and_two(files, tmp_path, case):
    stage, options = options_of(case, files)
    train = STAGES[stage].train
    whole = train(toy.config(stage, files, tmp_path / "whole", **options))
    train(toy.config(stage, files, tmp_path / "parts", **options, stop_at=2))
    torch.manual_seed(12345)  # what the process did in between is no matter
    parts = train(toy.config(stage, files, tmp_path / "parts", **options, resume=True))
    assert whole == parts and any(name.endswith("_before") for name in whole)
    assert toy.same_model(tmp_path / "whole", tmp_path / "parts")
    assert toy.metrics(tmp_path / "whole") == toy.metrics(tmp_path / "parts")


def test_a_checkpoint_that_was_not_finished_is_not_used(files, tmp_path, monkeypatch):
    sft.train(toy.config("sft", files, tmp_path / "whole"))
    saves = []

    def torn(self, folder, **options):
        saves.append(folder)
        if len(saves) == 2:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        return original(self, folder, **options)

    original = run.Accelerator.save_state
    monkeypatch.setattr(run.Accelerator, "save_state", torn)
    with pytest.raises(KeyboardInterrupt):
        sft.train(toy.config("sft", files, tmp_path / "torn"))
    monkeypatch.undo()
    names = [p.name for p in (tmp_path / "torn" / "checkpoints").glob("step-*")]
    assert names == ["step-00002"]
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    sft.train(toy.config("sft", files, tmp_path / "torn", resume=True))
    assert toy.same_model(tmp_path / "whole", tmp_path / "torn")
    assert toy.metrics(tmp_path / "whole") == toy.metrics(tmp_path / "torn")


def test_kill_and_resume(files, tmp_path):
    """kill -9 while steps are taken; --resume goes on from the last complete checkpoint."""
    arguments = [
        "sft", "--model", files["model"], "--data", files["answers"], "--device", "cpu",
        "--output", str(tmp_path / "run"), "--steps", "100000", "--batch_size", "4",
        "--save_every", "1", "--progress", "false",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_fast", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    limit = time.monotonic() + 240
    while not list(checkpoints.glob("step-*")) and time.monotonic() < limit:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = max(int(p.name[5:]) for p in checkpoints.glob("step-*"))
    arguments = ["sft", "--output", str(tmp_path / "run"), "--resume", "--stop_at", str(done + 2)]
    assert cli.main(arguments) == 0
    steps = [line["step"] for line in toy.metrics(tmp_path / "run")]
    assert steps == list(range(1, done + 3))
    assert (tmp_path / "run" / "report.html").exists()


def test_old_checkpoints_go(files, tmp_path):
    sft.train(toy.config("sft", files, tmp_path / "run", steps=6, save_every=1, keep=2))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00005", "step-00006"]


def test_a_run_is_not_overwritten_unasked(files, tmp_path):
    output = tmp_path / "run"
    sft.train(toy.config("sft", files, output, steps=1))
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output: expected a folder without a run.*--resume"):
        sft.train(toy.config("sft", files, output, steps=1))
    sft.train(toy.config("sft", files, output, steps=2, overwrite=True))
    assert [line["step"] for line in toy.metrics(output)] == [1, 2]
    assert (output / "notes.txt").read_text() == "mine"


def test_a_finished_run_resumes_to_what_it_was(files, tmp_path):
    """Nothing is trained again, what was found is found again."""
    config = toy.config("reward", files, tmp_path / "run")
    found = reward.train(config)
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    config.resume = True
    assert reward.train(config) == found
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("case", ["sft", "reward", "ppo"])
def test_a_finished_run_can_be_extended(files, tmp_path, case):
    """With the default schedule, two steps and two more are four."""
    stage, options = options_of(case, files)
    train = STAGES[stage].train
    train(toy.config(stage, files, tmp_path / "whole", **options))
    train(toy.config(stage, files, tmp_path / "parts", **options, steps=2))
    train(toy.config(stage, files, tmp_path / "parts", **options, resume=True))
    assert toy.same_model(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_failed_before_its_first_step_is_no_run(files, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sft.train(toy.config("sft", files, output, model=str(tmp_path / "typo")))
    assert (output / "config.yaml").exists()
    sft.train(toy.config("sft", files, output, steps=1))


def test_resume_without_a_checkpoint_starts_at_the_beginning(files, tmp_path, capsys):
    sft.train(toy.config("sft", files, tmp_path / "run", steps=1, resume=True))
    assert [line["step"] for line in toy.metrics(tmp_path / "run")] == [1]


def test_two_processes_take_the_steps_of_one(files, tmp_path):
    """Data parallel over gloo: the same losses and, but for rounding, the same weights."""
    from safetensors.torch import load_file

    model = toy.without_dropout(files, tmp_path / "plain")
    for name, ranks in (("one", 1), ("two", 2)):
        arguments = [
            "sft", "--model", model, "--data", files["answers"], "--device", "cpu",
            "--output", str(tmp_path / name), "--steps", "3", "--batch_size", "4",
            "--micro_batch", "1", "--learning_rate", "0.01", "--progress", "false",
            "--eval_fraction", "0.01",  # one text: the second rank has none to evaluate
        ]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        result = subprocess.run(
            [sys.executable, *(launcher if ranks > 1 else []), "-m", "rlhf_fast", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = ([line["loss"] for line in toy.metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")
    ]
    for key, value in weights[0].items():
        assert torch.allclose(value, weights[1][key], atol=2e-3), key


def test_ppo_over_two_processes(files, tmp_path):
    arguments = [
        "ppo", "--model", files["model"], "--reward_model", files["judge"], "--data",
        files["answers"], "--device", "cpu", "--output", str(tmp_path / "run"), "--steps", "2",
        "--batch_size", "4", "--micro_batch", "2", "--max_new_tokens", "6", "--ptx_coef", "0.1",
        "--pretraining_data", files["text"], "--ptx_batch", "3", "--eval_batches", "1",
        "--max_prompt_tokens", "12", "--max_response_tokens", "12", "--progress", "false",
        "--eval_fraction", "0.2",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "rlhf_fast", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = toy.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
