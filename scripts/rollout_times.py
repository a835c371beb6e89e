"""Tokens per second of rollouts against `model.generate`, on three workloads.

    python scripts/rollout_times.py [--device cpu|cuda] [--repeats 3] [--json FILE]

    ragged    48 prompts of 16 to 64 tokens, responses of geometric length; 16 of them at a time
    equal     16 prompts of 32 tokens, 64 new tokens each
    single    one prompt of 32 tokens, 64 new tokens

Both sample the same random Llama (56 M parameters in float32 on a CPU, 1.5 B in bfloat16 on CUDA)
in turns, at temperature 1 without truncation; a row is the median of the repeats. Ragged responses
end at one of the ids that make up a hundredth of the vocabulary, at the latest after 256 tokens:
each side draws its own, so that tokens per second compare and seconds do not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import rlhf_fast

V = 32000
EOS = list(range(0, V, 100))
SIZES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


def prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    draw = random.Random(0)
    return [
        [draw.randrange(V) for _ in range(draw.randint(shortest, longest))] for _ in range(count)
    ]


# name: (prompts, new tokens at the most, ids that end a response)
WORKLOADS: dict[str, tuple[list[list[int]], int, list[int]]] = {
    "ragged": (prompts(48, 16, 64), 256, EOS),
    "equal": (prompts(16, 32, 32), 64, []),
    "single": (prompts(1, 32, 32), 64, []),
}


def model_on(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, max_position_embeddings=1024, **SIZES[device])
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def by_rollout(model, batch: list[list[int]], new: int, eos: list[int]) -> int:
    """How many response tokens there were."""
    out = rlhf_fast.generate(model, batch, max_new_tokens=new, eos_ids=eos, max_slots=16)
    return int(out.lengths.sum())


def by_generate(model, batch: list[list[int]], new: int, eos: list[int]) -> int:
    """The same of `model.generate`, 16 left-padded prompts at a time."""
    tokens = 0
    for first in range(0, len(batch), 16):
        part = batch[first : first + 16]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = model.generate(
            ids, attention_mask=mask.to(model.device), do_sample=True, top_k=0, max_new_tokens=new,
            eos_token_id=eos or None, pad_token_id=0,
        )[:, width:].cpu()  # fmt: skip
        ended = torch.isin(out, torch.tensor(eos, dtype=torch.int64))
        # Up to the first end, or all of it.
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
        tokens += int(lengths.sum())
    return tokens


def tokens_per_second(run, *args) -> float:
    start = time.perf_counter()
    tokens = run(*args)  # a number on the host: the device is done
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    model = model_on(options.device)
    rows = []
    for name, workload in WORKLOADS.items():
        rates: dict[str, list[float]] = {"rollout": [], "generate": []}
        for run in (by_rollout, by_generate):
            run(model, workload[0][:2], 2, workload[2])  # warm up
        for _ in range(options.repeats):
            rates["rollout"].append(tokens_per_second(by_rollout, model, *workload))
            rates["generate"].append(tokens_per_second(by_generate, model, *workload))
        ours, theirs = (statistics.median(rates[side]) for side in ("rollout", "generate"))
        ratio = ours / theirs
        rows.append({"workload": name, "rollout": ours, "generate": theirs, "ratio": ratio})
        print(f"{name:8} rollout {ours:7.0f} tokens/s   generate {theirs:7.0f}   {ratio:.2f}x")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": options.device, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
