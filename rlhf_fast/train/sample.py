"""Generate completions of prompts: printed, and written to completions.jsonl in `output`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import rlhf_fast
from rlhf_fast.train import batches
from rlhf_fast.train.config import Config, parse
from rlhf_fast.train.data import Record, load
from rlhf_fast.train.models import device_of, load_causal_lm, load_tokenizer


def complete(config: Config, prompts: Sequence[str]) -> list[dict]:
    """{prompt, completion, finished, logprob} of every sample; a prompt's samples stay together.

    `logprob` is the completion's, in nats, under the distribution that it was drawn from.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    tokenizer = load_tokenizer(config.model)
    model = load_causal_lm(config.model).to(device_of(config))
    results = []
    pieces = list(batches.chunks(list(prompts), config.batch_size))
    for number, part in enumerate(tqdm(pieces, desc="sample", disable=not config.progress)):
        encoded = [batches.encode_prompt(tokenizer, config, prompt) for prompt in part]
        out = rlhf_fast.generate(
            model, encoded, n=config.samples_per_prompt, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            eos_ids=(tokenizer.eos_token_id,), seed=(config.seed << 20) + number,
            max_slots=config.max_slots, max_len=config.max_prompt_tokens + config.max_new_tokens,
        )  # fmt: skip
        for row in range(out.ids.shape[0]):
            ids = out.ids[row, : int(out.lengths[row])]
            results.append(
                {
                    "prompt": part[row // config.samples_per_prompt],
                    "completion": tokenizer.decode(ids, skip_special_tokens=True),
                    "finished": out.finish_reason[row] == "eos",
                    "logprob": round(out.logprob[row].sum().item(), 4),
                }
            )
    return results


def main(argv: Sequence[str]) -> int:
    """`rlhf-fast sample`."""
    config = parse("sample", argv)
    if config is None:
        return 0
    config.need("sample", "model")
    if bool(config.prompt) == bool(config.data):
        raise ValueError("sample needs --prompt or --data, and not both")
    records = load(config.data, config.data_format) if config.data else [Record(config.prompt)]
    prompts = [record.prompt for record in records if record.prompt]
    if not prompts:
        raise ValueError(f"data: expected prompts, got none in {config.data}")
    results = complete(config, prompts)
    path = Path(config.output) / "completions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(result) + "\n" for result in results))
    for result in results[:20]:
        print(f"{result['prompt'].rstrip()}\n  -> {result['completion']}")
    print(f"sample: wrote {len(results)} completions to {path}")
    return 0
