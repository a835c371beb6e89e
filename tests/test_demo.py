"""The whole pipeline, cut short, and the stages that use its models."""

import json
from pathlib import Path

import pytest
import torch

from rlhf_fast import cli
from rlhf_fast.train import evaluate, ops
from rlhf_fast.train.config import Config
from tests import train_fixtures as toy

HHH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hhh_alignment_eval.json.gz"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo of two steps per stage."""
    output = tmp_path_factory.mktemp("demo") / "out"
    options = ["--steps", "2", "--progress", "false", "--threads", "1", "--device", "cpu"]
    assert cli.main(["demo", "--output", str(output), *options]) == 0
    return output


def test_every_stage_leaves_a_model_metrics_and_a_report(demo):
    for stage in ("base", "sft", "reward", "ppo"):
        folder = demo / stage
        assert (folder / "model" / "tokenizer.json").exists()
        assert (folder / "report.html").stat().st_size > 10_000
        assert [m["step"] for m in toy.metrics(folder) if m["step"]] == [1, 2]
    first, *_, last = toy.metrics(demo / "ppo")
    assert {"eval_score", "eval_gold", "eval_kl"} <= first.keys() & last.keys()
    assert {"ptx_loss", "kl_coef", "clip_fraction", "entropy", "gold", "score"} <= last.keys()
    ranked = [
        json.loads(line) for line in (demo / "data" / "ranked.jsonl").read_text().splitlines()
    ]
    assert len(ranked) == 50 and all(len(row["completions"]) == 4 for row in ranked)


def test_the_ops_agree_with_plain_pytorch(demo):
    lines = ops.table(demo).splitlines()[1:]
    assert [line.split(",")[0].split()[0] for line in lines] == [
        "linear_logprob", "logprob", "logprob_entropy", "shaped_rewards", "gae", "whiten",
        "ppo_loss", "sample", "ranking_loss",
    ]  # fmt: skip
    assert all(float(line.split()[-1]) < 1e-4 for line in lines)


def test_sample(demo, tmp_path, capsys):
    arguments = ["sample", "--model", str(demo / "sft"), "--output", str(tmp_path / "s")]
    options = ["--samples_per_prompt", "2", "--max_new_tokens", "6", "--top_k", "5"]
    assert cli.main([*arguments, "--prompt", "os.getcwd()\n", *options]) == 0
    lines = (tmp_path / "s" / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2 and all(row["prompt"] == "os.getcwd()\n" for row in rows)
    assert rows[0]["completion"] != rows[1]["completion"] and rows[0]["logprob"] < 0
    assert "os.getcwd()" in capsys.readouterr().out
    again = tmp_path / "again"
    arguments[-1] = str(again)
    assert cli.main([*arguments, "--data", str(demo / "data" / "held_out.jsonl"), *options]) == 0
    assert len((again / "completions.jsonl").read_text().splitlines()) > 600
    assert cli.main(["sample", "--model", str(demo / "sft")]) == 2


def test_eval_prefers_by_score_and_by_log_probability(demo, tmp_path, capsys):
    data = str(demo / "data" / "ranked_held_out.jsonl")
    arguments = ["eval", "--data", data, "--output", str(tmp_path / "e"), "--progress", "false"]
    models = ["--reward_model", str(demo / "reward"), "--model", str(demo / "sft")]
    assert cli.main([*arguments, *models]) == 0
    found = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert set(found) == {"reward model", "log-prob, sum", "log-prob, mean per token"}
    for by_category in found.values():
        assert 0 <= by_category["total"]["accuracy"] <= 1 and by_category["total"]["pairs"] > 100
    assert cli.main(arguments) == 2
    assert "--reward_model or --model" in capsys.readouterr().err


def test_accuracy_by_category_counts_every_pair():
    records = [
        evaluate.Record("a", ("good", "bad"), (0, 1), "honest"),
        evaluate.Record("b", ("x", "y", "z"), (0, 0, 1), "harmless"),
    ]
    right = {"good": 1.0, "bad": 0.0, "x": 1.0, "y": 2.0, "z": 1.0}

    class Tokenizer:
        eos_token_id = 0

        def __call__(self, text, **_):
            return type("Ids", (), {"input_ids": [text]})()

    def score(examples):
        return {"rule": torch.tensor([right[e.ids[e.prompt]] for e in examples])}

    found = list(evaluate.preferences(Config(progress=False), records, Tokenizer(), score))
    assert found == [
        ("rule", "honest", 1.0), ("rule", "harmless", 0.5), ("rule", "harmless", 1.0),
    ]  # fmt: skip


@pytest.mark.skipif(not HHH.exists(), reason="the HHH evaluation is not beside the repository")
def test_helpful_honest_harmless(demo, tmp_path):
    arguments = ["eval", "--data", str(HHH), "--output", str(tmp_path), "--progress", "false"]
    short = ["--max_prompt_tokens", "64", "--max_response_tokens", "64"]
    assert cli.main([*arguments, *short, "--reward_model", str(demo / "reward")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["reward model"]
    counts = {name: row["pairs"] for name, row in found.items()}
    assert counts["total"] == 221 and counts["honest"] == 61 and counts["helpful"] == 59
