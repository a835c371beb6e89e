"""A run's metrics.jsonl as one page, report.html: plots, a table, completions, the configuration.

The page needs nothing beside itself: images are in it as base64, there is no script and no network.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Series = list[tuple[float, float]]  # (step, value), in the order of steps
Point = tuple[float, float, float]  # (sqrt(kl), value, step)

# (title, label of the y axis with its unit, metrics). Each metric is drawn with its eval_ twin.
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "loss (nats)", ("loss",)),
    ("Accuracy", "share that is right", ("accuracy",)),
    ("Proxy reward", "reward model's score", ("score",)),
    ("Gold reward", "gold reward", ("gold",)),
    ("Reward after the KL penalty", "reward per sequence", ("reward",)),
    ("KL to the reference", "KL (nats per sequence)", ("kl",)),
    ("KL coefficient", "reward per nat", ("kl_coef",)),
    ("Entropy", "entropy (nats per token)", ("entropy",)),
    ("Clipped tokens", "share of tokens", ("clip_fraction", "value_clip_fraction")),
    ("KL of the update", "KL (nats per token)", ("approx_kl", "approx_kl_k3")),
    ("Probability ratio", "new / old, mean", ("ratio_mean",)),
    ("Policy loss", "loss", ("policy_loss",)),
    ("Value loss", "squared error", ("value_loss",)),
    ("Pretraining loss", "loss (nats per token)", ("ptx_loss",)),
    ("Length of a response", "tokens", ("length",)),
    ("Responses that ended by themselves", "share of responses", ("finished",)),
    ("Learning rate", "learning rate", ("learning_rate",)),
    ("Gradient norm", "norm before clipping", ("grad_norm",)),
    ("Throughput", "tokens per second", ("tokens_per_second",)),
    ("Throughput", "completions per second", ("completions_per_second",)),
    ("Time of a step", "seconds", ("seconds_sampling", "seconds_learning")),
    ("Sampler against trainer", "nats per token", ("sampler_gap", "sampler_max", "sampler_k3")),
    ("Sampler against trainer", "effective share of the tokens", ("sampler_ess",)),
)
LOWER_IS_BETTER = {"loss", "ptx_loss", "value_loss"}
HIGHER_IS_BETTER = {
    "accuracy", "score", "gold", "reward", "finished",
    "tokens_per_second", "completions_per_second",
}  # fmt: skip
NOT_PLOTTED = {"step", "time"}
COLOURS = ("#2f6690", "#d1603d", "#5b8e4c", "#8c5e9e")
BINS = 300  # longer series are drawn as the mean and the range of this many stretches
SAMPLES = 10


# ------------------------------------------------------------------------------------------ reading


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file. A killed run may leave half a line at its end: it is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def read_metrics(path: Path) -> dict[str, Series]:
    """The finite numbers of each metric; where a step occurs twice, the later line counts."""
    series: dict[str, dict[float, float]] = defaultdict(dict)
    for line in _lines(path):
        step = line.get("step")
        if type(step) is int:
            for name, value in line.items():
                if name not in NOT_PLOTTED and _number(value):
                    series[name][step] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def _base(name: str) -> str:
    return name.removeprefix("eval_")


# ---------------------------------------------------------------------------------------- plotting


class Thin(NamedTuple):
    """Means and ranges of at most BINS stretches of a series."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def thin(points: Sequence[tuple[float, float]]) -> Thin:
    """`points` in at most BINS stretches of equal count: means of x and y, range of y."""
    n, bins = len(points), min(len(points), BINS)
    parts = [points[n * i // bins : n * (i + 1) // bins] for i in range(bins)]
    columns = [list(zip(*part, strict=True)) for part in parts]
    return Thin(
        [math.fsum(x) / len(x) for x, _ in columns],
        [math.fsum(y) / len(y) for _, y in columns],
        [min(y) for _, y in columns],
        [max(y) for _, y in columns],
    )


def _figure(rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes, one above the other, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 2.5 * rows + 0.3
    figure = Figure(figsize=(7.2, height), dpi=130)
    figure.subplots_adjust(0.13, 0.5 / height, 0.98, 1 - 0.32 / height, hspace=0.08)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        axis.yaxis.set_major_formatter("{x:.5g}")  # no 1e-5 above the axis, where the title is
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5, color="#999999")
        axis.spines[["left", "bottom"]].set_color("#999999")
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # to matplotlib, text between dollars is mathematics


def _limits(axis: Any, lines: list[Thin]) -> None:
    """A y range without its outermost hundredths where they would flatten the rest to a third."""
    lows = sorted(y for line in lines for y in line.low)
    highs = sorted(y for line in lines for y in line.high)
    low, high = lows[len(lows) // 100], highs[-1 - len(highs) // 100]
    if 0 < 3 * (high - low) < highs[-1] - lows[0]:
        axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def panel(title: str, label: str, series: dict[str, Series]) -> bytes:
    """A PNG of `series` against the step: dots where few, mean and range where many."""
    from matplotlib.ticker import MaxNLocator

    figure, (axis,) = _figure()
    drawn = []
    for i, (name, points) in enumerate(series.items()):
        line, colour = thin(points), COLOURS[i % len(COLOURS)]
        few = len(points) <= 40
        if len(points) > BINS:
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        axis.plot(
            line.x, line.mean, color=colour, linewidth=1.5, label=_plain(name),
            marker="o" if few else None, markersize=3.5, zorder=3 if name != _base(name) else 2,
        )  # fmt: skip
        drawn.append(line)
    _limits(axis, drawn)
    axis.set_title(_plain(title), loc="left", fontsize=11)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(_plain(label), fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=8.5)
    return _png(figure)


def _against_kl(series: dict[str, Series], prefix: str, name: str) -> list[Point]:
    """Points at up to 1000 steps that have both; a sampled KL < 0 counts as 0."""
    kl = dict(series.get(prefix + "kl", []))
    found = [
        (math.sqrt(max(kl[step], 0.0)), value, step)
        for step, value in series.get(prefix + name, [])
        if step in kl
    ]
    return found[:: -(-len(found) // 1000) or 1]


def _running_mean(points: list[Point]) -> tuple[list[float], list[float]]:
    """Means of x and y of each tenth of the points, moved along x point by point."""
    points, window = sorted(points), max(len(points) // 10, 5)
    parts = [points[i : i + window] for i in range(len(points) - window + 1)]
    x, y = ([math.fsum(p[k] for p in part) / window for part in parts] for k in (0, 1))
    return x, y


def over_optimisation(series: dict[str, Series]) -> bytes | None:
    """A PNG of proxy and gold reward against sqrt(KL), None where there is nothing to draw.

    Where the proxy rises on and gold falls, the policy lives on the reward model's errors: Gao,
    Schulman, Hilton, "Scaling Laws for Reward Model Overoptimization", 2022.
    """
    labels = {"score": "proxy reward", "gold": "gold reward"}
    rows = {name: _against_kl(series, "", name) for name in labels}
    held_out = {name: _against_kl(series, "eval_", name) for name in labels}
    names = [name for name in labels if rows[name] or held_out[name]]
    if not names:
        return None
    figure, axes = _figure(len(names))
    steps = [step for name in names for _, _, step in rows[name]]
    dots = None
    for axis, name in zip(axes, names, strict=True):
        if rows[name]:
            x, y, step = zip(*rows[name], strict=True)
            dots = axis.scatter(
                x, y, c=step, vmin=min(steps), vmax=max(steps), s=9, cmap="viridis",
                label="rollouts",
            )  # fmt: skip
        if len(rows[name]) >= 20:
            mean = _running_mean(rows[name])
            axis.plot(*mean, color="#222222", linewidth=1.8, label="rollouts, running mean")
        if held_out[name]:
            x, y, _ = zip(*held_out[name], strict=True)
            axis.plot(x, y, "D-", color=COLOURS[1], markersize=5, label="held-out prompts")
        axis.set_ylabel(labels[name], fontsize=9)
        axis.legend(frameon=False, fontsize=8.5)
    axes[0].set_title("Over-optimisation: reward against sqrt(KL)", loc="left", fontsize=11)
    axes[-1].set_xlabel("sqrt(KL to the reference), KL in nats per sequence", fontsize=9)
    if dots is not None and min(steps) < max(steps):
        bar = figure.colorbar(dots, ax=axes, pad=0.01, aspect=40)
        bar.set_label("step", fontsize=9)
        bar.ax.tick_params(labelsize=8.5)
        bar.outline.set_visible(False)
    return _png(figure)


# --------------------------------------------------------------------------------------- the page

_STYLE = """
body { max-width: 46rem; margin: 2.5rem auto; padding: 0 1rem; color: #222; background: #fff;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.note { color: #666; margin-top: 0.2rem; } img { width: 100%; margin-top: 0.8rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; font-weight: 600; border-bottom: 1px solid #999; }
th, td { padding: 0.2rem 0.6rem 0.2rem 0; vertical-align: top; }
td { border-bottom: 1px solid #e6e6e6; } td.text { white-space: pre-wrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { font-size: 12.5px; line-height: 1.4; background: #f6f6f6; padding: 0.8rem; overflow-x: auto; }
"""


def _format(value: Any) -> str:
    if _number(value) and isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else html.escape(str(value))


def _table(head: dict[str, str], rows: list[list[str]]) -> str:
    """`head` maps titles to the class of their column; cells are HTML."""
    cells = "".join(f'<th class="{kind}">{title}</th>' for title, kind in head.items())
    body = [
        "".join(f'<td class="{kind}">{x}</td>' for kind, x in zip(head.values(), row, strict=True))
        for row in rows
    ]
    return "<table>" + "".join(f"<tr>{row}</tr>\n" for row in [cells, *body]) + "</table>"


def _summary(series: dict[str, Series]) -> str:
    rows = []
    for name, points in series.items():
        best = ""
        if _base(name) in LOWER_IS_BETTER | HIGHER_IS_BETTER:
            choose = min if _base(name) in LOWER_IS_BETTER else max
            step, value = choose(points, key=lambda point: point[1])
            best = f"{_format(value)} (step {_format(step)})"
        rows.append([html.escape(name), _format(points[0][1]), _format(points[-1][1]), best])
    return _table({"metric": "", "first": "number", "last": "number", "best": "number"}, rows)


def _samples(path: Path) -> str:
    """What the last evaluation answered to its first prompts, and the first one to the same."""
    by_step: dict[float, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in _lines(path):
        if _number(line.get("step")):
            by_step[line["step"]].setdefault(str(line.get("prompt", "")), line)
    if not by_step:
        return ""
    first, last = min(by_step), max(by_step)
    rows = []
    for prompt in list(by_step[last])[:SAMPLES]:
        for step in sorted({first, last}):
            if sample := by_step[step].get(prompt):
                scores = [_format(sample.get(key)) for key in ("score", "gold")]
                text = html.escape(str(sample.get("response", "")))
                rows.append([html.escape(prompt), _format(step), text, *scores])
    head = {"prompt": "text", "step": "number", "response": "text"}
    return "<h2>Completions</h2>" + _table(head | {"score": "number", "gold": "number"}, rows)


def _plots(series: dict[str, Series]) -> Iterator[tuple[str, bytes]]:
    """(title, PNG), the known metrics first, in the order of PANELS."""
    shown = set()
    for title, label, names in PANELS:
        names = tuple(name for base in names for name in (base, "eval_" + base))
        found = {name: series[name] for name in names if name in series}
        shown |= set(found)
        if found:
            yield title, panel(title, label, found)
        if names[0] == "gold" and (png := over_optimisation(series)) is not None:
            yield "Over-optimisation", png
    for base in dict.fromkeys(_base(name) for name in series if name not in shown):
        found = {name: series[name] for name in (base, "eval_" + base) if name in series}
        yield base, panel(base, base, found)


def write(output: Path) -> Path:
    """Write `output`/report.html from the metrics.jsonl, samples.jsonl and config.yaml in there.

    Args:
        output: folder of a run. Files that are missing, and lines that are not whole, are left out.

    Returns:
        The page. A reader never sees half of it: it is put in place when it is complete.

    Raises:
        FileNotFoundError: no such folder.
    """
    output = Path(output)
    if not output.is_dir():
        raise FileNotFoundError(f"output: expected the folder of a run, got {output}")
    series = read_metrics(output / "metrics.jsonl")
    name = html.escape(output.resolve().name)
    steps = sorted({step for points in series.values() for step, _ in points})
    note = f"steps {_format(steps[0])} to {_format(steps[-1])}" if steps else "no metrics yet"
    parts = [f'<h1>{name}</h1>\n<p class="note">{note}</p>']
    if series:
        parts += ["<h2>Metrics</h2>", _summary(series), "<h2>Plots</h2>"]
    for title, png in _plots(series):
        data = base64.b64encode(png).decode()
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    parts.append(_samples(output / "samples.jsonl"))
    config = output / "config.yaml"
    if config.exists():
        text = html.escape(config.read_text(encoding="utf-8", errors="replace"))
        parts.append(f"<h2>Configuration</h2>\n<pre>{text}</pre>")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    target = output / "report.html"
    fresh = target.with_name(".report.html.writing")
    fresh.write_text(page, encoding="utf-8", errors="replace")  # lone surrogates
    os.replace(fresh, target)
    return target
