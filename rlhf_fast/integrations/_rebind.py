"""Replacing functions of another project wherever they are bound, and putting them back.

`from utils import f` copies the binding of f into the importing module, so that setting `utils.f`
alone leaves most callers as they were. Here every module of the project that is already imported is
searched for attributes that are the original; a module that is imported later copies the
replacement. Undoing is the same search the other way round.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Target(NamedTuple):
    """One function to replace: where it is defined, and what makes its replacement from it."""

    module: str
    attribute: str
    make: Callable[[Any], Any]


def rebind(original: Any, replacement: Any, prefix: str) -> list[str]:
    """Replace `original` in every imported module `prefix` or `prefix.*`; return the sites.

    A site is "module:attribute". Modules are looked at through their `__dict__`, which does not
    wake lazy ones.
    """
    sites = []
    for name, module in list(sys.modules.items()):
        if name != prefix and not name.startswith(prefix + "."):
            continue
        attributes = getattr(module, "__dict__", {})
        for attribute in [a for a, value in attributes.items() if value is original]:
            attributes[attribute] = replacement
            sites.append(f"{name}:{attribute}")
    return sites


class Patch:
    """The replacements that are in force in one project; `patch()` returns it.

    `sites` lists what was rebound as "module:attribute". `undo()` restores every binding, those of
    modules imported meanwhile too. As a context manager it is undone on leaving, unless another
    `patch()` of the same project still holds it.
    """

    def __init__(self, project: str) -> None:
        self.sites: list[str] = []
        self._project = project
        self._pairs: list[tuple[Any, Any]] = []  # (original, replacement)
        self._holders = 0

    def undo(self) -> None:
        """Put every original back; a second call does nothing."""
        for original, replacement in self._pairs:
            rebind(replacement, original, self._project)
        self._pairs.clear()
        self._holders = 0
        if _active.get(self._project) is self:
            del _active[self._project]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self._holders -= 1
        if self._holders <= 0:
            self.undo()

    def __repr__(self) -> str:
        state = "in force" if self._pairs else "undone"
        return f"<rlhf_fast patch of {self._project}, {state}: {', '.join(self.sites)}>"

    def _apply(self, targets: Sequence[Target]) -> None:
        """Rebind each target that this version has and that is not replaced yet."""
        for target in targets:
            original = _find(target)
            if original is None or any(original is mine for _, mine in self._pairs):
                continue
            replacement = target.make(original)
            self._pairs.append((original, replacement))
            self.sites += rebind(original, replacement, self._project)


# project -> its patch, while one is in force.
_active: dict[str, Patch] = {}


def _find(target: Target) -> Any | None:
    """The function to replace, or None in a version that has no such module or attribute."""
    try:
        module = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        own = error.name is not None and (target.module + ".").startswith(error.name + ".")
        if own:
            return None
        raise
    return getattr(module, "__dict__", {}).get(target.attribute)


def _version(project: str) -> str:
    """The version of `project`, without a local suffix; "unknown" where it does not say."""
    try:
        module = importlib.import_module(project)
    except ModuleNotFoundError as error:
        if error.name != project:
            raise
        raise ImportError(
            f"rlhf_fast.integrations.{project}: the package {project} is not installed"
        ) from error
    version = getattr(module, "__version__", None)
    if not isinstance(version, str):
        try:
            version = importlib.metadata.version(project)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
    return version.split("+")[0]


def patch_project(
    project: str, known: Sequence[str], targets: Sequence[Target], *, force: bool
) -> Patch:
    """Replace `targets` in `project`, and return the handle; the same one while it is in force.

    Raises ImportError if the project is not installed, and RuntimeError for a version that is not
    in `known` unless `force`, or if there was nothing to replace.
    """
    version = _version(project)
    if version not in known and not force:
        raise RuntimeError(
            f"rlhf_fast.integrations.{project}: expected {project} {' or '.join(known)}, got "
            f"{version}; patch(force=True) patches what it finds by name"
        )
    patch = _active.get(project) or Patch(project)
    patch._apply(targets)
    if not patch.sites:
        names = ", ".join(f"{t.module}:{t.attribute}" for t in targets)
        raise RuntimeError(
            f"rlhf_fast.integrations.{project}: {project} {version} has none of {names}"
        )
    _active[project] = patch
    patch._holders += 1
    return patch


def rows_fit(logits: Any, ids: Any) -> bool:
    """Whether our ops take these logits [..., V] and ids [...]; others go to the original."""
    return (
        isinstance(logits, torch.Tensor)
        and isinstance(ids, torch.Tensor)
        and logits.device.type in ("cpu", "cuda")
        and logits.device == ids.device
        and logits.is_floating_point()
        and ids.dtype in (torch.int32, torch.int64)
        and ids.shape == logits.shape[:-1]
    )


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each row of logits [..., V]; which id is looked up does not matter."""
    import rlhf_fast

    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return rlhf_fast.logprob_entropy(logits, ids).entropy
