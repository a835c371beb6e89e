"""The command line: what it prints, and how it fails."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from rlhf_fast import _dispatch, cli, doctor

ROOT = Path(__file__).resolve().parents[1]


def test_info_names_every_op_and_every_reason(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for op, states in _dispatch.backends().items():
        assert op in text
        for state in states.values():
            assert state is True or state in text
    for fact in ("torch", "triton", "threads", "instruction set", "native module"):
        assert fact in text


def test_module_and_help():
    result = subprocess.run(
        [sys.executable, "-m", "rlhf_fast", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    for command in (*cli.STAGES, "bench", "doctor", "info"):
        assert command in result.stdout


def stage(monkeypatch, behaviour):
    module = types.ModuleType("rlhf_fast.train.ppo")
    module.main = behaviour
    monkeypatch.setitem(sys.modules, "rlhf_fast.train.ppo", module)


def test_stage_gets_its_arguments(monkeypatch):
    seen = []
    stage(monkeypatch, lambda argv: seen.append(argv))
    assert cli.main(["ppo", "--config", "a.yaml", "--lr", "-1"]) == 0
    assert seen == [["--config", "a.yaml", "--lr", "-1"]]


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, NotImplementedError, TypeError])
def test_a_users_error_is_one_line(monkeypatch, capsys, error):
    def fail(argv):
        raise error("lr: expected a positive number,\n got -1")

    stage(monkeypatch, fail)
    assert cli.main(["ppo"]) == 2
    assert capsys.readouterr().err == "rlhf-fast ppo: lr: expected a positive number, got -1\n"
    with pytest.raises(error):
        cli.main(["ppo", "--debug"])


def test_our_errors_keep_their_traceback(monkeypatch):
    def fail(argv):
        raise RuntimeError("a bug")

    stage(monkeypatch, fail)
    with pytest.raises(RuntimeError):
        cli.main(["ppo"])


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    stage(monkeypatch, interrupt)
    assert cli.main(["ppo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def fail(argv):
        import no_such_package  # noqa: F401

    stage(monkeypatch, fail)
    assert cli.main(["ppo"]) == 2
    assert "rlhf_fast[train]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["bench", "--op", "nothing"], ["doctor", "no-such-file.pt"], ["bench", "--fast"]]
)
def test_wrong_use_is_exit_code_2(arguments, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert "rlhf-fast" in capsys.readouterr().err


def good_batch() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    logprob = -torch.rand(2, 4) - 0.1
    rewards = torch.tensor([[0, 0, 2.0, 0], [0, 0, 0, -1.0]])
    advantages = torch.tensor([[1.0, -1.0, 0.5, 0.0], [-0.5, 1.2, -1.2, 0.0]])
    count = advantages[mask != 0]
    advantages = (advantages - count.mean()) / count.std() * mask
    return {
        "mask": mask,
        "logprobs": logprob,
        "old_log_probs": logprob.clone(),
        "ref_logprob": logprob - 0.1,
        "values": torch.zeros(2, 4),
        "rewards": rewards,
        "advantages": advantages,
        "returns": advantages.clone(),
        "responses": torch.tensor([[5, 6, 2, 0], [7, 8, 9, 2]]),
    }


def findings(batch, tmp_path, **options) -> dict[str, list[str]]:
    torch.save(batch, tmp_path / "batch.pt")
    table: dict[str, list[str]] = {"ok": [], "note": [], "bad": []}
    for level, about, _ in doctor.examine(doctor.load(tmp_path / "batch.pt"), **options):
        table[level].append(about)
    return table


def test_doctor_finds_nothing_wrong_with_a_good_batch(tmp_path, capsys):
    table = findings(good_batch(), tmp_path, eos_id=2, pad_id=0)
    assert table["bad"] == [] and table["note"] == []
    assert {"mask", "ratio", "kl", "rewards", "advantages", "returns", "eos"} <= set(table["ok"])
    assert cli.main(["doctor", str(tmp_path / "batch.pt"), "--eos-id", "2"]) == 0
    assert "0 bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("about", "change"),
    [
        ("ratio", lambda b: b["logprobs"].sub_(0.7)),
        ("kl", lambda b: b["ref_logprob"].add_(0.5).clamp_(max=0)),
        ("old_logprob", lambda b: b["old_log_probs"].add_(5)),
        ("rewards", lambda b: b["rewards"][0].copy_(torch.tensor([0, 0, 0, 1.0]))),
        ("values", lambda b: b["values"][0].fill_(torch.nan)),
        ("advantages", lambda b: b["advantages"].fill_(1.0)),
        ("eos", lambda b: b["responses"][1].copy_(torch.tensor([2, 8, 9, 2]))),
        ("eos", lambda b: b["responses"][0].copy_(torch.tensor([5, 6, 4, 2]))),
        ("pad", lambda b: b["responses"][1, 0].fill_(0)),
        ("mask", lambda b: b["mask"].zero_()),
        ("shape", lambda b: b.update(values=torch.zeros(2, 3))),
    ],
)
def test_doctor_finds_what_is_wrong(tmp_path, about, change):
    batch = good_batch()
    change(batch)
    assert about in findings(batch, tmp_path, eos_id=2, pad_id=0)["bad"]


def test_doctor_explains_nan_under_the_mask(tmp_path):
    batch = good_batch()
    batch["values"][0, 3] = torch.nan
    table = findings(batch, tmp_path)
    assert "values" in table["note"] and table["bad"] == []


def test_doctor_reads_safetensors_and_refuses_other_content(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(good_batch(), tmp_path / "batch.safetensors")
    assert set(doctor.load(tmp_path / "batch.safetensors")) == set(doctor.NAMES)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="dict of tensors"):
        doctor.load(tmp_path / "list.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="one of the keys"):
        doctor.load(tmp_path / "other.pt")


def test_doctor_checks_the_installation(capsys):
    assert cli.main(["doctor", "--backend", "reference"]) == 0
    text = capsys.readouterr().out
    for op in _dispatch.backends():
        assert op in text


def test_bench_writes_json(tmp_path, capsys):
    path = tmp_path / "new" / "bench.json"
    assert cli.main(["bench", "--quick", "--op", "logprob", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert set(content) == {"header", "rows"} and content["rows"]
    assert "logprob" in capsys.readouterr().out
