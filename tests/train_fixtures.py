"""A model of a few thousand weights, its tokenizer, and data files for the training tests."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.train import corpus
from rlhf_fast.train.config import STAGE_DEFAULTS, Config
from rlhf_fast.train.experience import Actors
from rlhf_fast.train.models import load_causal_lm, load_scalar_model, load_tokenizer

PROMPTS = [f"{word} {number}\n" for number in range(6) for word in ("add", "drop", "find", "keep")]


def gold(prompt: str, response: str, finished: bool) -> float:
    """A reward that tests can watch: the share of the letter e."""
    return response.count("e") / max(len(response), 1)


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(folder: Path) -> dict[str, str]:
    """name -> path of the model and the data files in `folder`."""
    text = "\n".join(f"The {p.strip()} of the list, then the next one." for p in PROMPTS)
    tokenizer = corpus.tokenizer(text.splitlines(), 290)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    answers = [{"instruction": p.strip(), "response": f"the {p.split()[0]}."} for p in PROMPTS]
    ranked = [
        {"prompt": p, "completions": ["the e.", "an a.", "no.", "eee"][: 2 + n % 3],
         "ranks": [0, 1, 2, 1][: 2 + n % 3]}
        for n, p in enumerate(PROMPTS)
    ]  # fmt: skip
    (folder / "text.txt").write_text(text)
    (folder / "judge").mkdir()
    load_scalar_model(str(folder / "model")).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return {
        "model": str(folder / "model"),
        "judge": str(folder / "judge"),  # a reward model that nobody has trained
        "answers": write_lines(folder / "answers.jsonl", answers),
        "ranked": write_lines(folder / "ranked.jsonl", ranked),
        "text": str(folder / "text.txt"),
    }


def without_dropout(files: dict[str, str], folder: Path) -> str:
    """The same model in `folder`, whose steps do not depend on random states."""
    model = load_causal_lm(files["model"])
    model.config.attention_dropout = 0.0
    model.save_pretrained(folder)
    load_tokenizer(files["model"]).save_pretrained(folder)
    return str(folder)


def config(stage: str, files: dict[str, str], output: Path, **options) -> Config:
    """The options of a stage at test size."""
    data = {"reward": "ranked"}.get(stage, "answers")
    usual = {
        "model": files["model"], "data": files[data], "output": str(output), "device": "cpu",
        "progress": False, "batch_size": 4, "micro_batch": 2, "steps": 4, "learning_rate": 1e-2,
        "max_prompt_tokens": 12, "max_response_tokens": 12, "max_new_tokens": 8,
        "eval_fraction": 0.2, "eval_batches": 1, "save_every": 2,
    }  # fmt: skip
    return Config(**(STAGE_DEFAULTS[stage] | usual | options)).check()


def actors(files: dict[str, str], judge: str, config: Config) -> Actors:
    """The four models of PPO in evaluation mode."""
    policy, reference = load_causal_lm(files["model"]), load_causal_lm(files["model"])
    score, value = load_scalar_model(judge), load_scalar_model(judge)
    tokenizer = load_tokenizer(files["model"])
    return Actors(config, tokenizer, *(m.eval() for m in (policy, reference, score, value)))


class Capture:
    """Stands for `Run.update`: keeps the gradients instead of taking a step."""

    def __init__(self, policy, value):
        self.policy, self.value, self.found = policy, value, {}

    def __call__(self, optimizer, *modules):
        for prefix, module in (("policy", self.policy), ("value", self.value)):
            for name, p in module.named_parameters():
                self.found[f"{prefix}.{name}"] = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = None
        return 0.0


def metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "tokens_per_second", "completions_per_second")
    return [
        {k: v for k, v in line.items() if k not in clock and not k.startswith("seconds")}
        for line in lines
    ]


def same_model(a: Path, b: Path) -> bool:
    """Whether two stages wrote the same bytes."""
    names = sorted(path.name for path in (a / "model").iterdir())
    assert names == sorted(path.name for path in (b / "model").iterdir())
    return all((a / "model" / n).read_bytes() == (b / "model" / n).read_bytes() for n in names)
