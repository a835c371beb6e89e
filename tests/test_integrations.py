"""Drop-in use in other trainers: what is rebound, what is put back, and that results agree.

The projects are replaced by small modules that hold plain versions of the functions, with the
signatures of the patched versions. Where TRL, verl or OpenRLHF is installed in a version that we
patch, the same comparisons run against it too.
"""

import importlib
import importlib.metadata
import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import rlhf_fast
from rlhf_fast.integrations import _rebind, openrlhf, trl, verl
from rlhf_fast.testing import assert_accurate, assert_same_bits, randn

V = 37
PROJECTS = {"trl": trl, "verl": verl, "openrlhf": openrlhf}


def plain_logprob(logits, ids):
    return F.log_softmax(logits, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def plain_entropy(logits):
    lp = F.log_softmax(logits, -1)
    return -(lp.exp() * lp).sum(-1)


def plain_whiten(values, mask, shift_mean=True):
    n = mask.sum()
    mean = (values * mask).sum() / n
    variance = ((values - mean) ** 2 * mask).sum() / (n - 1)
    out = (values - mean) * torch.rsqrt(variance + 1e-8)
    return out if shift_mean else out + mean


def trl_functions() -> dict[str, dict]:
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if index.ndim == logits.ndim:
            return F.log_softmax(logits / temperature, -1).gather(-1, index)
        out = plain_logprob(logits / temperature, index)
        return out if row_mask is None else out.masked_fill(row_mask == 0, 0.0)

    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
    ):
        both = plain_logprob(logits / temperature, index), plain_entropy(logits / temperature)
        return tuple(x if row_mask is None else x.masked_fill(row_mask == 0, 0.0) for x in both)

    def entropy_from_logits(logits, chunk_size=128):
        return plain_entropy(logits)

    class _ChunkedLogProbFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, hidden, weight, bias, targets, temperature, chunk_size,
            final_logit_softcapping=None, logit_scale=1.0,
            outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ):  # fmt: skip
            raise AssertionError("the original was called")

    def masked_mean(values, mask, axis=None):
        if axis is not None:
            return (values * mask).sum(axis=axis) / mask.sum(axis=axis)
        return (values * mask).sum() / mask.sum()

    return {
        "trl.trainer.utils": {
            "selective_log_softmax": selective_log_softmax,
            "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
            "entropy_from_logits": entropy_from_logits,
            "_ChunkedLogProbFunction": _ChunkedLogProbFunction,
        },
        "trl.experimental.ppo.ppo_trainer": {
            "masked_whiten": lambda values, mask, shift_mean=True: plain_whiten(
                values, mask, shift_mean
            ),
            "masked_mean": masked_mean,
            "selective_log_softmax": selective_log_softmax,
        },
        "trl.trainer.grpo_trainer": {
            "renamed": selective_log_softmax,
            "entropy_from_logits": entropy_from_logits,
        },
    }


def verl_functions() -> dict[str, dict]:
    def logprobs_from_logits(logits, labels, inplace_backward=True):
        return plain_logprob(logits, labels)

    def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
        following, last, columns = 0.0, 0.0, []
        for t in reversed(range(values.shape[1])):
            counts = response_mask[:, t]
            new = token_level_rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
            following = values[:, t] * counts + (1 - counts) * following
            last = new * counts + (1 - counts) * last
            columns.insert(0, last)
        advantages = torch.stack(columns, 1)
        return plain_whiten(advantages, response_mask), advantages + values

    def kl_penalty(logprob, ref_logprob, kl_penalty):
        d = logprob - ref_logprob
        kinds = {"k1": d, "kl": d, "abs": d.abs(), "k2": d * d / 2, "mse": d * d / 2}
        c = d.clamp(-20, 20)
        kinds["k3"] = kinds["low_var_kl"] = (torch.exp(-c) - 1 + c).clamp(-10, 10)
        if kl_penalty.endswith("+"):
            return d * d / 2 - (d * d / 2).detach() + kinds[kl_penalty[:-1]].detach()
        return kinds[kl_penalty]

    def compute_value_loss(
        vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode="token-mean",
        dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None,
    ):  # fmt: skip
        near = torch.clamp(vpreds, values - cliprange_value, values + cliprange_value)
        far, clipped = (vpreds - returns) ** 2, (near - returns) ** 2
        loss = 0.5 * torch.maximum(far, clipped) * response_mask
        fraction = ((clipped > far) * response_mask).sum() / response_mask.sum()
        sequences = response_mask.shape[0] if global_batch_size is None else global_batch_size
        if loss_agg_mode == "token-mean":
            count = response_mask.sum() if batch_num_tokens is None else batch_num_tokens
            return loss.sum() / count * dp_size, fraction
        if loss_agg_mode == "token-sum":
            return loss.sum() * dp_size, fraction
        rows = loss.sum(1)
        if loss_agg_mode == "seq-mean-token-mean":
            rows = rows / response_mask.sum(1)
        total = rows.sum() / sequences * dp_size
        if loss_agg_mode == "seq-mean-token-sum-norm":
            total = total / (loss_scale_factor or response_mask.shape[-1])
        return total, fraction

    functional = {
        "logprobs_from_logits": logprobs_from_logits,
        "entropy_from_logits": lambda logits: plain_entropy(logits),
        "entropy_from_logits_with_chunking": lambda logits, chunk_size=2048: plain_entropy(
            logits.float()
        ),
        "masked_whiten": lambda values, mask, shift_mean=True: plain_whiten(
            values, mask, shift_mean
        ),
    }
    algorithms = {
        "compute_gae_advantage_return": compute_gae_advantage_return,
        "kl_penalty": kl_penalty,
        "compute_value_loss": compute_value_loss,
    }
    return {
        "verl.utils.torch_functional": functional,
        "verl.trainer.ppo.core_algos": algorithms,
        "verl.workers.losses": {"kl_penalty": kl_penalty},
    }


def openrlhf_functions() -> dict[str, dict]:
    def log_probs_from_logits(logits, labels, temperature=1.0):
        return plain_logprob(logits / temperature, labels)

    def compute_approx_kl(
        log_probs, log_probs_base, log_probs_old=None, kl_estimator="k1", unbiased_gradient=False
    ):
        if unbiased_gradient:
            raise LookupError("the original was called")
        d = log_probs.float() - log_probs_base.float()
        kinds = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}
        return kinds[kl_estimator].clamp(-10, 10)

    return {
        "openrlhf.models.utils": {
            "log_probs_from_logits": log_probs_from_logits,
            "compute_entropy": lambda logits: plain_entropy(logits),
            "compute_approx_kl": compute_approx_kl,
        },
        "openrlhf.models.actor": {"log_probs_from_logits": log_probs_from_logits},
    }


FUNCTIONS = {"trl": trl_functions, "verl": verl_functions, "openrlhf": openrlhf_functions}


@pytest.fixture
def install(monkeypatch):
    """Put a project of small modules in place of an installed one, and undo its patches."""

    def build(project: str, version: str | None = None) -> dict[str, types.ModuleType]:
        for name in list(sys.modules):
            if name == project or name.startswith(project + "."):
                monkeypatch.delitem(sys.modules, name)
        modules: dict[str, types.ModuleType] = {}
        for path, functions in {project: {}, **FUNCTIONS[project]()}.items():
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if name not in modules:
                    modules[name] = types.ModuleType(name)
                    modules[name].__path__ = []
                    monkeypatch.setitem(sys.modules, name, modules[name])
            modules[path].__dict__.update(functions)
            for f in functions.values():
                f.__module__ = path
        modules[project].__version__ = version or PROJECTS[project].KNOWN[-1]
        return modules

    yield build
    for handle in list(_rebind._active.values()):
        handle.undo()


@pytest.fixture(params=["plain", "installed"])
def modules_of(request, install):
    """Modules of a project by name: the small ones, and those of the installed project."""

    def find(project: str) -> dict[str, types.ModuleType]:
        if request.param == "plain":
            return install(project)
        module = pytest.importorskip(project, reason=f"{project} is not installed")
        version = importlib.metadata.version(project).split("+")[0]
        if version not in PROJECTS[project].KNOWN:
            pytest.skip(f"{project} {version} is none of {', '.join(PROJECTS[project].KNOWN)}")
        names = {target.module for target in PROJECTS[project]._TARGETS}
        return {project: module} | {n: importlib.import_module(n) for n in names}

    return find


def snapshot(modules):
    return {
        f"{name}:{key}": value
        for name, module in modules.items()
        for key, value in vars(module).items()
        if not key.startswith("__")
    }


def batch(dtype=torch.float32, rows=(3, 5)):
    logits = (2 * randn(*rows, V, seed=1)).to(dtype)
    return logits, torch.arange(logits[..., 0].numel()).view(rows) * 7 % V


# --------------------------------------------------------------------------------------- the handle


@pytest.mark.parametrize("project", PROJECTS)
def test_every_binding_is_replaced_and_put_back(install, project):
    modules = install(project)
    before = snapshot(modules)
    handle = PROJECTS[project].patch()
    changed = {site for site, value in snapshot(modules).items() if value is not before[site]}
    assert changed == set(handle.sites) and len(handle.sites) == len(changed)
    bindings = {site for site, value in before.items() if callable(value)}
    assert changed == bindings, "a binding of a replaced function was left"
    assert "in force" in repr(handle)
    handle.undo()
    assert snapshot(modules) == before and "undone" in repr(handle)
    handle.undo()
    assert snapshot(modules) == before


@pytest.mark.parametrize("project", PROJECTS)
def test_context_manager_undoes_after_an_error_too(install, project):
    modules = install(project)
    before = snapshot(modules)
    with pytest.raises(KeyError), PROJECTS[project].patch() as handle:
        assert handle.sites and snapshot(modules) != before
        raise KeyError
    assert snapshot(modules) == before


def test_patching_twice_is_patching_once(install):
    modules = install("verl")
    before = snapshot(modules)
    first = verl.patch()
    after, sites = snapshot(modules), list(first.sites)
    assert verl.patch() is first and first.sites == sites and snapshot(modules) == after
    first.undo()
    assert snapshot(modules) == before
    second = verl.patch()
    assert second is not first and set(second.sites) == set(sites)
    with verl.patch() as inner:
        assert inner is second
    assert snapshot(modules) != before  # the outer one still holds it
    second.undo()
    assert snapshot(modules) == before


def test_modules_imported_meanwhile_are_put_back(install, monkeypatch):
    modules = install("trl")
    original = modules["trl.trainer.utils"].selective_log_softmax
    handle = trl.patch()
    late = types.ModuleType("trl.trainer.late")
    late.f = modules["trl.trainer.utils"].selective_log_softmax
    monkeypatch.setitem(sys.modules, "trl.trainer.late", late)
    handle.undo()
    assert late.f is original


@pytest.mark.parametrize("project", PROJECTS)
def test_unknown_versions_are_refused(install, project):
    modules = install(project, "99.1")
    before = snapshot(modules)
    with pytest.raises(RuntimeError, match=rf"expected {project} .*, got 99.1.*force=True"):
        PROJECTS[project].patch()
    assert snapshot(modules) == before
    with PROJECTS[project].patch(force=True) as handle:
        assert handle.sites
    assert snapshot(modules) == before


def test_local_versions_and_projects_without_a_version(install, monkeypatch):
    modules = install("trl", trl.KNOWN[0] + "+cpu")
    trl.patch().undo()
    del modules["trl"].__version__

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(RuntimeError, match="got unknown"):
        trl.patch()


def test_force_finds_what_is_there_and_says_if_nothing_is(install):
    modules = install("openrlhf", "0.5")
    del modules["openrlhf.models.utils"].compute_entropy
    with openrlhf.patch(force=True) as handle:
        assert not any("compute_entropy" in site for site in handle.sites)
    vars(modules["openrlhf.models.utils"]).clear()
    with pytest.raises(RuntimeError, match=r"openrlhf 0\.5 has none of"):
        openrlhf.patch(force=True)
    assert not _rebind._active


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_that_is_not_installed(monkeypatch, project):
    monkeypatch.setitem(sys.modules, project, None)
    with pytest.raises(ImportError, match=f"{project} is not installed"):
        PROJECTS[project].patch()


def test_integrations_are_reached_from_the_package():
    assert rlhf_fast.integrations.trl is trl


# -------------------------------------------------------------------------- results: fake projects


def agree(name, before, after):
    """Float32 results of two correct implementations: the tolerance rule, in both directions."""
    assert before.dtype == after.dtype and before.shape == after.shape, name
    assert_accurate(name, after, before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl_logits(install, temperature):
    utils = install("trl")["trl.trainer.utils"]
    logits, ids = batch()
    keep = torch.arange(15).view(3, 5) % 4 > 0

    def run():
        z = logits.clone().requires_grad_()
        a = utils.selective_log_softmax(z, ids, temperature, row_mask=keep)
        b, c = utils.selective_log_softmax_and_entropy(z, ids, temperature=temperature)
        d = utils.entropy_from_logits(z)
        (a.sum() + b.sum() + 0.3 * c.sum() - d.sum()).backward()
        return a, b, c, d, z.grad, utils.selective_log_softmax(z, ids[..., None].expand(3, 5, 2))

    before = run()
    with trl.patch():
        after = run()
        b, c = utils.selective_log_softmax_and_entropy(
            logits.clone().requires_grad_(), ids, entropy_requires_grad=False
        )
        assert b.requires_grad and not c.requires_grad
        half = utils.selective_log_softmax(logits.bfloat16(), ids)
        assert half.dtype == torch.bfloat16
        z = logits.clone()
        z[..., 3] = -torch.inf
        assert utils.entropy_from_logits(z).isfinite().all()
        with pytest.raises(IndexError, match="-100"):  # no id is ever ignored
            utils.selective_log_softmax(logits, torch.full((3, 5), -100))
    for k, (x, y) in enumerate(zip(before, after, strict=True)):
        agree(f"output {k}", x, y)


@pytest.mark.parametrize("outputs", [("entropy",), ()])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_trl_head(install, outputs, scale):
    utils = install("trl")["trl.trainer.utils"]
    hidden, weight, bias = randn(6, 8, seed=1), randn(V, 8, seed=2), randn(V, seed=3)
    ids = torch.arange(6)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logits = (hidden.double() @ weight.double().T + bias.double()) * scale
    logits = 20 * torch.tanh(logits / 20) / 0.8
    truth = plain_logprob(logits, ids), plain_entropy(logits)
    with trl.patch():
        out = utils._ChunkedLogProbFunction.apply(
            hidden, weight, bias, ids, 0.8, 16, 20.0, scale, outputs
        )
        assert len(out) == 5 and out[2:] == (None, None, None)
        grads = torch.autograd.grad(out[0].sum() + (out[1].sum() if outputs else 0), leaves)
        with pytest.raises(AssertionError, match="the original was called"):
            utils._ChunkedLogProbFunction.apply(hidden, weight, bias, ids, 0.8, 16)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(AssertionError, match="the original was called"),
        ):
            utils._ChunkedLogProbFunction.apply(hidden, weight, bias, ids, 0.8, 16, None, 1.0, ())
    expected = torch.autograd.grad(truth[0].sum() + (truth[1].sum() if outputs else 0), leaves)
    torch.testing.assert_close(out[0], truth[0].float(), rtol=1e-5, atol=1e-5)
    if outputs:
        torch.testing.assert_close(out[1], truth[1].float(), rtol=1e-5, atol=1e-5)
    else:
        assert out[1] is None
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_trl_ppo_helpers(install):
    ppo = install("trl")["trl.experimental.ppo.ppo_trainer"]
    values, mask = randn(4, 6, seed=1), torch.arange(24).view(4, 6) % 3 > 0

    def run():
        x = values.clone().requires_grad_()
        means = ppo.masked_mean(x, mask), ppo.masked_mean(x, mask, axis=1)
        (means[0] + means[1].sum()).backward()
        return [
            *means, x.grad, ppo.masked_whiten(values, mask)[mask],
            ppo.masked_whiten(values, mask, shift_mean=False)[mask],
        ]  # fmt: skip

    before = run()
    with trl.patch():
        for k, (x, y) in enumerate(zip(before, run(), strict=True)):
            agree(f"output {k}", x, y)
        poisoned = values.masked_fill(~mask, torch.nan)
        assert_same_bits("NaN", ppo.masked_mean(poisoned, mask), ppo.masked_mean(values, mask))
        assert ppo.masked_mean(values, mask & False) == 0


def test_verl_results(modules_of):
    modules = modules_of("verl")
    functional = modules["verl.utils.torch_functional"]
    algorithms = modules["verl.trainer.ppo.core_algos"]
    logits, ids = batch()
    mask = (torch.arange(15).view(3, 5) % 4 > 0).float()
    rewards, values, returns = (randn(3, 5, seed=k) for k in (2, 3, 4))

    def run():
        z = logits.clone().requires_grad_()
        lp = functional.logprobs_from_logits(z, ids)
        entropy = functional.entropy_from_logits(z)
        chunked = functional.entropy_from_logits_with_chunking(z.view(-1, V))
        (lp.sum() + entropy.sum() - 0.3 * chunked.sum()).backward()
        advantages, targets = algorithms.compute_gae_advantage_return(
            rewards, values, mask, torch.tensor(0.97), 0.9
        )
        whitened = functional.masked_whiten(values, mask)
        return [lp, entropy, chunked, z.grad, *(x * mask for x in (advantages, targets, whitened))]

    def losses():
        v = values.clone().requires_grad_()
        options = [
            {}, {"loss_agg_mode": "token-sum"}, {"loss_agg_mode": "seq-mean-token-sum"},
            {"loss_agg_mode": "seq-mean-token-mean"}, {"batch_num_tokens": 40, "dp_size": 2},
            {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 7},
            {"loss_agg_mode": "seq-mean-token-sum-norm", "global_batch_size": 9, "dp_size": 3},
        ]  # fmt: skip
        found = []
        for o in options:
            loss, fraction = algorithms.compute_value_loss(v, returns, rewards, mask, 0.2, **o)
            found += [loss, fraction, torch.autograd.grad(loss, v)[0]]
        return found

    before = run(), losses()
    with verl.patch():
        after = run(), losses()
    for a, b in zip(before, after, strict=True):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            agree(f"output {k}", x, y)


@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+"])
def test_verl_kl_penalty(modules_of, kind):
    algorithms = modules_of("verl")["verl.trainer.ppo.core_algos"]

    def run():
        lp = (-3 * randn(4, 5, seed=1).abs()).requires_grad_()
        kl = algorithms.kl_penalty(lp, lp.detach() + randn(4, 5, seed=2), kind)
        return kl, torch.autograd.grad(kl.sum(), lp)[0]

    before = run()
    with verl.patch():
        after = run()
        with pytest.raises((KeyError, NotImplementedError)):  # what we do not know goes to verl
            algorithms.kl_penalty(torch.zeros(1), torch.zeros(1), "full")
    agree("kl", before[0], after[0])
    agree("gradient", before[1], after[1])


def test_openrlhf_results(modules_of):
    utils = modules_of("openrlhf")["openrlhf.models.utils"]
    logits, ids = batch()
    lp = -2 * randn(3, 5, seed=1).abs()
    ref = lp - 8 * randn(3, 5, seed=2)

    def run():
        kls = [utils.compute_approx_kl(lp, ref, kl_estimator=k) for k in ("k1", "k2", "k3")]
        return [
            # OpenRLHF divides its argument by the temperature in place.
            utils.log_probs_from_logits(logits.clone(), ids, 0.7), utils.compute_entropy(logits),
            utils.compute_approx_kl(lp, ref), *kls,
        ]  # fmt: skip

    before, kept = run(), logits.clone()
    with openrlhf.patch():
        after = run()
        utils.log_probs_from_logits(logits, ids, 0.7)
    assert_same_bits("logits", logits, kept)
    for k, (x, y) in enumerate(zip(before, after, strict=True)):
        agree(f"output {k}", x, y)


def test_openrlhf_keeps_what_we_do_not_compute(install):
    utils = install("openrlhf")["openrlhf.models.utils"]
    with openrlhf.patch(), pytest.raises(LookupError, match="the original"):
        utils.compute_approx_kl(torch.zeros(1), torch.zeros(1), unbiased_gradient=True)


def test_openrlhf_third_argument_of_older_versions(install):
    modules = install("openrlhf")
    utils = modules["openrlhf.models.utils"]

    def compute_approx_kl(log_probs, log_probs_base, kl_estimator="k1"):
        raise AssertionError("the original was called")

    utils.compute_approx_kl = compute_approx_kl
    with openrlhf.patch(force=True):
        out = utils.compute_approx_kl(torch.tensor([-1.0]), torch.tensor([-1.5]), "k3")
    torch.testing.assert_close(out, torch.tensor([0.1065]), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------- the real TRL


@pytest.fixture(scope="module")
def real_trl():
    module = pytest.importorskip("trl", reason="TRL is not installed")
    if module.__version__.split("+")[0] not in trl.KNOWN:
        pytest.skip(f"TRL {module.__version__} is not one of {', '.join(trl.KNOWN)}")
    return importlib.import_module("trl.trainer.utils")


def test_real_trl_logits(real_trl):
    logits, ids = batch()

    def run():
        z = logits.clone().requires_grad_()
        a = real_trl.selective_log_softmax(z, ids)
        b = real_trl.entropy_from_logits(z)
        (a.sum() + 0.3 * b.sum()).backward()
        return a, b, z.grad

    before = run()
    with trl.patch() as handle:
        after = run()
        assert "trl.trainer.utils:selective_log_softmax" in handle.sites
        assert "trl.trainer.utils:_ChunkedLogProbFunction" in handle.sites
    for k, (x, y) in enumerate(zip(before, after, strict=True)):
        agree(f"output {k}", x, y)
    for x, y in zip(before, run(), strict=True):
        assert_same_bits("after undo", x, y)


def test_real_trl_head(real_trl):
    original = real_trl._ChunkedLogProbFunction
    hidden, weight = randn(6, 8, seed=1).requires_grad_(), randn(V, 8, seed=2).requires_grad_()
    arguments = (hidden, weight, None, torch.arange(6), 0.8, 16, 20.0, 0.5, ("entropy",))
    if "bias" not in inspect.signature(original.forward).parameters:  # 1.12
        arguments = (hidden, weight, torch.arange(6), 0.8, 16, 20.0, 0.5)

    def run():
        out = real_trl._ChunkedLogProbFunction.apply(*arguments)
        loss = out[0].sum() + (0.3 * out[1].sum() if len(out) == 5 else 0)
        return out[0], out[1].detach(), *torch.autograd.grad(loss, (hidden, weight))

    before = run()
    with trl.patch():
        assert real_trl._ChunkedLogProbFunction is not original
        after = run()
    assert real_trl._ChunkedLogProbFunction is original
    for k, (x, y) in enumerate(zip(before, after, strict=True)):
        agree(f"output {k}", x, y)
