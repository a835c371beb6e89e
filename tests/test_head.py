"""Log-probs and losses of Hugging Face models without logits: what their own forward says, or a
refusal."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rlhf_fast
from rlhf_fast.rollout.models import FAMILIES
from tests.rollout_models import V, assert_same_state, state_of, tiny

CLOSE = {"rtol": 0, "atol": 2e-5}
OPTIONS = {
    "gemma3_text": {"final_logit_softcapping": 4.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
}


def batch(seed=0):
    """(ids, attention mask, position ids): a row padded behind, one in front, one whole."""
    ids = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def own(model, ids, mask, positions, **options):
    """What the model's logits say of each token behind the first."""
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    counted = mask[:, 1:] * mask[:, :-1]
    return rlhf_fast.logprob_entropy(logits[:, :-1].float(), ids[:, 1:], mask=counted, **options)


def gradients(model, out):
    g = torch.linspace(-1, 1, out.logprob.numel()).view_as(out.logprob)
    model.zero_grad()
    ((out.logprob * g).sum() + 0.1 * out.entropy.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, **options):
    ids, mask, positions = batch()
    found = rlhf_fast.model_logprob(
        model, ids, mask, entropy=True, position_ids=positions, **options
    )
    ours = gradients(model, found)
    truth = own(model, ids, mask, positions, **options)
    for value, true in zip(found, truth, strict=True):
        torch.testing.assert_close(value, true, **CLOSE)
    expected = gradients(model, truth)
    assert ours.keys() == expected.keys() and ours
    for name, gradient in expected.items():
        rough = 2e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=rough, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, "cohere"])
def test_families(family):
    model = tiny(family, scale=2.0, **OPTIONS.get(family, {})).eval()
    assert_equal(model, temperature=0.7)


def test_a_head_with_a_bias_that_is_scaled():
    model = tiny("granite", logits_scaling=3.0).eval()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, V))
    assert_equal(model)


def test_tied_weights_share_one_gradient():
    model = tiny(tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equal(model)


def test_the_last_tokens_and_their_mask():
    model, (ids, mask, positions) = tiny().eval(), batch()
    chosen = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0]])
    found = rlhf_fast.model_logprob(
        model, ids, mask, last=3, mask=chosen, position_ids=positions, temperature=0.5
    )
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -4:-1]
    truth = rlhf_fast.logprob(logits, ids[:, -3:], mask=chosen, temperature=0.5)
    torch.testing.assert_close(found, truth, **CLOSE)
    assert (found[chosen == 0] == 0).all()
    plain = rlhf_fast.model_logprob(model, ids)
    truth = rlhf_fast.logprob(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
    torch.testing.assert_close(plain, truth, **CLOSE)


def test_bfloat16_and_autocast():
    model, (ids, mask, positions) = tiny(scale=2.0).eval(), batch()
    truth = own(model, ids, mask, positions).logprob
    with torch.autocast("cpu", torch.bfloat16):
        found = rlhf_fast.model_logprob(model, ids, mask, position_ids=positions)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth, rtol=0.05, atol=0.05)
    half = tiny(scale=2.0).eval().bfloat16()
    found = rlhf_fast.model_logprob(half, ids, mask, position_ids=positions)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth, rtol=0.05, atol=0.2)


def test_the_head_multiplies_no_row_and_the_model_stays_as_it_was():
    model, rows = tiny(attention_dropout=0.1), []
    state = state_of(model)
    with torch.no_grad():
        rlhf_fast.causal_lm_head(model)
    assert_same_state(model, state)
    model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[:-1].numel()))
    rlhf_fast.model_logprob(model, batch()[0])
    assert rows == [0]
    assert model(input_ids=batch()[0]).logits.shape == (3, 9, V)


def test_causal_lm_head_describes_the_model():
    head = rlhf_fast.causal_lm_head(tiny("gemma2"))
    assert head.weight.shape == (V, 32) and head.softcap == 8.0 and head.logit_scale == 1
    assert rlhf_fast.causal_lm_head(tiny("cohere", logit_scale=0.25)).logit_scale == 0.25
    assert rlhf_fast.causal_lm_head(tiny("phi")).bias is not None
    model = tiny("granite", logits_scaling=4.0).eval()
    head, ids = rlhf_fast.causal_lm_head(model), batch()[0]
    hidden = model.base_model(input_ids=ids).last_hidden_state
    found = rlhf_fast.linear_logprob(hidden[:, :-1], head.weight, ids[:, 1:], **head.options())
    truth = rlhf_fast.logprob(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
    torch.testing.assert_close(found, truth, **CLOSE)


# --------------------------------------------------------------------------------------- the loss


def loss_inputs(seed=0):
    """(old log-probs, advantages) [3, 5], which clip some of the ratios; NaN where padding is."""
    generator = torch.Generator().manual_seed(seed)
    old, advantages = (torch.randn(3, 5, generator=generator) for _ in range(2))
    old[0, 2:] = advantages[0, 2:] = torch.nan
    return old - 4, advantages


def whole_loss(logprob, entropy, old, advantages, mask, options):
    """The loss by `policy_loss` and the terms beside it, and the statistics that it has."""
    options = dict(options)
    entropy_coef, kl_coef = options.pop("entropy_coef", 0.0), options.pop("kl_coef", 0.0)
    ref, estimator = options.pop("ref_logprob", None), options.pop("kl_estimator", "k3")
    out = rlhf_fast.policy_loss(logprob, old, advantages, mask, **options)
    loss, stats = out.loss, out.stats_dict()
    if entropy_coef or kl_coef:  # a token mean, or what `normalizer` makes of it
        count = options.get("normalizer", mask.sum())
        kl = rlhf_fast.kl_estimate(logprob, ref, estimator=estimator, mask=mask)
        loss = loss + (kl_coef * kl - entropy_coef * entropy * mask).sum() / count
        stats["entropy"] = (entropy * mask).sum().item() / mask.sum().item()
        stats["kl"] = kl.sum().item() / mask.sum().item()
    return loss, stats


def assert_same_loss(model, **options):
    """`model_policy_loss` against the model's own logits and the losses of tokens."""
    ids, attention, positions = batch()
    mask = (attention[:, -5:] * attention[:, -6:-1]) != 0
    old, advantages = loss_inputs()
    found = rlhf_fast.model_policy_loss(
        model, ids, attention, old, advantages, mask, position_ids=positions, temperature=0.7,
        **options,
    )  # fmt: skip
    model.zero_grad()
    found.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    out = rlhf_fast.logprob_entropy(
        logits[:, -6:-1].float(), ids[:, -5:], mask=mask, temperature=0.7
    )
    loss, stats = whole_loss(*out, old, advantages, mask, options)
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=2e-5, atol=2e-5)
    assert found.stats_dict() == pytest.approx(stats, rel=2e-5, abs=2e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            rough = 2e-5 * max(1.0, p.grad.abs().max().item())
            torch.testing.assert_close(ours.pop(name), p.grad, rtol=0, atol=rough, msg=name)
    assert not ours
    return found


REF = torch.linspace(-6, -3, 15).view(3, 5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "gspo", "reduction": "seq-mean-token-mean", "clip_low": 0.1, "clip_high": 0.3},
        {"kind": "reinforce", "normalizer": 7.0},
        {"kind": "a2c", "importance_weights": torch.linspace(0.5, 2, 15).view(3, 5)},
        {"dual_clip": 2.0, "entropy_coef": 0.1, "kl_coef": 0.2, "ref_logprob": REF},
    ],
    ids=["ppo", "gspo", "reinforce", "a2c", "terms"],
)
def test_the_policy_loss_is_that_of_the_models_logits(options):
    stats = assert_same_loss(tiny(scale=2.0).eval(), **options).stats_dict()
    assert stats["tokens"] == 11
    if "kind" not in options:
        assert 0 < stats["clip_fraction"] < 1


def test_the_policy_loss_of_heads_that_are_more_than_a_weight():
    model = tiny("granite", logits_scaling=3.0).eval()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, V))
    assert_same_loss(model, entropy_coef=0.1, kl_coef=0.1, ref_logprob=REF)
    assert_same_loss(tiny("gemma2", tie_word_embeddings=True).eval())


def test_the_policy_loss_of_all_tokens_but_padding():
    model, (ids, attention, positions) = tiny(scale=2.0).eval(), batch()
    old, advantages = (torch.full((3, 8), x) for x in (-4.0, 1.0))
    with torch.no_grad():
        found, given = (
            rlhf_fast.model_policy_loss(
                model, ids, attention, old, advantages, mask, position_ids=positions
            )
            for mask in (None, attention[:, 1:] * attention[:, :-1])
        )
    assert torch.equal(found.stats, given.stats) and not found.loss.requires_grad
    assert found.stats_dict()["tokens"] == 17


def test_wrong_arguments_of_the_policy_loss():
    model, (ids, attention, _) = tiny(), batch()
    old, advantages = loss_inputs()
    for error, pattern, change in (
        (TypeError, "labels: not an argument", {"labels": ids}),
        (TypeError, "old_logprob: expected", {"old_logprob": [0.0]}),
        (ValueError, r"old_logprob: expected shape \[B, T\] with", {"old_logprob": old[0]}),
        (
            ValueError,
            r"old_logprob: .* T from 1 to 8, got \(3, 9\)",
            {"old_logprob": torch.zeros(3, 9)},
        ),
        (ValueError, r"advantages: expected shape \(3, 5\)", {"advantages": torch.zeros(3, 4)}),
        (ValueError, r"mask: expected shape \(3, 5\)", {"mask": torch.ones(3, 4)}),
        (ValueError, "kind: expected", {"kind": "dpo"}),
        (ValueError, "ref_logprob: expected a tensor", {"kl_coef": 0.1}),
    ):
        arguments = {"old_logprob": old, "advantages": advantages} | change
        with pytest.raises(error, match=pattern):
            rlhf_fast.model_policy_loss(model, ids, attention, **arguments)
    assert not model.lm_head._forward_pre_hooks


# --------------------------------------------------------------------------------------- refusals


def raises(model, error, pattern, **options):
    with pytest.raises(error, match=pattern):
        rlhf_fast.model_logprob(model, batch()[0], **options)


def test_heads_that_are_something_else():
    model = tiny()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    raises(model, NotImplementedError, "its head is a Sequential")
    model = tiny()
    model.lm_head.forward = lambda x: 2 * torch.nn.functional.linear(x, model.lm_head.weight)
    raises(model, NotImplementedError, "its head is a Linear")


@pytest.mark.parametrize("change", [lambda z: 1.01 * z, lambda z: 50 * (z / 50).tanh()])
def test_logits_that_are_changed_in_an_unknown_way(change):
    model = tiny()
    inner = model.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = forward
    raises(model, NotImplementedError, "LlamaForCausalLM changes what its head returns")
    with pytest.raises(NotImplementedError, match="changes what its head returns"):
        rlhf_fast.causal_lm_head(model)


def test_a_family_with_its_own_multiplier():
    raises(
        tiny("falcon_h1", lm_head_multiplier=2.0, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8),
        NotImplementedError, "changes what its head returns",
    )  # fmt: skip


def test_no_causal_lm():
    raises(tiny().model, TypeError, "expected a transformers causal LM, got LlamaModel")
    raises(torch.nn.Linear(2, 2), TypeError, "expected a transformers causal LM, got Linear")
    raises("gpt2", TypeError, "expected a transformers causal LM, got str")


def test_wrong_arguments():
    model = tiny()
    raises(model, TypeError, "labels: not an argument", labels=batch()[0])
    raises(model, ValueError, "last: expected 1 to 8", last=9)
    raises(model, ValueError, r"mask: expected shape \(3, 8\)", mask=torch.ones(3, 9))
    raises(model, ValueError, "attention_mask: expected shape", attention_mask=torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[B, S\]"):
        rlhf_fast.model_logprob(model, torch.ones(3, 1, dtype=torch.long))
    assert not model.lm_head._forward_pre_hooks


# ------------------------------------------------------------------------------------------- LoRA


def adapted(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head", "q_proj"], **options)
    model = peft.get_peft_model(tiny(scale=2.0), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    return model


def test_lora_on_the_head():
    model = adapted().eval()
    assert rlhf_fast.causal_lm_head(model).lora[2] == 2.0
    assert_equal(model)
    assert_same_loss(model)
    with model.disable_adapter():
        assert_equal_values(model)
    model.merge_adapter()
    assert_equal_values(model)


def assert_equal_values(model):
    ids, mask, positions = batch()
    assert rlhf_fast.causal_lm_head(model).lora is None
    found = rlhf_fast.model_logprob(model, ids, mask, position_ids=positions)
    torch.testing.assert_close(found, own(model, ids, mask, positions).logprob, **CLOSE)


def test_adapters_that_are_more_than_a_product():
    raises(adapted(lora_dropout=0.1).train(), NotImplementedError, "with dropout 0.1")
    raises(adapted(use_dora=True), NotImplementedError, "more than B A")
    raises(adapted(lora_bias=True), NotImplementedError, "more than B A")


# -------------------------------------------------------------------------------------- processes


def split_loss(out):
    return (out.logprob * 0.1).sum() + out.entropy.sum()


def plain_loss(out, rank):
    """The policy loss of the last 5 tokens of a rank's batch from all its log-probs."""
    mask = batch()[1]
    counted = (mask[:, 1:] * mask[:, :-1])[:, -5:]
    return rlhf_fast.policy_loss(out.logprob[:, -5:], *loss_inputs(rank), counted).loss


def wrapped(kind, rank):
    """(model as `kind` distributes it, its plain model)."""
    model = tiny(scale=2.0).eval()
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model), model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if kind == "own":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh), model


def train_parts(rank, kind, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, plain = wrapped(kind, rank)
    ids, mask, positions = batch(seed=rank)

    def score():
        return rlhf_fast.model_logprob(model, ids, mask, entropy=True, position_ids=positions)

    if kind == "own":
        with pytest.raises(NotImplementedError, match="sharded again after the forward pass"):
            score()
        with torch.no_grad():
            score()
        return dist.destroy_process_group()

    def whole():
        return {
            name: (p.grad.full_tensor() if kind == "fsdp" else p.grad).clone()
            for name, p in plain.named_parameters()
        }

    out = score()
    split_loss(out).backward()
    grads = whole()
    model.zero_grad()
    loss = rlhf_fast.model_policy_loss(
        model, ids, mask, *loss_inputs(rank), position_ids=positions
    ).loss
    loss.backward()
    found = (out.logprob.detach(), grads, loss.detach(), whole())
    torch.save(found, f"{results}/{rank}.pt")
    dist.barrier()
    return dist.destroy_process_group()


class LogprobHead(torch.nn.Linear):
    def forward(self, hidden, ids):
        return rlhf_fast.linear_logprob_entropy(hidden, self.weight, ids)


def sharded_heads(rank, store, results):
    """docs/sharded_heads.md: a weight that is `Shard(0)`, and a head with a `fully_shard`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, ids = head_inputs()
    weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    hidden.requires_grad_()
    out = rlhf_fast.linear_logprob_entropy(hidden, weight.to_local(), ids, group=mesh.get_group())
    split_loss(out).backward()
    assert weight.grad.placements == (Shard(0),)
    found = [(out.logprob.detach(), hidden.grad, weight.grad.full_tensor())]
    hidden, whole, ids = head_inputs()
    head = LogprobHead(8, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(whole)
    fully_shard(head, mesh=mesh, reshard_after_forward=True)
    out = head(hidden.requires_grad_(), ids)
    split_loss(out).backward()
    found.append((out.logprob.detach(), hidden.grad, head.weight.grad.full_tensor()))
    torch.save(found, f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def head_inputs():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (11, V))
    return hidden, weight, torch.randint(V, (11,), generator=generator)


needs_processes = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)


@needs_processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_wrapped_models_average_their_gradients(kind, tmp_path):
    mp.spawn(train_parts, (kind, tmp_path / "store", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = tiny(scale=2.0).eval()
    truths = [own(model, *batch(seed=rank)) for rank in range(2)]
    losses = [plain_loss(truth, rank) for rank, truth in enumerate(truths)]
    averaged = [
        torch.autograd.grad(sum(parts) / 2, list(model.parameters()), retain_graph=True)
        for parts in ([split_loss(truth) for truth in truths], losses)
    ]
    for truth, expected, (logprob, grads, loss, loss_grads) in zip(
        truths, losses, ranks, strict=True
    ):
        torch.testing.assert_close(logprob, truth.logprob, **CLOSE)
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-5)
        for given, true in zip((grads, loss_grads), averaged, strict=True):
            for (name, _), gradient in zip(model.named_parameters(), true, strict=True):
                rough = 2e-5 * max(1.0, gradient.abs().max().item())
                torch.testing.assert_close(given[name], gradient, rtol=0, atol=rough, msg=name)


@needs_processes
def test_a_head_that_fsdp_frees_is_refused(tmp_path):
    mp.spawn(train_parts, ("own", tmp_path / "store", tmp_path), nprocs=2)


@needs_processes
def test_recipes_for_sharded_heads(tmp_path):
    mp.spawn(sharded_heads, (tmp_path / "store", tmp_path), nprocs=2)
    hidden, weight, ids = head_inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    out = rlhf_fast.linear_logprob_entropy(hidden, weight, ids)
    split_loss(out).backward()
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            for value, true in zip(found, (out.logprob, hidden.grad, weight.grad), strict=True):
                torch.testing.assert_close(value, true.detach(), **CLOSE)
