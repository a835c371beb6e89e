"""The whole pipeline on text that every Python carries: `rlhf-fast demo`.

    text -> base model -> SFT -> completions ranked by the gold reward -> reward model -> PPO-ptx

The model writes docstrings: a prompt is a signature, the response its summary. `corpus.gold`, a
reward by rules, stands for the human who ranks completions. The reward model sees the ranks only,
and PPO sees the reward model only, so that proxy and gold can be told apart. Every stage is the one
of the command line, with its folder under `output`. `--steps N` cuts every stage at N steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_fast
from rlhf_fast.train import batches, corpus, ops, ppo, reward, sft
from rlhf_fast.train.config import Config, parse
from rlhf_fast.train.data import Record
from rlhf_fast.train.models import load_causal_lm, load_tokenizer

COMPLETIONS = 4  # K of the ranked completions
RANKED_PROMPTS = 1000
GOLD = "rlhf_fast.train.corpus:gold"
COMMON: dict[str, Any] = {
    "max_prompt_tokens": 40,
    "max_response_tokens": 64,
    "max_new_tokens": 64,
    "save_every": 100,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {
        "steps": 150, "batch_size": 32, "micro_batch": 32, "learning_rate": 3e-3,
        "schedule": "cosine", "warmup_steps": 20, "eval_batches": 4,
    },
    "sft": {
        "steps": 200, "batch_size": 32, "micro_batch": 32, "learning_rate": 2e-3,
        "schedule": "cosine", "warmup_steps": 10, "eval_batches": 16,
    },
    "reward": {
        "steps": 60, "batch_size": 25, "micro_batch": 25, "learning_rate": 1e-3,
        "schedule": "cosine", "warmup_steps": 5, "eval_batches": 16,
    },
    "ppo": {
        "steps": 25, "batch_size": 64, "micro_batch": 32, "learning_rate": 3e-4,
        "schedule": "linear", "adam_eps": 1e-5, "ppo_epochs": 2, "minibatches": 2,
        "kl_coef": 0.1, "ptx_coef": 0.1, "ptx_batch": 16, "eval_batches": 4,
    },
}  # fmt: skip


def write_records(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def new_model(folder: Path) -> None:
    """A Llama with 1.5 million random weights; its tokenizer of 1024 tokens knows the text."""
    tokenizer = corpus.tokenizer(corpus.text().splitlines(), 1024)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rank_completions(config: Config, model: str, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """K sampled completions of each prompt with their ranks by gold reward, best first = 0."""
    tokenizer, policy = load_tokenizer(model), load_causal_lm(model)
    rows = []
    for number, part in enumerate(batches.chunks(list(prompts), 250)):
        out = rlhf_fast.generate(
            policy,
            [batches.encode_prompt(tokenizer, config, prompt) for prompt in part],
            n=COMPLETIONS,
            max_new_tokens=config.max_new_tokens,
            eos_ids=(tokenizer.eos_token_id,),
            seed=number,
            max_slots=config.max_slots,
        )
        texts = [
            tokenizer.decode(ids[: int(length)], skip_special_tokens=True)
            for ids, length in zip(out.ids, out.lengths, strict=True)
        ]
        for i, prompt in enumerate(part):
            own = range(i * COMPLETIONS, (i + 1) * COMPLETIONS)
            golds = [corpus.gold(prompt, texts[j], out.finish_reason[j] == "eos") for j in own]
            ranks = [sum(other > gold + 1e-9 for other in golds) for gold in golds]
            rows.append({"prompt": prompt, "completions": [texts[j] for j in own], "ranks": ranks})
    return rows


def write_data(config: Config, files: Path) -> tuple[list[Record], list[Record]]:
    """The corpus as files that any stage reads; its records."""
    files.mkdir(parents=True, exist_ok=True)
    sides = corpus.records(config.seed)
    for name, records in zip(("instructions", "held_out"), sides, strict=True):
        # The loader ends an instruction with the newline that the corpus's prompts end with.
        rows = [{"instruction": r.prompt.strip(), "response": r.best} for r in records]
        write_records(files / f"{name}.jsonl", rows)
    (files / "text.txt").write_text(corpus.text())
    return sides


def run(config: Config) -> bool:
    """Run every stage and print the results; True if each of them is what it should be."""
    start = time.perf_counter()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    output = Path(config.output)
    files = output / "data"

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    def stage(name: str, **options: Any) -> Config:
        values = COMMON | SETTINGS[name] | options | {"output": str(output / name)}
        if config.steps:
            values |= {"steps": min(config.steps, values["steps"]), "eval_batches": 1}
        return replace(config, **values)

    def data(name: str) -> str:
        return str(files / name)

    train, held_out = write_data(config, files)
    say(f"{len(train)} docstrings to learn from, {len(held_out)} held out")
    new_model(output / "new")
    say("base model: plain text")
    text = {"data": data("text.txt"), "data_format": "text"}
    base = sft.train(stage("base", model=str(output / "new"), **text))
    say("supervised fine-tuning: signatures to docstrings")
    examples = {"data": data("instructions.jsonl"), "eval_data": data("held_out.jsonl")}
    tuned = sft.train(stage("sft", model=str(output / "base"), **examples))
    say(f"ranking {COMPLETIONS} completions each by the gold reward")
    model = str(output / "sft")
    for name, records in (("ranked.jsonl", train), ("ranked_held_out.jsonl", held_out)):
        prompts = [record.prompt for record in records[: 25 * config.steps or RANKED_PROMPTS]]
        write_records(files / name, rank_completions(stage("sft"), model, prompts))
    say("reward model")
    ranked = {"data": data("ranked.jsonl"), "eval_data": data("ranked_held_out.jsonl")}
    judged = reward.train(stage("reward", model=model, **ranked))
    say("PPO-ptx against the reward model")
    judge = {"reward_model": str(output / "reward"), "gold": GOLD}
    improved = ppo.train(
        stage("ppo", model=model, pretraining_data=data("text.txt"), **judge, **examples)
    )
    say("done. Each op of the loop on tensors of this run, beside plain PyTorch:")
    print(ops.table(output))
    return summary(base, tuned, judged, improved)


def summary(*stages: dict[str, float]) -> bool:
    """Print what each stage has reached on held-out data; True if all of it is an improvement."""
    base, tuned, judged, improved = stages
    lines = [
        ("base model, loss on text", base, "loss", "nats/token", -1),
        ("SFT, loss on held-out docstrings", tuned, "loss", "nats/token", -1),
        ("reward model, held-out pairs right", judged, "accuracy", "", 1),
        ("PPO, proxy reward (reward model)", improved, "score", "", 1),
        ("PPO, gold reward", improved, "gold", "", 1),
        ("PPO, KL to the SFT model", improved, "kl", "nats/response", 1),
    ]
    good = True
    for title, found, name, unit, sign in lines:
        before, after = found[f"{name}_before"], found[name]
        better = sign * (after - before) > 0
        good = good and better
        verdict = "" if better else "   NOT BETTER"
        print(f"{title:<36} {before:8.4f} -> {after:8.4f} {unit}{verdict}")
    return good


def main(argv: Sequence[str]) -> int:
    """`rlhf-fast demo`."""
    config = parse("demo", argv)
    if config is None:
        return 0
    good = run(config)
    print(f"reports: {config.output}/*/report.html")
    return 0 if good or config.steps else 1
