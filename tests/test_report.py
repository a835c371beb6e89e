"""The report of a run: complete, self-contained, and not disturbed by half a line or bad text."""

import base64
import io
import json
import os
from html.parser import HTMLParser

import pytest

from rlhf_fast.train import report

pytest.importorskip("matplotlib")

PPO = (
    *("score", "gold", "reward", "kl", "entropy", "clip_fraction", "approx_kl_k3", "policy_loss"),
    *("value_loss", "ptx_loss", "kl_coef", "length", "finished", "tokens_per_second"),
    *("learning_rate", "grad_norm"),
)


class Page(HTMLParser):
    """Texts, the images' titles and bytes, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.tags = [], [], {}, set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            attrs = dict(attrs)
            head, data = attrs["src"].split(",")
            assert head == "data:image/png;base64"
            self.images.setdefault(attrs["alt"], base64.b64decode(data))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(folder):
    target = report.write(folder)
    assert target == folder / "report.html"
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and "script" not in page.tags and "link" not in page.tags
    assert "http:" not in text and "https:" not in text  # nothing from outside
    return page


def write_lines(path, lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")


def test_ppo_run(tmp_path):
    lines = [
        {"step": i, "time": 1e9 + i} | {name: float(i + k) for k, name in enumerate(PPO)}
        for i in range(1, 31)
    ]
    for line in lines[9::10]:
        line |= {"eval_score": 1.0, "eval_gold": 0.5, "eval_kl": 2.0}
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "config.yaml").write_text("model: tiny\nkl_coef: 0.05\n")
    page = page_of(tmp_path)
    assert {
        "Proxy reward", "Gold reward", "Over-optimisation", "KL to the reference", "Entropy",
        "Clipped tokens", "KL coefficient", "Length of a response", "Throughput", "Learning rate",
    } <= set(page.images)  # fmt: skip
    assert all(png.startswith(b"\x89PNG") for png in page.images.values())
    text = "".join(page.texts)
    assert "kl_coef: 0.05" in text and "steps 1 to 30" in text
    assert not any("1e+09" in t for t in page.texts)  # the clock is no metric


def test_summary_of_first_last_best(tmp_path):
    values = {"loss": [3.0, 1.0, 2.0], "accuracy": [0.5, 0.75, 0.625], "kl": [0.0, 5.0, 4.0]}
    lines = [{"step": i} | {name: v[i] for name, v in values.items()} for i in range(3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    texts = page_of(tmp_path).texts
    assert texts[texts.index("loss") + 1 :][:3] == ["3", "2", "1 (step 1)"]
    assert texts[texts.index("accuracy") + 1 :][:3] == ["0.5", "0.625", "0.75 (step 1)"]
    assert texts[texts.index("kl") + 1 :][:2] == ["0", "4"]  # no direction is better
    assert "5 (step 1)" not in texts


@pytest.mark.parametrize(
    "tail", ['{"step": 3, "lo', '{"step": 3, "loss"', "\0\0\0", "7\n[1]\n{}\n"]
)
def test_what_a_kill_leaves_is_skipped(tmp_path, tail):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 1.75}]
    write_lines(tmp_path / "metrics.jsonl", lines, tail)
    assert report.read_metrics(tmp_path / "metrics.jsonl") == {
        "loss": [(1, 2.0), (2, 1.5)],
        "eval_loss": [(2, 1.75)],
    }
    assert list(page_of(tmp_path).images) == ["Loss"]


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN, "kl": null, "a": "x", "b": true, "c": [1], "d": 1e999}\n'
        '{"step": 2, "loss": 1.0}\n{"step": 2, "loss": 3.0}\n{"step": 1, "kl": 0.5}\n'
        '{"loss": 9.0}\n{"step": null, "loss": 9.0}\n{"step": 3, "e": 1' + "0" * 400 + "}\n"
    )
    series = report.read_metrics(tmp_path / "metrics.jsonl")
    assert series == {"loss": [(2, 3.0)], "kl": [(1, 0.5)]}
    page_of(tmp_path)


def test_steps_are_not_rounded(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2}, {"step": 123457, "loss": 1.0}])
    texts = page_of(tmp_path).texts
    assert "steps 1 to 123457" in texts and "1 (step 123457)" in texts


def test_one_line_and_nothing_at_all(tmp_path):
    page = page_of(tmp_path)
    assert not page.images and "no metrics yet" in page.texts
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "score": 1.0, "gold": 0.5, "kl": -0.1}])
    assert set(page_of(tmp_path).images) == {
        "Proxy reward", "Gold reward", "Over-optimisation", "KL to the reference",
    }  # fmt: skip


def test_unknown_metrics_have_a_plot_of_their_own(tmp_path):
    line = {
        "step": 1,
        "<mine & yours>": 1.0,
        "$\\no{$": 2.0,
        "eval_$\\no{$": 2.0,
        "eval_other": 2.0,
        "other": 1.0,
    }
    write_lines(tmp_path / "metrics.jsonl", [line])
    assert set(page_of(tmp_path).images) == {"<mine & yours>", "$\\no{$", "other"}


def test_long_runs_are_thinned(tmp_path):
    points = [(step, float(step % 2)) for step in range(10_000)]
    line = report.thin(points)
    assert len(line.x) == report.BINS
    assert min(line.low) == 0.0 and max(line.high) == 1.0
    assert all(abs(mean - 0.5) < 0.02 for mean in line.mean)
    short = report.thin(points[:7])
    assert short.mean == short.low == short.high == [y for _, y in points[:7]]
    names = ("score", "gold", "kl")
    lines = [{"step": i} | dict.fromkeys(names, i % 97 / 97) for i in range(20_000)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    page_of(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_samples_are_text_and_show_before_and_after(tmp_path):
    evil = "<script>alert('x')</script> & \ud83d\ude00 \u202e"
    lines = [
        {"step": step, "prompt": prompt, "response": f"{evil}{step}", "score": 0.123456789}
        for step in (0, 5, 10)
        for prompt in ("json.dumps(obj)\n", "<b>")
    ]
    lines[0]["gold"] = 0.5
    lines.append({"step": 10, "prompt": "half", "response": "\ud83d"})
    write_lines(tmp_path / "samples.jsonl", lines, '{"step": 20, "pro')
    texts = page_of(tmp_path).texts
    assert sum(f"{evil}0".replace("\ud83d\ude00", "\U0001f600") == t for t in texts) == 2
    assert sum(t.endswith("\u202e10") for t in texts) == 2
    assert not any(t.endswith("\u202e5") for t in texts)  # in between
    assert "0.12346" in texts and "0.5" in texts


def test_the_page_is_replaced_whole(tmp_path, monkeypatch):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    report.write(tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 2, "accuracy": 2.0}])
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_same_run_gives_the_same_page(tmp_path):
    lines = [{"step": i, "score": i**0.5, "gold": 1.0, "kl": float(i)} for i in range(50)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    first = report.write(tmp_path).read_bytes()
    assert report.write(tmp_path).read_bytes() == first


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="output: expected the folder of a run"):
        report.write(tmp_path / "missing")


def test_plots_show_what_is_in_the_series():
    """The line of a panel lies where its values are: high on the left, low on the right."""
    image = pytest.importorskip("PIL.Image")
    png = report.panel("Loss", "loss (nats)", {"loss": [(i, 100.0 - i) for i in range(100)]})
    picture = image.open(io.BytesIO(png)).convert("RGB")
    width, height = picture.size
    colour = tuple(int(report.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    found = [
        (x, y) for x in range(width) for y in range(height) if picture.getpixel((x, y)) == colour
    ]
    assert found
    left, right = min(found), max(found)
    assert left[0] < 0.25 * width and left[1] < 0.4 * height
    assert right[0] > 0.75 * width and right[1] > 0.6 * height
