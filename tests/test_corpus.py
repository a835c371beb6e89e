"""The demo's corpus: clean, split without leaks, the same every time; its gold reward ranks."""

import functools
import random
import re
import statistics
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.train import corpus


@pytest.fixture(scope="module")
def sides():
    return corpus.records()


@pytest.fixture(scope="module")
def tokenizer(sides):
    return corpus.tokenizer([corpus.text(), *(r.prompt + r.best for r in sides[0])])


def normal(text):
    return " ".join(re.findall("[a-z0-9]+", text.lower()))


def test_there_are_enough_records(sides):
    train, held_out = sides
    assert len(train) >= 3000
    assert len(held_out) >= 300
    assert len(corpus.text()) > 500_000


def test_records_are_clean(sides):
    for record in sides[0] + sides[1]:
        assert re.fullmatch(r"[^\n]{2,50}\n", record.prompt), record
        assert len(record.prompt) <= corpus.MAX_PROMPT
        (response,) = record.completions
        assert response == " ".join(response.split())
        assert response.isascii() and len(response) <= corpus.MAX_RESPONSE
        assert len(response.split()) >= corpus.MIN_WORDS
        assert not re.search(r">>>|::|0x[0-9a-f]{6}", response)


def test_the_split_leaks_nothing(sides):
    train, held_out = sides
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert not {normal(r.best) for r in train} & {normal(r.best) for r in held_out}
    last = [{re.split(r"[(\n]", r.prompt)[0].split(".")[-1].lower() for r in s} for s in sides]
    assert not last[0] & last[1]
    openings = [{tuple(r.best.lower().split()[:8]) for r in side} for side in sides]
    assert not openings[0] & openings[1]
    lines = set(corpus.text().split("\n"))
    assert not [r for r in held_out if r.best in lines]


def test_known_records(sides):
    found = {r.prompt: r.best for r in sides[0] + sides[1]}
    assert found["textwrap.dedent(text)\n"].startswith("Remove any common leading whitespace")
    assert found["list.append(object)\n"] == "Append object to the end of the list."
    assert found["gettext\n"] == "Internationalization and localization support."


def test_the_seed_orders_and_nothing_else(sides):
    again, other = corpus.records(0), corpus.records(1)
    assert (again[0], again[1]) == (sides[0], sides[1])
    assert other[0] != sides[0]
    for a, b in zip(other, sides, strict=True):
        assert {r.prompt for r in a} == {r.prompt for r in b}


def test_another_process_sees_the_same(sides):
    """Libraries that patch the standard library (transformers adds to Logger) change nothing."""
    code = (
        "import transformers, zlib; from rlhf_fast.train import corpus; t, h = corpus.records(3);"
        "print(zlib.crc32(repr((t, h, corpus.text())).encode()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    train, held_out = corpus.records(3)
    assert int(out.stdout) == zlib.crc32(repr((train, held_out, corpus.text())).encode())


# ----------------------------------------------------------------------------- gold


def test_gold_by_hand():
    """Each part moves the value as the formula of the docstring says."""
    prompt, good = "file.name(object)\n", "Return the name of the file object."
    score = corpus.gold(prompt, good, True)
    assert score == pytest.approx(1.0)  # all pairs known, 6 distinct words, 2 and more taken up
    assert corpus.gold(prompt, good, False) == pytest.approx(score - 0.10)
    assert corpus.gold(prompt, good[:-1], True) == pytest.approx(score - 0.10)
    assert corpus.gold(prompt, good.lower(), True) == pytest.approx(score - 0.05)
    assert corpus.gold("gc.enable()\n", good, True) == pytest.approx(score - 0.25)
    assert corpus.gold("gc.file()\n", good, True) == pytest.approx(score - 0.125)
    # 2 of 2 words distinct, 1 of 2 known, the pair unknown; one of two words taken up
    few = 0.05 + 0.15 * 2 / 6 + 0.35 * 0.5**2 * 0 + 0.25 / 2
    assert corpus.gold(prompt, "File qzxv", False) == pytest.approx(few)
    # 13 pairs, 7 different, one ("object return") not known or 13 known
    twice = corpus.gold(prompt, f"{good} {good}", True)
    expected = [0.65 + 0.35 * fluent * 7 / 13 for fluent in (12 / 13, 1.0)]
    assert min(abs(twice - value) for value in expected) < 1e-9


@pytest.mark.parametrize("response", ["", " \n", "...", "( . )"])
def test_gold_of_nothing_is_zero(response):
    assert corpus.gold("gc.enable()\n", response, True) == 0.0


@given(st.text(max_size=60), st.text(max_size=200), st.booleans())
def test_gold_is_a_number_from_0_to_1(prompt, response, finished):
    assert 0.0 <= corpus.gold(prompt, response, finished) <= 1.0 + 1e-12


def test_gold_ranks_text_by_how_good_it_is(sides, tokenizer):
    rng = random.Random(0)
    train, held_out = sides

    def mean(write, finished=True):
        return statistics.mean(corpus.gold(r.prompt, write(r), finished) for r in held_out)

    def shuffled(record):
        return " ".join(rng.sample(words := record.best.split(), len(words)))

    def junk(_):
        return tokenizer.decode([rng.randrange(3, 1024) for _ in range(40)])

    real = mean(lambda r: r.best)
    cheats = {
        "another prompt's": mean(lambda _: rng.choice(train).best),
        "one for all": mean(lambda _: "Return the name of the file object."),
        "shuffled": mean(shuffled),
        "a phrase repeated": mean(lambda _: "Return the value. " * 8),
        "the prompt": mean(lambda r: r.prompt),
        "a word repeated": mean(lambda _: "the " * 30),
        "tokens at random": mean(junk, False),
    }
    assert real > 0.75
    assert all(value < real - 0.02 for value in cheats.values()), (real, cheats)
    assert cheats["shuffled"] < real - 0.2
    assert max(cheats["tokens at random"], cheats["a word repeated"]) < 0.2


def test_gold_ranks_samples_of_a_weak_model(sides):
    """Noisy copies of a response differ in gold, and the noisier is the worse."""
    rng = random.Random(0)
    words = corpus.text().split()[:20_000]

    def noisy(record, share):
        return " ".join(
            rng.choice(words) if rng.random() < share else w for w in record.best.split()
        )

    means = [
        statistics.mean(corpus.gold(r.prompt, noisy(r, share), True) for r in sides[1])
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert means == sorted(means, reverse=True)
    scores = [[corpus.gold(r.prompt, noisy(r, 0.5), True) for _ in range(4)] for r in sides[1]]
    assert statistics.mean(len(set(s)) for s in scores) > 3  # of 4: few ties


# ----------------------------------------------------------------------------- tokenizer


def test_tokenizer_fits_the_lengths(sides, tokenizer):
    assert len(tokenizer) == 1024
    for length, part in ((32, "prompt"), (64, "best")):
        lengths = [len(tokenizer(getattr(r, part))["input_ids"]) for r in sides[0] + sides[1]]
        assert sum(n <= length for n in lengths) > 0.99 * len(lengths)


def test_tokenizer_special_tokens(tokenizer):
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert ids == {0, 1, 2}
    assert not ids & set(tokenizer("Return the name.")["input_ids"])


@functools.cache
def _small_tokenizer():
    return corpus.tokenizer(["Return the name of the file."] * 3, 300)


@given(st.text(max_size=60))
def test_tokenizer_gives_back_any_text(text):
    small = _small_tokenizer()
    if not any(token in text for token in (corpus.PAD, corpus.BOS, corpus.EOS)):
        assert small.decode(small(text)["input_ids"]) == text


def test_tokenizer_is_deterministic(sides):
    texts = [r.best for r in sides[1]]
    first, second = (corpus.tokenizer(texts, 512).get_vocab() for _ in range(2))
    assert first == second


def test_tokenizer_saves_and_loads(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Return the  name, of\nthe file ."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)


def test_tokenizer_too_small():
    with pytest.raises(ValueError, match="vocabulary: expected at least 259, got 100"):
        corpus.tokenizer(["a"], 100)
