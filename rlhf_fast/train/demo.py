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


def write_records(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def new_model(folder: Path) -> None:
    """A Llama of 1.5 million random weights and a tokenizer of 1024 tokens, trained on the text."""
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
            rows.append(
                {"prompt": prompt, "completions": [texts[j] for j in own], "ranks": ranks}
            )
    return rows


def run(config: Config) -> bool:
    """Run every stage and print the results; True if each of them is what it should be."""
    start = time.perf_counter()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    output = Path(config.output)
    files = output / "data"
    files.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True)

    def steps(usual: int) -> int:
        return min(usual, config.steps or usual)

    train, held_out = corpus.records(config.seed)
    say(f"{len(train)} docstrings to learn from, {len(held_out)} held out")
    text = files / "text.txt"
    text.write_text(corpus.text())
    rows = [[{"instruction": r.prompt, "response": r.best} for r in part] for part in (train, held_out)]
    instructions = write_records(files / "instructions.jsonl", rows[0])
    unseen = write_records(files / "held_out.jsonl", rows[1])
    new_model(output / "new")
    shared = replace(
        config, steps=0, max_prompt_tokens=40, max_response_tokens=64, max_new_tokens=64, eval_batches=16,
        save_every=1000,
    )  # fmt: skip

    say("base model: plain text")
    base = sft.train(replace(
        shared, output=str(output / "base"), model=str(output / "new"), data=str(text), data_format="text",
        steps=steps(300), batch_size=32, micro_batch=32, learning_rate=3e-3, warmup_steps=20, eval_batches=4,
    ))  # fmt: skip

    say("supervised fine-tuning: signatures to docstrings")
    tuned = sft.train(replace(
        shared, output=str(output / "sft"), model=str(output / "base"), data=instructions, eval_data=unseen,
        steps=steps(300), batch_size=32, micro_batch=32, learning_rate=2e-3, warmup_steps=10,
    ))  # fmt: skip

    say(f"ranking {COMPLETIONS} completions each by the gold reward")
    prompts = [record.prompt for record in train[:RANKED_PROMPTS]]
    unseen_prompts = [record.prompt for record in held_out]
    model = str(output / "sft")
    ranked, ranked_unseen = (
        write_records(files / name, rank_completions(shared, model, part))
        for name, part in (("ranked.jsonl", prompts), ("ranked_held_out.jsonl", unseen_prompts))
    )

    say("reward model")
    judged = reward.train(replace(
        shared, output=str(output / "reward"), model=model, data=ranked, eval_data=ranked_unseen,
        steps=steps(80), batch_size=25, micro_batch=25, learning_rate=1e-3, warmup_steps=5,
    ))  # fmt: skip

    say("PPO-ptx against the reward model")
    improved = ppo.train(replace(
        shared, output=str(output / "ppo"), model=model, reward_model=str(output / "reward"),
        data=instructions, eval_data=unseen, pretraining_data=str(text), gold=GOLD,
        steps=steps(40), batch_size=64, micro_batch=32, learning_rate=3e-4, schedule="linear", adam_eps=1e-5,
        ppo_epochs=2, minibatches=2, kl_coef=0.03, ptx_coef=0.1, ptx_batch=16, eval_batches=4,
    ))  # fmt: skip
    say("done; each op of the loop on tensors of this run, against plain PyTorch:")
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
