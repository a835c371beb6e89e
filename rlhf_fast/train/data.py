"""Loaders: local files (.gz or not) and hub data sets become one kind of record.

A record is a prompt with completions, ranked where the source ranks them. SFT takes the best one,
the reward model all that are ranked, PPO the prompt, the pretraining gradient the whole text. A
malformed record raises `DataError` with its file and line (or record number).
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.train.config import FORMATS


class DataError(ValueError):
    """A record that is not what its format says; the message names file and line."""


@dataclass(frozen=True)
class Record:
    """A prompt and its completions; `ranks` (lower is better, equal is a tie) may be missing."""

    prompt: str
    completions: tuple[str, ...] = ()
    ranks: tuple[float, ...] | None = None
    category: str = ""

    @property
    def best(self) -> str:
        """The completion of the lowest rank, the first one where nothing is ranked."""
        if not self.completions:
            raise DataError("expected a completion in each record, got a prompt alone")
        if self.ranks is None:
            return self.completions[0]
        return self.completions[min(range(len(self.ranks)), key=self.ranks.__getitem__)]

    @property
    def has_pair(self) -> bool:
        """True if at least two completions differ in rank."""
        return self.ranks is not None and len(set(self.ranks)) > 1


# ---------------------------------------------------------------------------- one record per format


def _text(record: dict, key: str, *, empty: bool = False) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        got = "nothing" if key not in record else repr(value)[:60]
        raise DataError(f"expected a {'' if empty else 'non-empty '}text under {key!r}, got {got}")
    return value


def _hh(record: dict) -> Record:
    """Anthropic's HH-RLHF: two dialogues that share their beginning, up to an answer."""
    marker = "\n\nAssistant:"
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    cut = os.path.commonprefix([chosen, rejected]).rfind(marker)  # noqa: RUF071  (of characters)
    if cut < 0:
        raise DataError(f"expected chosen and rejected to share a prompt that ends with {marker!r}")
    cut += len(marker)
    completions = (chosen[cut:], rejected[cut:])
    tie = completions[0] == completions[1]
    return Record(chosen[:cut], completions, (0, 0) if tie else (0, 1))


SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def _gsm8k_solutions(record: dict) -> Record:
    """GSM8K's model solutions: four answers, rank 0 if correct, 1 if not."""
    completions, ranks = [], []
    for solver in SOLVERS:
        answer = record.get(solver)
        if not isinstance(answer, dict) or not isinstance(answer.get("is_correct"), bool):
            raise DataError(f"expected {{is_correct, solution}} under {solver!r}")
        completions.append(_text(answer, "solution"))
        ranks.append(0 if answer["is_correct"] else 1)
    return Record(_text(record, "question") + "\n", tuple(completions), tuple(ranks))


def _gsm8k(record: dict) -> Record:
    """GSM8K: a question and its worked answer."""
    return Record(_text(record, "question") + "\n", (_text(record, "answer"),))


def _instruction(record: dict) -> Record:
    """Instruction tuning: instruction (or prompt), input, and response (or output)."""
    if "instances" in record:
        instances = record["instances"]
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise DataError("expected a non-empty list of {input, output} under 'instances'")
        record = record | instances[0]
    prompt = _text(record, "instruction" if "instruction" in record else "prompt")
    extra = _text(record, "input", empty=True) if "input" in record else ""
    answers = [key for key in ("response", "output", "completion") if key in record]
    if "instruction" in record:
        prompt = "\n\n".join(part for part in (prompt, extra) if part) + "\n"
        if not answers:
            raise DataError("expected a text under 'response' or 'output', got nothing")
    return Record(prompt, tuple(_text(record, key) for key in answers[:1]))


def _ranked(record: dict) -> Record:
    """Ranked completions: prompt, completions, ranks (lower is better)."""
    completions, ranks = record.get("completions"), record.get("ranks")
    if not isinstance(completions, list) or not completions:
        raise DataError("expected a non-empty list of texts under 'completions'")
    if not all(isinstance(c, str) for c in completions):
        raise DataError("expected nothing but texts under 'completions'")
    if not isinstance(ranks, list) or len(ranks) != len(completions):
        raise DataError(f"expected {len(completions)} numbers under 'ranks', one per completion")
    for r in ranks:
        if isinstance(r, bool) or not isinstance(r, int | float) or not math.isfinite(r):
            raise DataError(f"expected finite numbers under 'ranks', got {r!r}")
    return Record(_text(record, "prompt"), tuple(completions), tuple(ranks))


_HHH = re.compile(
    r"###The instruction to evaluate:\n(.*?)\n\n"
    r"###Response to evaluate:\n(.*?)\n\n###Score Rubrics",
    re.DOTALL,
)


def _hhh(record: dict) -> Record:
    """The helpful, honest, harmless evaluation: an instruction, a better and a worse response."""
    found = []
    for key in ("chosen_instruction", "rejected_instruction"):
        match = _HHH.search(_text(record, key))
        if match is None:
            raise DataError(f"expected 'The instruction to evaluate' and a response in {key!r}")
        found.append(match)
    if found[0][1] != found[1][1]:
        raise DataError("expected chosen and rejected to share the instruction")
    answers = (found[0][2], found[1][2])
    return Record(found[0][1] + "\n", answers, (0, 1), _text(record, "source"))


def _plain(record: dict) -> Record:
    """Pretraining text, one document a record."""
    return Record("", (_text(record, "text"),))


PARSERS: dict[str, Callable[[dict], Record]] = {
    "hh": _hh,
    "gsm8k_solutions": _gsm8k_solutions,
    "gsm8k": _gsm8k,
    "instruction": _instruction,
    "ranked": _ranked,
    "hhh": _hhh,
    "text": _plain,
}


def detect(record: Any) -> str | None:
    """The format whose keys `record` has, or None."""
    keys = set(record) if isinstance(record, dict) else set()
    signs = {
        "hh": {"chosen", "rejected"},
        "hhh": {"chosen_instruction", "rejected_instruction"},
        "gsm8k_solutions": {"question", SOLVERS[0]},
        "gsm8k": {"question", "answer"},
        "ranked": {"prompt", "completions"},
    }
    found = [name for name, sign in signs.items() if sign <= keys]
    if not found and keys & {"instruction", "prompt"}:
        return "instruction"
    if not found and "text" in keys:
        return "text"
    return found[0] if found else None


# ------------------------------------------------------------------------------------------ sources


def read_text(path: Path) -> str:
    """The text of a file, unpacked if it starts with gzip's two magic bytes."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")  # a byte order mark would hide the first brace
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: expected UTF-8 text: {error.reason}") from None


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line; blank lines are skipped."""
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: expected a JSON object: {error}") from None


_NEXT = re.compile(r"[^ \t\r\n]|\Z")


def _skip(text: str, at: int) -> int:
    """The index of the first character from `at` on that is no white space, or the end."""
    found = _NEXT.search(text, at)
    return found.start() if found else len(text)


def _json_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of each element of one JSON list, whose first bracket opens `text`.

    Elements are decoded one by one: the place is the line on which the element begins.
    """
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: expected JSON: {error.msg}") from None
        yield f"{path}, line {line}", value
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise DataError(f"{path}, line {line}: expected ',' or ']' behind a record")
    if text[at + 1 :].strip():
        raise DataError(f"{path}: expected nothing behind the list of records")


def _hub(name: str) -> Iterator[tuple[str, Any]]:
    """Records of the hub data set `name` or `name:split` (train without one)."""
    name, _, split = name.partition(":")
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{name}: not a local file; reading it from the hub needs the package datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise OSError(
            f"{name}: not a local file, and the hub did not give it (no network, or no such data "
            f"set): {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name}[{split or 'train'}], record {number}", row


_TABLES = {".csv", ".tsv", ".parquet", ".arrow"}


def _is_path(source: str) -> bool:
    """Whether `source` means a file even if there is none: hub names are 'name' or 'owner/name'."""
    dotted = Path(source).suffix in (".jsonl", ".json", ".gz", ".txt", ".csv")
    return dotted or source.startswith((".", "/", "~")) or source.count("/") > 1


def load(source: str | Path, format: str = "auto") -> list[Record]:
    """All records of a file or a hub data set.

    Args:
        source: a path, or a hub name with an optional ":split".
        format: one of `FORMATS`; "auto" looks at the keys of the first record, and takes what is
            not JSON for plain text.

    Raises:
        DataError: a malformed record, with file, line and what was expected.
        FileNotFoundError, OSError: no such file, or a hub that cannot be reached.
    """
    if format not in FORMATS:
        raise ValueError(f"data_format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(source).expanduser()
    if not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(f"{path}: expected a file, got a folder")
        if _is_path(str(source)):
            raise FileNotFoundError(f"{path}: no such file")
        return _parse(_hub(str(source)), format, str(source))
    if format == "auto" and _TABLES.intersection(path.suffixes):
        raise DataError(
            f"{path}: expected JSON lines, a JSON list or plain text, got a table "
            "(data_format text takes it for plain text)"
        )
    text = read_text(path)
    start = text.lstrip()[:1]
    if format == "text" or (format == "auto" and start not in ("{", "[")):
        if not text.strip():
            raise DataError(f"{path}: expected text, got an empty file")
        return [Record("", (text,))]
    return _parse((_json_list if start == "[" else _json_lines)(path, text), format, str(path))


def _parse(values: Iterator[tuple[str, Any]], format: str, source: str) -> list[Record]:
    records = []
    for place, value in values:
        if format == "auto":
            format = detect(value) or ""
            if not format:
                found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise DataError(
                    f"{place}: expected the keys of one of {', '.join(PARSERS)}, got {found}"
                )
        if not isinstance(value, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(value).__name__}")
        try:
            records.append(PARSERS[format](value))
        except DataError as error:
            raise DataError(f"{place} (format {format}): {error}") from None
    if not records:
        raise DataError(f"{source}: expected records, got an empty file")
    return records
