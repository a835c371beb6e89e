"""The documentation: its Python runs, its links lead somewhere, and it says what there is."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast import cli, integrations
from rlhf_fast.train import config, data

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
ALL = "\n".join(TEXT.values())
BLOCKS = [
    pytest.param(code, id=f"{name}:{text[: text.index(code)].count(chr(10)) + 1}")
    for name, text in TEXT.items()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT[name]):
        if not target.startswith("http"):
            assert (folder / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", rlhf_fast.__all__)
def test_every_public_name_is_documented(name):
    assert re.search(rf"\b{name}\b", README + TEXT["docs/api.md"]), name


def test_first_screen_of_the_readme():
    """A newcomer runs two commands; nothing else is in the shell blocks of the first 40 lines."""
    lines = README.splitlines()
    assert len(lines) < 200
    blocks = re.findall(
        r"^```(?:sh|bash|shell|console)\n(.*?)^```", "\n".join(lines[:40]), re.S | re.M
    )
    commands = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert {"make demo", "make test"} <= set(commands)
    for command in commands:
        assert command in ("make demo", "make test") or command.startswith(("git clone ", "cd "))


def test_environment_variables_are_documented():
    sources = [*ROOT.glob("rlhf_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    sources += [*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    pattern = r"(?:environ\w*(?:\.get)?[(\[]|getenv\(|ENV\{)['\"]?(RLHF_FAST_\w+)"
    used = {name for path in sources for name in re.findall(pattern, path.read_text())}
    documented = set(re.findall(r"^\| `(\w+)` \|", TEXT["docs/environment.md"], re.MULTILINE))
    assert used <= documented and len(documented) <= 6
    for name in documented - used:
        assert name == "TRITON_INTERPRET" or name in (ROOT / "setup.py").read_text()


def test_options_and_commands_that_the_pages_name_exist():
    for name, text in TEXT.items():
        for command in re.findall(r"rlhf-fast (\w+)", text):
            assert command in (*cli.STAGES, "bench", "doctor", "info"), f"{name}: {command}"
    known = {*config.keys(), "config", "help", "key", "flag"}
    for option in re.findall(r"`--(\w+)", TEXT["docs/training.md"]):
        assert option in known, option
    for stage in cli.STAGES:
        assert f"**{stage}**" in TEXT["docs/training.md"] or f"rlhf-fast {stage}" in ALL


def test_commands_and_configurations_of_the_readme_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```yaml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    Path("ppo.yaml").write_text(block)
    lines = re.findall(r"^rlhf-fast (.*)$", README, re.MULTILINE)
    parsed = {}
    for line in lines:
        stage, *arguments = shlex.split(line)
        parsed[stage] = config.parse(stage, arguments)
    assert set(parsed) == set(cli.STAGES) - {"demo"}
    assert (parsed["ppo"].kl_target, parsed["ppo"].learning_rate) == (6.0, 2e-5)


def test_example_records_load(tmp_path):
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT["docs/training.md"], re.MULTILINE)
    formats = {name: cell for name, cell in rows if name in data.PARSERS}
    assert set(formats) == set(data.PARSERS)
    for name, cell in formats.items():
        example = re.search(r"`(\{.*?\})`", cell)[1]
        if "..." not in example:
            (tmp_path / "x.jsonl").write_text(json.dumps(json.loads(example)))
            assert len(data.load(tmp_path / "x.jsonl")) == 1, name


def test_versions_of_other_projects_are_those_of_the_patches():
    for project in ("trl", "verl", "openrlhf"):
        for version in getattr(integrations, project).KNOWN:
            assert version.removesuffix(".0") in README, (project, version)


def test_generated_pages_are_up_to_date():
    """`python benchmarks/report.py` writes them from the committed results and the registry."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    results = script.load(script.RESULTS)
    assert script.report(results) == TEXT["docs/RESULTS.md"]
    assert script.fill(README, "results", script.summary(results)) == README
    assert script.fill(README, "backends", script.backends()) == README
