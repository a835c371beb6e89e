"""What is installed: a wheel and an editable checkout, from any folder, beside a package `kernels`.

The package is built once, in a copy, without CUDA, without isolation and without a network.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
SOURCES = ("rlhf_fast", "kernels", "csrc", "setup.py", "CMakeLists.txt", "pyproject.toml")
FILES = (*SOURCES, "MANIFEST.in", "README.md", "LICENSE")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Prints where things come from, after using the native module.
USE = """
import torch, rlhf_fast, rlhf_fast.kernels.gae.op, rlhf_fast._C
with rlhf_fast.use_backend("cpu"):
    out = rlhf_fast.gae(torch.ones(2, 3), torch.zeros(2, 3), lam=1.0).returns
assert out.tolist() == [[3.0, 2.0, 1.0]] * 2
for module in (rlhf_fast, rlhf_fast.kernels.gae.op, rlhf_fast._C):
    print(module.__file__)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed, without our own paths in its environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RLHF_FAST", "PYTHONPATH"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build needs."""
    for module in ("setuptools", "pybind11", "pip"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"a build without isolation needs {module}")
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool, path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"):
            pytest.skip(f"a build without isolation needs {tool}")
    copy = tmp_path_factory.mktemp("copy") / "rlhf_fast"
    copy.mkdir()
    for name in FILES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A compiler that does not optimise: what is tested here is not the speed of the kernels."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(
        '#!/bin/sh\nfor a; do shift; [ "$a" = -O3 ] && a=-O0; set -- "$@" "$a"; done\n'
        'exec c++ "$@"\n'
    )
    path.chmod(0o755)
    return path


def pip(*arguments: object, cwd: Path, compiler: Path, python: Path | str = sys.executable) -> str:
    return run(
        sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check",
        *arguments, "--no-deps", "--no-build-isolation", "--no-index", cwd=cwd,
        RLHF_FAST_CUDA="OFF", CXX=str(compiler), PIP_CONSTRAINT="",
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(checkout, compiler) -> Path:
    target = checkout / "dist"
    pip("wheel", checkout, "--wheel-dir", target, cwd=checkout.parent, compiler=compiler)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, compiler, tmp_path_factory) -> Path:
    """A folder into which pip has installed the wheel."""
    target = tmp_path_factory.mktemp("site")
    pip("install", wheel, "--target", target, cwd=target, compiler=compiler)
    return target


# ---------------------------------------------------------------------------------------- the wheel


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"rlhf_fast", f"rlhf_fast-{version}.dist-info"}
    expected = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rlhf_fast").rglob("*.py")
        if "__pycache__" not in path.parts
    ]
    for room in ROOMS:
        for path in (ROOT / "kernels" / room).glob("*.py"):
            expected.append(f"rlhf_fast/kernels/{room}/{path.name}")
    python = {name for name in names if name.endswith(".py")}
    assert python == set(expected)
    native = [name for name in names if name.endswith((".so", ".pyd"))]
    assert len(native) == 1 and native[0].startswith("rlhf_fast/_C.")
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == PROJECT["dependencies"] and needed[0].startswith("torch")
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "make demo" in metadata.get_payload()
    assert "rlhf-fast = rlhf_fast.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_source_distribution_has_what_a_build_needs(checkout, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=checkout)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        file.relative_to(checkout).as_posix()
        for name in SOURCES
        for file in ([checkout / name] if "." in name else (checkout / name).rglob("*.*"))
        if file.suffix in (".py", ".h", ".cuh", ".cpp", ".cu", ".txt", ".toml")
    }
    assert needed <= names, sorted(needed - names)


def test_native_module_knows_no_torch(site):
    """It loads without torch, so one wheel serves every torch version."""
    code = """
import importlib.util, pathlib, sys
sys.modules["torch"] = None
(path,) = pathlib.Path(sys.argv[1]).glob("rlhf_fast/_C*")
spec = importlib.util.spec_from_file_location("_C", path)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
    run(sys.executable, "-c", code, site, cwd=site)


def test_wheel_from_any_folder(site, tmp_path):
    # -P: the current folder is not on the path, as for an installed command.
    for cwd in (tmp_path, ROOT):
        places = run(sys.executable, "-P", "-c", USE, cwd=cwd, PYTHONPATH=str(site)).split()
        assert all(Path(place).is_relative_to(site) for place in places), places
    command = site / "bin" / "rlhf-fast"
    text = run(sys.executable, "-P", command, "info", cwd=tmp_path, PYTHONPATH=str(site))
    assert str(site) in text


def test_editable_from_any_folder(checkout, compiler, tmp_path):
    """An editable install, in an environment of its own beside our packages."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    libraries = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (Path(libraries) / "beside.pth").write_text("\n".join(paths) + "\n")
    pip("install", "-e", checkout, cwd=tmp_path, compiler=compiler, python=python)
    inside = checkout.resolve()
    for cwd in (tmp_path, inside):
        places = [Path(place).resolve() for place in run(python, "-c", USE, cwd=cwd).split()]
        assert all(place.is_relative_to(inside) for place in places), (cwd, places)


# ----------------------------------------------------------------- Hugging Face's package `kernels`


@pytest.fixture
def hugging_face(tmp_path) -> Path:
    """A folder with a package that is called as Hugging Face's, and its metadata."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '99.0'\n")
    information = tmp_path / "kernels-99.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    return tmp_path


def test_kernels_is_not_shadowed_from_the_checkout(hugging_face):
    code = """
import importlib.util, kernels, torch, rlhf_fast
print(importlib.util.find_spec("kernels").origin)
print(kernels.__version__)
rlhf_fast.logprob(torch.zeros(1, 2), torch.tensor([0]))
print(rlhf_fast.kernels.logprob.op.__file__)
"""
    out = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(hugging_face)).split()
    assert out[0] == str(hugging_face / "kernels" / "__init__.py") and out[1] == "99.0"
    assert Path(out[2]).is_relative_to(ROOT / "kernels")


def test_there_is_no_module_kernels_without_it():
    """transformers must not take the folder for the package, in the root of the checkout either."""
    code = """
import importlib.util
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None, spec  # at most a folder, never a module
import rlhf_fast
"""
    run(sys.executable, "-c", code, cwd=ROOT)


def test_transformers_works_from_the_checkout():
    pytest.importorskip("transformers")
    code = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import rlhf_fast
size = dict(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1)
model = LlamaForCausalLM(LlamaConfig(**size))
ids = torch.tensor([[1, 2, 3]])
print(rlhf_fast.logprob(model(ids).logits[:, :-1], ids[:, 1:]).shape)
"""
    assert "[1, 2]" in run(sys.executable, "-c", code, cwd=ROOT)


# ------------------------------------------------------------------------------ what may be missing


@pytest.mark.parametrize(
    "missing",
    [
        ["triton", "transformers", "tokenizers", "accelerate", "datasets", "safetensors"],
        ["rlhf_fast._C", "yaml", "matplotlib", "tqdm", "numpy", "hypothesis"],
    ],
    ids=lambda names: names[0],
)
def test_import_without(missing):
    code = f"""
import sys
for name in {missing!r}:
    sys.modules[name] = None
import torch, rlhf_fast
from rlhf_fast import cli
out = rlhf_fast.logprob_entropy(torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 1]))
(out.logprob.sum() + out.entropy.sum()).backward()
rlhf_fast.gae(torch.ones(1, 3), torch.zeros(1, 3))
assert rlhf_fast.backends()["gae"]["reference"] is True
assert rlhf_fast.preset("trl") and rlhf_fast.integrations.trl
print(cli.info_text())
"""
    text = run(sys.executable, "-c", code, cwd=ROOT)
    reasons = {"triton": "triton is not installed", "rlhf_fast._C": "_C is not built"}
    assert reasons.get(missing[0], "") in text


def test_import_is_lazy():
    """Nobody who wants a kernel waits for transformers, Triton or a plot library."""
    code = """
import sys, torch
before = set(sys.modules)
import rlhf_fast
heavy = {"transformers", "triton", "accelerate", "datasets", "matplotlib", "yaml", "trl", "verl"}
assert not heavy & set(sys.modules) - before, heavy & set(sys.modules) - before
"""
    run(sys.executable, "-c", code, cwd=ROOT)
