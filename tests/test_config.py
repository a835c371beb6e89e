"""The configuration: YAML, overrides, what wins, and what errors say."""

import dataclasses
import math

import pytest

from rlhf_fast.train import config
from rlhf_fast.train.config import Config, parse, read_yaml, write_yaml


def test_defaults_are_allowed_and_documented():
    Config().check()
    for f in dataclasses.fields(Config):
        assert len(f.metadata["help"]) > 5, f.name
    for stage, defaults in config.STAGE_DEFAULTS.items():
        assert set(defaults) <= set(config.keys())
        assert parse(stage, []) == Config(**({"output": f"outputs/{stage}"} | defaults))


def test_command_line_forms():
    c = parse("ppo", [
        "--steps", "3", "--learning_rate=1e-3", "--kl-coef", "-0.5", "--clip_high", "none",
        "--kl_target", "6", "--progress", "false",
        "--prompt=--x = y", "--template", "Q: {prompt}\nA:",
    ])  # fmt: skip
    assert (c.steps, c.learning_rate, c.kl_coef, c.clip_high) == (3, 1e-3, -0.5, None)
    assert c.kl_target == 6.0 and isinstance(c.kl_target, float)
    assert c.progress is False and c.prompt == "--x = y" and c.template == "Q: {prompt}\nA:"


def test_flags_stand_alone_or_with_a_value():
    assert parse("ppo", ["--resume", "--steps", "1"]).resume is True
    assert parse("ppo", ["--steps", "1", "--overwrite"]).overwrite is True
    assert parse("ppo", ["--resume", "False"]).resume is False
    assert parse("ppo", ["--whiten=false"]).whiten is False


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--learnin_rate", "1"], ValueError, "unknown key 'learnin_rate'.*mean learning_rate"),
        (["--xyzzy", "1"], ValueError, "unknown key 'xyzzy'; expected one of output, resume"),
        (["steps", "1"], ValueError, "command line: expected --key value, got 'steps'"),
        (["-s", "1"], ValueError, "expected --key value, got '-s'"),
        (["--"], ValueError, "expected --key value, got '--'"),
        (["--steps"], ValueError, "--steps needs a value"),
        (["--output", "--resume"], ValueError, "--output needs a value"),
        (["--config"], ValueError, "--config needs a value"),
        (["--steps", "many"], TypeError, r"steps: expected a number \(int\), got 'many'"),
        (["--steps", "1.5"], TypeError, r"steps: expected a number \(int\), got '1.5'"),
        (["--kl_coef", "x"], TypeError, r"kl_coef: expected a number \(float\), got 'x'"),
        (["--resume=maybe"], TypeError, "resume: expected true or false, got 'maybe'"),
        (["--steps", "-1"], ValueError, "steps: expected a number >= 0, got -1"),
        (["--batch_size", "0"], ValueError, "batch_size: expected a number >= 1, got 0"),
        (["--kl_coef", "nan"], ValueError, "kl_coef: expected a finite number, got nan"),
        (["--kl_target", "inf"], ValueError, "kl_target: expected a finite number"),
        (["--dual_clip", "0.5"], ValueError, "dual_clip: expected a number >= 1"),
        (["--top_p", "1.5"], ValueError, r"top_p: expected a number in \]0, 1\], got 1.5"),
        (["--eval_fraction", "1"], ValueError, "eval_fraction: expected a number in"),
        (["--algorithm", "dpo"], ValueError, "algorithm: expected one of ppo, a2c, reinforce"),
        (["--template", "x"], ValueError, r"template: expected a text with \{prompt\}"),
    ],
)
def test_what_the_command_line_gets_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        parse("ppo", arguments)


def test_help(capsys):
    assert parse("ppo", ["--help"]) is None
    text = capsys.readouterr().out
    for name in config.keys():  # noqa: SIM118  (a function of the module)
        assert f"--{name} " in text
    assert "[1e-05]" in text and "[outputs/ppo]" in text and "ppo|a2c|reinforce" in text


def test_need():
    with pytest.raises(ValueError, match="ppo needs --model, --data"):
        parse("ppo", []).need("ppo", "model", "data")
    c = parse("ppo", ["--model", "m"])
    assert c.need("ppo", "model") is c


# --------------------------------------------------------------------------------------------- YAML


def test_yaml_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "learning_rate: 1e-4\nkl_coef: 0\nsteps: 7\nresume: true\nclip_high: null\n"
        "value_clip: 0.3\nprecision: no\ntemplate: 'Ü {prompt}'\nprompt: '12'\n",
        encoding="utf-8",
    )
    assert read_yaml(path) == {
        "learning_rate": 1e-4, "kl_coef": 0.0, "steps": 7, "resume": True, "clip_high": None,
        "value_clip": 0.3, "precision": "no", "template": "Ü {prompt}", "prompt": "12",
    }  # fmt: skip
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("- 1\n", ValueError, r"c.yaml: expected a mapping of keys to values, got \[1\]"),
        ("a: [", ValueError, "c.yaml: not valid YAML"),
        ("stepps: 1", ValueError, r"c.yaml: unknown key 'stepps' \(did you mean steps\?\)"),
        ("1: 1", ValueError, "c.yaml: unknown key '1'"),
        ("steps: [1]", TypeError, r"c.yaml: steps: expected a number \(int\), got \[1\]"),
        ("steps: 1.0", TypeError, "steps: expected a number"),
        ("steps: true", TypeError, "steps: expected a number"),
        ("steps:", TypeError, "steps: expected a number .*got None"),
        ("kl_coef: false", TypeError, "kl_coef: expected a number"),
        ("resume: 1", TypeError, "resume: expected true or false, got 1"),
        ("prompt: 12", TypeError, "prompt: expected a text, got 12"),
    ],
)
def test_what_a_yaml_file_gets_wrong(tmp_path, text, error, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(error, match=message):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match=r"no.yaml"):
        parse("sft", ["--config", str(tmp_path / "no.yaml")])


def test_written_yaml_reads_back(tmp_path):
    c = Config(
        learning_rate=1e-7, kl_target=None, template="a: 'b'\n{prompt} é", resume=True,
        overwrite=True, stop_at=7, clip_high=0.28,
    )  # fmt: skip
    write_yaml(c, tmp_path / "c.yaml")
    read = Config(**read_yaml(tmp_path / "c.yaml"))
    # What belongs to one call only does not come back with --resume.
    assert read == dataclasses.replace(c, resume=False, overwrite=False, stop_at=0)
    assert math.isclose(read.learning_rate, 1e-7)


def test_every_option_survives_yaml_and_command_line(tmp_path):
    write_yaml(Config(), tmp_path / "c.yaml")
    assert Config(**read_yaml(tmp_path / "c.yaml")) == Config()
    pairs = [(f.name, f.default) for f in dataclasses.fields(Config)]
    assert parse("eval", [f"--{name}={value}" for name, value in pairs]) == Config()


# ----------------------------------------------------------------------------------------- who wins


def test_later_ones_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\nlearning_rate: 0.5\n")
    c = parse("ppo", ["--config", str(file), "--steps", "6"])
    assert (c.steps, c.learning_rate, c.adam_eps, c.lam) == (6, 0.5, 1e-5, 0.95)
    c = parse("ppo", ["--steps", "6", f"--config={file}"])
    assert c.steps == 6  # wherever the file stands


def test_resume_takes_the_runs_own_options(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_yaml(Config(output=str(run), steps=9, seed=4, learning_rate=0.25), run / "config.yaml")
    file = tmp_path / "c.yaml"
    file.write_text(f"output: {run}\nseed: 5\n")
    c = parse("ppo", ["--output", str(run), "--resume"])
    assert (c.steps, c.seed, c.learning_rate, c.resume) == (9, 4, 0.25, True)
    assert c.adam_eps == Config.adam_eps  # the run's, not the stage's
    c = parse("ppo", ["--config", str(file), "--resume", "--steps", "20"])
    assert (c.steps, c.seed, c.learning_rate) == (20, 5, 0.25)
    # Without --resume the saved file is not looked at.
    c = parse("ppo", ["--output", str(run)])
    assert (c.steps, c.seed, c.learning_rate) == (0, 0, 1e-5)


def test_resume_of_a_run_that_was_never_started(tmp_path):
    c = parse("sft", ["--output", str(tmp_path / "new"), "--resume"])
    assert c.resume and c == Config(output=str(tmp_path / "new"), resume=True)


def test_resume_of_a_damaged_configuration_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: [")
    with pytest.raises(ValueError, match=r"config.yaml: not valid YAML"):
        parse("sft", ["--output", str(tmp_path), "--resume"])
