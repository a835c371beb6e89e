"""The loaders: every format, real files where they are, and what a malformed record says."""

import gzip
import json
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from rlhf_fast.train import data
from rlhf_fast.train.data import DataError, Record, load

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"

HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
GSM8K = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
SOLUTIONS = {
    "question": "1 + 1?",
    "ground_truth": "2",
    "6b_finetuning": {"is_correct": False, "solution": "3"},
    "6b_verification": {"is_correct": True, "solution": "2"},
    "175b_finetuning": {"is_correct": False, "solution": "4"},
    "175b_verification": {"is_correct": True, "solution": "two"},
}
INSTRUCTION = {"instruction": "Add.", "input": "1 1", "response": "2"}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 0.5, 2]}


def judged(answer: str, instruction: str = "Be good.") -> str:
    return (
        f"Text.\n###The instruction to evaluate:\n{instruction}\n\n###Response to evaluate:\n"
        f"{answer}\n\n###Score Rubrics:\n..."
    )


HHH = {
    "source": "helpful",
    "chosen_instruction": judged("yes"),
    "rejected_instruction": judged("no"),
}
EXAMPLES = {
    "hh": (HH, Record("\n\nHuman: a\n\nAssistant:", (" b", " c"), (0, 1))),
    "gsm8k": (GSM8K, Record("1 + 1?\n", ("It is 2.\n#### 2",))),
    "gsm8k_solutions": (SOLUTIONS, Record("1 + 1?\n", ("3", "2", "4", "two"), (1, 0, 1, 0))),
    "instruction": (INSTRUCTION, Record("Add.\n\n1 1\n", ("2",))),
    "ranked": (RANKED, Record("p", ("a", "b", "c"), (2, 0.5, 2))),
    "hhh": (HHH, Record("Be good.\n", ("yes", "no"), (0, 1), "helpful")),
    "text": ({"text": "Once."}, Record("", ("Once.",))),
}


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


# -------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize("format", EXAMPLES)
def test_each_format_is_read_and_detected(tmp_path, format):
    value, expected = EXAMPLES[format]
    path = write(tmp_path / "x.jsonl", value, value)
    assert load(path) == [expected, expected]
    assert load(str(path), "auto" if format == "text" else format) == [expected, expected]
    (tmp_path / "x.json").write_text(json.dumps([value, value], indent=2))
    assert load(tmp_path / "x.json") == [expected, expected]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert load(tmp_path / "x.jsonl.gz") == [expected, expected]


def test_every_parser_has_an_example_and_a_name():
    assert set(EXAMPLES) == set(data.PARSERS) == set(data.FORMATS) - {"auto"}


def test_gzip_is_told_by_its_bytes_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x").write_bytes(gzip.compress(json.dumps(GSM8K).encode()))
    (tmp_path / "y.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GSM8K).encode())
    assert load(tmp_path / "x") == load(tmp_path / "y.jsonl") == [EXAMPLES["gsm8k"][1]]


def test_plain_text_is_one_record(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("To be,\n\nor not.\n")
    assert load(path) == [Record("", ("To be,\n\nor not.\n",))]
    path.write_text("[Enter a king]\n")
    assert load(path, "text") == [Record("", ("[Enter a king]\n",))]
    with pytest.raises(DataError, match=r"line 1: expected JSON"):
        load(path)


def test_blank_lines_and_line_separators_inside_strings(tmp_path):
    record = {"question": "a\u2028b?", "answer": "c"}
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps(record, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert load(path) == [Record("a\u2028b?\n", ("c",))]


def test_best_and_pairs():
    assert Record("p", ("a", "b", "c"), (2, 0, 1)).best == "b"
    assert Record("p", ("a", "b"), (1, 1)).best == Record("p", ("a", "b")).best == "a"
    assert Record("p", ("a", "b"), (0, 1)).has_pair
    for record in (Record("p", ("a", "b"), (1, 1)), Record("p", ("a",)), Record("p")):
        assert not record.has_pair
    with pytest.raises(DataError, match="completion"):
        _ = Record("p").best


def test_dialogues_that_differ_early_or_not_at_all(tmp_path):
    beginning = "\n\nHuman: a\n\nAssistant: b\n\nHuman: "
    early = {
        "chosen": beginning + "x\n\nAssistant: c",
        "rejected": beginning + "y\n\nAssistant: d",
    }
    same = {"chosen": HH["chosen"], "rejected": HH["chosen"]}
    first, second = load(write(tmp_path / "x.jsonl", early, same))
    assert first.prompt == "\n\nHuman: a\n\nAssistant:"
    assert first.completions == (
        " b\n\nHuman: x\n\nAssistant: c", " b\n\nHuman: y\n\nAssistant: d",
    )  # fmt: skip
    assert second.ranks == (0, 0) and not second.has_pair


def test_self_instruct_and_alpaca_and_prompts(tmp_path):
    records = [
        {"instruction": "Add.", "instances": [{"input": "", "output": "2"}, {"output": "3"}]},
        {"instruction": "Add.", "output": "2"},
        {"prompt": "Say ", "completion": "hi"},
        {"prompt": "Say "},
    ]
    loaded = load(write(tmp_path / "x.jsonl", *records))
    assert [r.prompt for r in loaded] == ["Add.\n", "Add.\n", "Say ", "Say "]
    assert [r.completions for r in loaded] == [("2",), ("2",), ("hi",), ()]


# ------------------------------------------------------------------------------- malformed records

BAD = {
    "hh": [
        {"chosen": "x"},
        {"chosen": "x", "rejected": 3},
        {"chosen": "Human: x", "rejected": "Human: y"},
        {"chosen": "", "rejected": HH["rejected"]},
    ],
    "gsm8k": [{"question": "x"}, {"question": "x", "answer": " "}, {"answer": "x"}],
    "gsm8k_solutions": [
        {**SOLUTIONS, "6b_finetuning": None},
        {**SOLUTIONS, "6b_finetuning": {"is_correct": 1, "solution": "x"}},
        {**SOLUTIONS, "175b_verification": {"is_correct": True}},
    ],
    "instruction": [
        {"instruction": "x"},
        {"instruction": "x", "instances": []},
        {"instruction": "x", "input": None, "output": "y"},
        {"instruction": 3, "output": "y"},
    ],
    "ranked": [
        {**RANKED, "ranks": [1, 2]},
        {**RANKED, "ranks": [1, 2, True]},
        {**RANKED, "ranks": [1, 2, float("nan")]},
        {**RANKED, "completions": "abc"},
        {**RANKED, "completions": [], "ranks": []},
        {**RANKED, "completions": ["a", "b", None]},
    ],
    "hhh": [
        {**HHH, "chosen_instruction": "nothing of the kind"},
        {**HHH, "rejected_instruction": judged("no", "Be bad.")},
        {**HHH, "source": None},
    ],
    "text": [{"text": ""}, {"other": "x"}],
}


@pytest.mark.parametrize("format", BAD)
def test_a_malformed_record_names_file_line_and_expectation(tmp_path, format):
    good = EXAMPLES[format][0]
    for bad in BAD[format]:
        path = write(tmp_path / "x.jsonl", good, good, bad, good)
        if format != "text":  # as a file, "text" is the whole file
            with pytest.raises(DataError, match=rf"x\.jsonl, line 3 \(format {format}\): expected"):
                load(path, format)
        with pytest.raises(DataError, match=rf"x\.jsonl, line 3 \(format {format}\): expected"):
            load(path)
        path = tmp_path / "x.json"
        path.write_text("[\n" + ",\n".join(json.dumps(r) for r in (good, bad)) + "\n]\n")
        with pytest.raises(DataError, match=rf"x\.json, line 3 \(format {format}\): expected"):
            load(path)


@pytest.mark.parametrize("value", [3, None, "text", [1]])
def test_a_record_that_is_no_object(tmp_path, value):
    path = write(tmp_path / "x.jsonl", HH, value)
    with pytest.raises(DataError, match=r"line 2: expected a JSON object, got"):
        load(path, "hh")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": ', r"line 2: expected a JSON object"),
        ('[\n{"question": "a", "answer": "b"},\n{"question": oops}]', r"line 3: expected JSON"),
        ('[\n{"question": "a", "answer": "b"}\n{}]', r"line 3: expected ',' or '\]'"),
        ('[\n{"question": "a", "answer": "b"}\n', r"line 3: expected"),
        ('[{"question": "a", "answer": "b"}] tail', r"nothing behind"),
        ("[]", "expected records, got an empty file"),
        ('{"unknown": 1}', r"line 1: expected the keys of one of hh, .*got unknown"),
        ('["a"]', r"line 1: expected the keys of one of .*got str"),
        ("", "expected text, got an empty file"),
        (" \n", "expected text, got an empty file"),
    ],
)
def test_a_file_that_is_broken(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_an_empty_file_of_a_named_format(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(DataError, match="expected records, got an empty file"):
        load(tmp_path / "x.jsonl", "hh")


def test_a_damaged_gzip_file_and_bytes_that_are_no_text(tmp_path):
    packed = gzip.compress(json.dumps(GSM8K).encode() * 50)
    flipped = bytearray(packed)
    flipped[len(flipped) // 2] ^= 0xFF
    for name, raw in (("cut", packed[:-12]), ("flipped", bytes(flipped)), ("stub", packed[:5])):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(raw)
        with pytest.raises(DataError, match=f"{name}.gz: damaged gzip file"):
            load(path)
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(DataError, match=r"x.txt, line 2: expected UTF-8"):
        load(tmp_path / "x.txt")


def test_a_table_is_not_taken_for_text(tmp_path):
    for name in ("x.csv", "x.tsv", "x.csv.gz", "x.parquet"):
        (tmp_path / name).write_text("question,answer\na,b\n")
        with pytest.raises(DataError, match=f"{name}: expected JSON lines.*got a table"):
            load(tmp_path / name)
    assert load(tmp_path / "x.csv", "text") == [Record("", ("question,answer\na,b\n",))]


def test_what_is_no_file(tmp_path):
    for missing in (tmp_path / "x.jsonl", "./x", "x.json", "a/b/c", "~/no-such-file"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(missing)
    with pytest.raises(IsADirectoryError, match="got a folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"data_format: expected one of auto, hh.*'csv'"):
        load(tmp_path / "x.csv", "csv")


# ---------------------------------------------------------------------------------------- hub names


@pytest.fixture
def hub(monkeypatch):
    """The package `datasets`, replaced: no test touches the network."""
    calls = []
    module = types.ModuleType("datasets")

    def load_dataset(name, split):
        calls.append((name, split))
        if name == "nobody/nothing":
            raise ConnectionError("cannot reach\nthe hub")
        return [HH, {"chosen": "x"}] if name == "owner/bad" else [HH]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_names(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = [EXAMPLES["hh"][1]]
    assert load("owner/name") == load("name:test") == load("owner/name:test[:10]", "hh") == expected
    assert hub == [("owner/name", "train"), ("name", "test"), ("owner/name", "test[:10]")]


def test_hub_errors_name_the_data_set(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"nobody/nothing: not a local.*ConnectionError: cannot"):
        load("nobody/nothing")
    with pytest.raises(DataError, match=r"owner/bad\[train\], record 2 \(format hh\): expected"):
        load("owner/bad")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="needs the package datasets"):
        load("owner/name")


# ----------------------------------------------------------------------------------- the real files


def real(name: str) -> Path:
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"the data of other projects is not here: {name}")
    return path


# No assertion below compares texts, so that a failure prints none.


def test_hh_rlhf():
    records = load(real("hh_rlhf_harmless_test.jsonl.gz"))
    assert len(records) == 2312
    assert all(len(r.completions) == 2 and r.prompt.endswith("\n\nAssistant:") for r in records)
    assert Counter(r.ranks for r in records)[(0, 1)] >= 2300
    last = sum("\n\nAssistant:" not in r.completions[0] + r.completions[1] for r in records)
    assert last == 2307  # in five pairs the dialogues part before the last answer


def test_gsm8k_solutions():
    records = load(real("gsm8k_model_solutions.jsonl.gz"))
    assert len(records) == 1319 and all(len(r.completions) == 4 for r in records)
    assert sum(r.has_pair for r in records) == 731
    pairs = sum(a < b for r in records for a in r.ranks for b in r.ranks)
    assert pairs == 2429
    assert all(r.ranks[r.completions.index(r.best)] == min(r.ranks) for r in records)


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8k(split, count):
    records = load(real(f"gsm8k_{split}.jsonl.gz"))
    assert len(records) == count
    assert all("####" in r.best and r.ranks is None for r in records)


def test_hhh():
    records = load(real("hhh_alignment_eval.json.gz"))
    counts = Counter(r.category for r in records)
    assert counts == {"honest": 61, "helpful": 59, "harmless": 58, "other": 43}
    assert all(r.has_pair and len(r.completions) == 2 for r in records)


def test_self_instruct():
    records = load(real("self_instruct_seed_tasks.jsonl"))
    assert len(records) == 175 and all(r.best and r.prompt for r in records)


def test_tinyshakespeare():
    (record,) = load(real("tinyshakespeare.txt"))
    assert len(record.best) == 1_115_394 and not record.prompt
