"""What a stage has around its loop: devices, the run's folder, metrics, checkpoints, the report.

output/config.yaml              the options, as `--config` reads them
output/metrics.jsonl            a line per step
output/samples.jsonl            completions of evaluations (ppo)
output/checkpoints/step-00050/  everything that training needs to go on; complete folders only
output/model/                   the result, as transformers saves it
output/report.html
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from rlhf_fast.train import report
from rlhf_fast.train.config import Config, write_yaml
from rlhf_fast.train.models import replace_folder

# What a run leaves. A config.yaml alone is no run: one that found no model or no data leaves it.
_LEFT = ("metrics.jsonl", "samples.jsonl", "report.html", "checkpoints", "model")


class Results(dict[str, float]):
    """What a stage returns; in every checkpoint, so that a resumed run returns the same."""

    def state_dict(self) -> dict[str, float]:
        return dict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.update(state)


class Run:
    """One training run in one folder, on the devices that accelerate finds."""

    def __init__(self, stage: str, config: Config) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        # Tied weights are stored once; accelerate warns of it at each checkpoint.
        logging.getLogger("accelerate.utils").setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        self.stage, self.config = stage, config
        self.bar: Any = None
        # Buffers are constants here; a forward that sends them waits for a rank that has no
        # batch, as it may happen in evaluations.
        self.accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=config.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.results = Results()
        self.accelerator.register_for_checkpointing(self.results)
        self.device = self.accelerator.device
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        if config.batch_size % self.ranks:
            raise ValueError(
                f"batch_size: expected a multiple of the {self.ranks} processes, "
                f"got {config.batch_size}"
            )
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        if self.main:
            self._open_folder()
        self.accelerator.wait_for_everyone()
        set_seed(config.seed)

    def _open_folder(self) -> None:
        found = [name for name in _LEFT if (self.output / name).exists()]
        if found and not (self.config.resume or self.config.overwrite):
            raise ValueError(
                f"output: expected a folder without a run, got {self.output} with "
                f"{', '.join(found)} (--resume continues it, --overwrite replaces it)"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        if not self.config.resume:
            for name in found:
                path = self.output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for torn in self.checkpoints.glob(".step-*.writing"):  # of a run that was killed
            shutil.rmtree(torn)
        write_yaml(self.config, self.output / "config.yaml")

    # ---------------------------------------------------------------------------- training state

    def prepare(self, *modules: nn.Module) -> tuple[list[nn.Module], Any]:
        """(modules on this rank's device, their one AdamW); random states differ by rank from here.

        The learning rate is a function of the step (`set_learning_rate`): no schedule to save.
        """
        set_seed(self.config.seed, device_specific=True)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.config.learning_rate,
            eps=self.config.adam_eps,
            weight_decay=self.config.weight_decay,
        )
        *prepared, optimizer = self.accelerator.prepare(*modules, optimizer)
        return prepared, optimizer

    def set_learning_rate(self, optimizer: Any, step: int, steps: int) -> float:
        """The rate of step number `step`: linear warmup, then the schedule down to 0."""
        rate, warmup = self.config.learning_rate, self.config.warmup_steps
        if step < warmup:
            rate *= (step + 1) / (warmup + 1)
        else:
            done = (step - warmup) / max(steps - warmup, 1)
            rate *= {
                "constant": 1.0,
                "linear": 1 - done,
                "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            }[self.config.schedule]
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def update(self, optimizer: Any, *modules: nn.Module) -> float:
        """One optimiser step on the gradients that have been accumulated; their norm."""
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    @contextlib.contextmanager
    def accumulating(self, more: bool, *modules: nn.Module) -> Iterator[None]:
        """Backward passes in here are summed; ranks exchange gradients in the last one only."""
        with contextlib.ExitStack() as stack:
            if more:
                for module in modules:
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks."""
        return self.accelerator.reduce(values, reduction="sum")

    def max(self, values: torch.Tensor) -> float:
        """The largest of `values`, which has an axis, over all ranks."""
        return self.accelerator.gather(values).max().item()

    # --------------------------------------------------------------------------------- checkpoints

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, oldest first."""
        found = [
            (int(match[1]), path)
            for path in self.checkpoints.glob("step-*")
            if (match := re.fullmatch(r"step-(\d+)", path.name))
        ]
        return sorted(found)

    def resume(self) -> int:
        """Load the newest checkpoint under `--resume`; the number of steps that are done."""
        found = self.complete_checkpoints() if self.config.resume else []
        done, folder = found[-1] if found else (0, None)
        if folder is not None:
            self.accelerator.load_state(str(folder))
        if self.main:
            for name in ("metrics.jsonl", "samples.jsonl"):
                _keep_until(self.output / name, done)
            if self.config.resume:
                self.say(
                    f"resuming after step {done}" if done else "no checkpoint yet: from step 0"
                )
        self.accelerator.wait_for_everyone()
        return done

    def save(self, step: int) -> None:
        """A checkpoint after `step`; a run that is killed in here leaves the one before."""
        target = self.checkpoints / f"step-{step:05d}"
        fresh = target.with_name(f".{target.name}.writing")
        if self.main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.main:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(fresh, target)
            for _, old in self.complete_checkpoints()[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def steps(self, start: int, steps: int) -> Iterator[int]:
        """Step numbers from `start`, with a progress bar; a checkpoint is saved behind each step
        that is due. `stop_at` ends the run early without changing its schedule."""
        end = min(steps, self.config.stop_at or steps)
        bar = tqdm(
            range(start, end),
            desc=self.stage,
            initial=start,
            total=end,
            disable=not (self.config.progress and self.main),
            dynamic_ncols=True,
        )
        self.bar = bar
        for step in bar:
            yield step
            done = step + 1
            if done == end or done % self.config.save_every == 0:
                self.save(done)

    def evaluates_after(self, step: int, steps: int) -> bool:
        """Whether an evaluation is due behind step number `step`."""
        done, every = step + 1, self.config.eval_every
        return done == steps or bool(every and done % every == 0)

    # ------------------------------------------------------------------------------------- output

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar."""
        if self.main:
            tqdm.write(f"{self.stage}: {text}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and show it beside the progress bar."""
        if not self.main:
            return
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line |= {name: _rounded(value) for name, value in metrics.items()}
        _append(self.output / "metrics.jsonl", [line])
        shown = ("loss", "accuracy", "score", "gold", "kl", "tokens_per_second")
        if self.bar is not None:
            found = {n: f"{line[n]:.4g}" for n in shown if line.get(n) is not None}
            self.bar.set_postfix(found, refresh=False)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append completions to samples.jsonl."""
        if self.main:
            _append(self.output / "samples.jsonl", [{"step": step} | s for s in samples])

    def finish(self, write_model: Callable[[Path], None]) -> None:
        """Write the model and the report."""
        self.accelerator.wait_for_everyone()
        if self.main:
            replace_folder(self.output / "model", write_model)
            report.write(self.output)
            self.say(f"wrote {self.output / 'model'} and {self.output / 'report.html'}")
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()


def _rounded(value: float) -> float | None:
    """Seven digits; JSON has no NaN."""
    value = float(value)
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _keep_until(path: Path, step: int) -> None:
    """Drop lines behind `step` and a torn last line: the run is about to write them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    fresh = path.with_name(f".{path.name}.writing")
    fresh.write_text("".join(kept))
    os.replace(fresh, path)


def epochs_to_steps(config: Config, items: int) -> int:
    """`steps`, or as many as `epochs` passes over `items` take."""
    return config.steps or math.ceil(items * config.epochs / config.batch_size)
