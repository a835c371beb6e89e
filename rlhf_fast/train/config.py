"""Every option of every stage, in one dataclass: defaults, YAML file, `--key value`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FORMATS = ("auto", "hh", "gsm8k_solutions", "gsm8k", "instruction", "ranked", "hhh", "text")


class Help(Exception):
    """`--help` was asked for; the text is the message."""


def _option(default: Any, text: str, *, choices: Sequence[str] = (), low: float | None = None):
    return field(default=default, metadata={"help": text, "choices": choices, "low": low})


@dataclass
class Config:
    """Options of all stages; a stage ignores those it has no use for."""

    # run
    output: str = _option("", "folder of checkpoints, metrics.jsonl and report.html")
    resume: bool = _option(False, "continue from the last complete checkpoint in output")
    overwrite: bool = _option(False, "delete a run that is already in output")
    seed: int = _option(0, "seed of everything random", low=0)
    threads: int = _option(0, "CPU threads of torch; 0 leaves torch's default", low=0)
    device: str = _option("auto", "where to train", choices=("auto", "cpu"))
    precision: str = _option(
        "no", "accelerate's mixed precision", choices=("no", "fp16", "bf16", "fp8")
    )
    progress: bool = _option(True, "progress bars")

    # models: a folder of save_pretrained, the output of an earlier stage, or a hub name
    model: str = _option("", "the model to start from (ppo: also the KL reference)")
    reward_model: str = _option("", "ppo, eval: output of the reward stage")
    value_from: str = _option(
        "reward", "ppo: what the value model starts from", choices=("reward", "policy")
    )

    # data: a local file (.gz or not), or hub-name[:split]
    data: str = _option("", "training records (sft, reward), prompts (ppo, sample), pairs (eval)")
    data_format: str = _option("auto", "format of data and eval_data", choices=FORMATS)
    eval_data: str = _option("", "held-out records; empty: a part of data is held out")
    eval_fraction: float = _option(0.05, "the part of data held out without eval_data", low=0.0)
    pretraining_data: str = _option("", "ppo: text of the pretraining gradient (ptx_coef)")
    template: str = _option("{prompt}", "how a record's prompt is put before the model")
    max_prompt_tokens: int = _option(256, "longer prompts lose their beginning", low=1)
    max_response_tokens: int = _option(256, "longer responses lose their end (and EOS)", low=1)

    # optimisation
    steps: int = _option(0, "optimiser steps (ppo: rollouts); 0: `epochs` over the data", low=0)
    stop_at: int = _option(0, "end early after this step; schedules still count `steps`", low=0)
    epochs: int = _option(1, "passes over the data where steps is 0", low=1)
    batch_size: int = _option(32, "prompts of a step, over all ranks", low=1)
    micro_batch: int = _option(8, "rows (reward: prompts) of a forward pass", low=1)
    learning_rate: float = _option(1e-4, "peak learning rate", low=0.0)
    schedule: str = _option(
        "constant", "learning rate after warmup", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = _option(0, "steps of linear warmup", low=0)
    weight_decay: float = _option(0.0, "AdamW's", low=0.0)
    adam_eps: float = _option(1e-8, "AdamW's; 1e-5 for ppo", low=0.0)
    max_grad_norm: float = _option(1.0, "clip of the gradient norm; 0 is off", low=0.0)

    # reward model
    margin: float = _option(0.0, "how far apart the ranking loss wants two scores")

    # rollouts
    prompt: str = _option("", "sample: one prompt instead of data")
    samples_per_prompt: int = _option(1, "completions of each prompt", low=1)
    max_new_tokens: int = _option(64, "length limit of a completion", low=1)
    temperature: float = _option(1.0, "of sampling, and of the log-probs in training", low=0.0)
    top_k: int = _option(0, "sample: keep the k likeliest tokens; 0 is off", low=0)
    top_p: float = _option(1.0, "sample: keep the smallest set of this mass", low=0.0)
    max_slots: int = _option(64, "sequences generated at the same time", low=1)

    # policy gradient
    algorithm: str = _option("ppo", "ppo stage", choices=("ppo", "a2c", "reinforce"))
    ppo_epochs: int = _option(4, "passes over a rollout (ppo only)", low=1)
    minibatches: int = _option(1, "optimiser steps of a pass (ppo only)", low=1)
    clip_low: float = _option(0.2, "the ratio is clipped below 1 - clip_low", low=0.0)
    clip_high: float | None = _option(None, "and above 1 + clip_high; none: as clip_low", low=0.0)
    dual_clip: float | None = _option(None, "bound of the loss at negative advantages", low=1.0)
    value_clip: float | None = _option(0.2, "how far a value may move in a step", low=0.0)
    value_coef: float = _option(0.1, "weight of the value loss", low=0.0)
    entropy_coef: float = _option(0.0, "weight of the entropy bonus (ppo only)")
    gamma: float = _option(1.0, "discount per token", low=0.0)
    lam: float = _option(0.95, "lambda of GAE", low=0.0)
    whiten: bool = _option(True, "whiten the advantages over all ranks")
    kl_coef: float = _option(0.05, "KL penalty per nat in the reward (the first, if adaptive)")
    kl_estimator: str = _option("k1", "of the penalty", choices=("k1", "abs", "k2", "k3"))
    kl_target: float | None = _option(
        None, "adapt kl_coef to this KL per sequence; none: fixed", low=0.0
    )
    kl_horizon: float = _option(10_000, "sequences over which the adaptation acts", low=1.0)
    missing_eos_penalty: float = _option(1.0, "taken off the score of an unfinished completion")
    ptx_coef: float = _option(0.0, "weight of the pretraining cross-entropy (PPO-ptx)", low=0.0)
    ptx_batch: int = _option(0, "pretraining rows per optimiser step; 0: one per response", low=0)
    gold: str = _option("", "module:function(prompt, response, finished), a reward to watch")

    # bookkeeping
    save_every: int = _option(50, "steps between checkpoints; the last step always saves", low=1)
    keep: int = _option(2, "checkpoints kept", low=1)
    eval_every: int = _option(0, "steps between evaluations; 0: first and last", low=0)
    eval_batches: int = _option(8, "held-out batches of an evaluation", low=1)

    def check(self) -> Config:
        """Self, if every value is allowed."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices, low = f.metadata["choices"], f.metadata["low"]
            if choices and value not in choices:
                raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name}: expected a finite number, got {value}")
            if low is not None and value is not None and value < low:
                raise ValueError(f"{f.name}: expected a number >= {low}, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in ]0, 1], got {self.top_p}")
        if not self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction: expected a number in [0, 1[, got {self.eval_fraction}"
            )
        if "{prompt}" not in self.template:
            raise ValueError(f"template: expected a text with {{prompt}}, got {self.template!r}")
        return self

    def need(self, stage: str, *names: str) -> Config:
        """Self, if each of `names` was given."""
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            raise ValueError(f"{stage} needs {', '.join('--' + name for name in missing)}")
        return self


_TYPES = typing.get_type_hints(Config)
# Where a stage's usual value is not the dataclass's.
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {"learning_rate": 5e-5, "batch_size": 16},
    "ppo": {"learning_rate": 1e-5, "adam_eps": 1e-5, "batch_size": 64},
    "sample": {"progress": False},
    "eval": {},
    "demo": {"seed": 0, "threads": 2, "output": "outputs/demo", "overwrite": True},
}


def keys() -> list[str]:
    """The names of all options."""
    return [f.name for f in dataclasses.fields(Config)]


def _unknown(key: str, where: str) -> ValueError:
    near = difflib.get_close_matches(key, keys(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ValueError(f"{where}: unknown key {key!r}{hint}; expected one of {', '.join(keys())}")


def _kind(key: str) -> tuple[type, bool]:
    """The type of an option, and whether it may be None."""
    hint = _TYPES[key]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def convert(key: str, value: Any, where: str) -> Any:
    """`value` as the type of option `key`; texts are read as numbers and truth values."""
    kind, optional = _kind(key)
    if optional and (value is None or str(value).lower() in ("none", "null", "")):
        return None
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if key == "precision" and value is False:
        return "no"  # YAML reads an unquoted `no` as false
    try:
        if kind in (int, float) and isinstance(value, str):
            return kind(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    if type(value) is not kind:
        wanted = {bool: "true or false", str: "a text"}.get(kind, f"a number ({kind.__name__})")
        raise TypeError(f"{where}: {key}: expected {wanted}, got {value!r}")
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file: a flat mapping of keys to values."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {loaded!r}")
    for key in loaded:
        if key not in _TYPES:
            raise _unknown(str(key), str(path))
    return {key: convert(key, value, str(path)) for key, value in loaded.items()}


def write_yaml(config: Config, path: Path) -> None:
    """The options of `config`, as `read_yaml` reads them; those of one call only are left out."""
    values = dataclasses.asdict(config)
    for name in ("resume", "overwrite", "stop_at"):
        del values[name]
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def _overrides(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(--config's file, overrides) from `--key value`, `--key=value`, or `--flag` of a bool."""
    file, found, i = "", {}, 0
    while i < len(argv):
        name, equals, value = argv[i].partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise ValueError(f"command line: expected --key value, got {argv[i]!r}")
        key = name[2:].replace("-", "_")
        if key == "help":
            raise Help
        if key not in _TYPES and key != "config":
            raise _unknown(key, "command line")
        following = argv[i + 1] if i + 1 < len(argv) else None
        if not equals:
            flag = key != "config" and _kind(key)[0] is bool
            if flag and (following is None or following.lower() not in ("true", "false")):
                value = "true"
            elif following is None or following.startswith("--"):
                raise ValueError(f"command line: {name} needs a value ({name}=... if it begins so)")
            else:
                value, i = following, i + 1
        if key == "config":
            file = value
        else:
            found[key] = convert(key, value, "command line")
        i += 1
    return file, found


def usage(stage: str) -> str:
    """What `--help` prints."""
    defaults = {"output": f"outputs/{stage}"} | STAGE_DEFAULTS[stage]
    lines = [f"usage: rlhf-fast {stage} [--config file.yaml] [--key value ...]", ""]
    for f in dataclasses.fields(Config):
        kind, optional = _kind(f.name)
        what = "|".join(f.metadata["choices"]) or kind.__name__ + ("|none" if optional else "")
        default = defaults.get(f.name, f.default)
        lines.append(f"  --{f.name} {what}".ljust(34) + f" {f.metadata['help']} [{default}]")
    return "\n".join(lines)


def parse(stage: str, argv: Sequence[str]) -> Config | None:
    """The configuration of a stage; None after `--help`.

    Later ones win: the dataclass, the stage's defaults, with `--resume` the run's own config.yaml,
    `--config`'s file, the command line.
    """
    try:
        file, overrides = _overrides(argv)
    except Help:
        print(usage(stage))
        return None
    values: dict[str, Any] = {"output": f"outputs/{stage}"} | STAGE_DEFAULTS[stage]
    given = read_yaml(file) if file else {}
    given |= overrides
    saved = Path(given.get("output", values["output"])) / "config.yaml"
    if given.get("resume") and saved.is_file():
        values |= read_yaml(saved)
    return Config(**(values | given)).check()
