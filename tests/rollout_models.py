"""Tiny models for the tests of rollouts, and what plain transformers says about them."""

import torch
import transformers

import rlhf_fast

V = 67
TRUNCATED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
SAMPLINGS = ({}, {"temperature": 0.7}, TRUNCATED, {"temperature": 1.3, "min_p": 0.05})


def tiny(family="llama", *, vocabulary=V, scale=6.0, **options):
    """A random model of `family` whose logits are far enough apart that no argmax is a tie."""
    config = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family not in ("gpt2", "gpt_neox", "opt"):
        config["num_key_value_heads"] = 2
    config |= {
        "gemma": {"head_dim": 8},
        "gemma2": {
            "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0, "query_pre_attn_scalar": 8,
        },
        "gemma3_text": {
            "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "gpt2": {"n_inner": 48, "scale_attn_by_inverse_layer_idx": True},
        "mistral": {"sliding_window": 6, "head_dim": 8},
        "mixtral": {"num_local_experts": 4, "head_dim": 8},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
        "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "qwen3": {"head_dim": 8},
        "qwen3_moe": {
            "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        },
    }.get(family, {})  # fmt: skip
    torch.manual_seed(0)
    auto = transformers.AutoConfig.for_model(family, **config | options)
    model = transformers.AutoModelForCausalLM.from_config(auto)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.train()


def some_prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator) for n in lengths]


PROMPTS = some_prompts(3, 9, 1, 12, 5, 7, 2)


def greedy(model, prompts, **options):
    return rlhf_fast.generate(model, prompts, temperature=0.0, **options)


def plain_logits(model, prompt, response):
    """`[T, V]`: the rows that predict the response, by one forward without a cache."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        logits = model(torch.cat((prompt, response))[None], use_cache=False).logits
    for module, mode in modes:
        module.training = mode
    return logits[0, len(prompt) - 1 : -1]


def hf_greedy(model, prompt, max_new_tokens):
    """The response of transformers' own `generate`."""
    model.eval()
    model.generation_config.eos_token_id = None
    out = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), pad_token_id=0,
        do_sample=False, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    model.train()
    return out[0, len(prompt) :]


def compare_with_forward(model, prompts, out, sampling):
    for i, prompt in enumerate(prompts):
        ids = out.ids[i, : out.lengths[i]]
        logits = plain_logits(model, prompt, ids)
        lp, log_mass = rlhf_fast.replay_logprob(logits, ids, **sampling)
        options = {"temperature": sampling.get("temperature", 1.0)}
        entropy = rlhf_fast.logprob_entropy(logits, ids, **options).entropy
        for ours, truth in ((out.logprob, lp), (out.log_mass, log_mass), (out.entropy, entropy)):
            torch.testing.assert_close(ours[i, : len(ids)], truth, rtol=0, atol=2e-5)


def state_of(model):
    return {
        "modes": [m.training for m in model.modules()],
        "attention": [
            m.config._attn_implementation for m in model.modules() if "config" in vars(m)
        ],
        "config": [model.config.to_dict()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forward": [vars(m).get("forward") for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": [torch.get_rng_state()],
        "grad mode": [torch.is_grad_enabled()],
    }


def assert_same_state(model, before):
    for name, value in state_of(model).items():
        for now, then in zip(value, before[name], strict=True):
            same = torch.equal(now, then) if torch.is_tensor(now) else now == then
            assert same, name
