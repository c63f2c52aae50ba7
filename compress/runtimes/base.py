"""What every runtime answers to: is it here, build an artifact, is this one of yours, open it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.contract import FLOAT
from compress.errors import TargetError
from compress.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Artifact:
    """A model as it left the house: what and where it is, its size, digest and worst difference from the model.

    `precision` is the number format of its weights, `figures` what its exporter tells of it.
    """

    kind: str
    path: str
    bytes: int
    sha256: str
    worst_error: float
    precision: str = FLOAT
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kind: str,
        folder: Path,
        worst_error: float,
        precision: str,
        figures: Mapping[str, Any],
    ) -> Artifact:
        """Describe what lies in `folder`."""
        files = [file for file in folder.rglob("*") if file.is_file()]
        size, digest = sum(file.stat().st_size for file in files), digest_of(folder)
        return cls(kind, str(folder), size, digest, worst_error, precision, dict(figures))

    @classmethod
    def told(cls, report: Mapping[str, Any]) -> Artifact:
        """The artifact that a report tells of, among more."""
        return cls(**{entry.name: report[entry.name] for entry in fields(cls) if entry.name in report})

    def intact(self) -> bool:
        """Whether the artifact is still there as it was written."""
        return Path(self.path).is_dir() and digest_of(Path(self.path)) == self.sha256


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder, as hexadecimal digits."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {inner}\n".encode())
    return total.hexdigest()


class Session(ABC):
    """An artifact opened for running; called with tensors or arrays by input name, it gives arrays by output name."""

    fixed: bool = False  # whether it takes one shape only

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run once and return when all outputs are there."""

    def ready(self, inputs: Mapping[str, Any]) -> Callable[[], Any]:
        """A call that runs on these inputs each time and returns when all is done: what is timed."""
        return partial(self, inputs)

    @abstractmethod
    def example(self, batch: int, sequence: int) -> dict[str, np.ndarray]:
        """Inputs the artifact takes, of the given shape where it leaves the shape open; always the same values."""

    @abstractmethod
    def generate(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """Follow prompts (batch, sequence), nothing masked, by the `count` likeliest tokens (batch, count).

        The prompt runs once and gives the first of them; each later one is a step of one token with the cache. No
        token ends a text. Raises TargetError where the artifact has no cache.
        """


class Runtime(ABC):
    """A program that runs models; the artifacts are files that the user deploys."""

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str] = ""  # what of hf-compress brings the package, where it doesn't itself

    def missing(self) -> str | None:
        """How to get the runtime, where it isn't installed."""
        if find_spec(self.package) is not None:
            return None
        brings = f"pip install 'hf-compress{self.extra}'"
        return f"runtime '{self.name}' needs the package '{self.package}'; expected it here: {brings}"

    def require(self) -> None:
        """Raise TargetError where the runtime isn't installed."""
        if missing := self.missing():
            raise TargetError(missing)

    @abstractmethod
    def holds(self, path: Path) -> bool:
        """Whether `path` is an artifact of this runtime."""

    def generates(self, path: Path) -> bool:
        """Whether an artifact of a decoder can use a key-value cache."""
        return True

    @abstractmethod
    def build(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        folder: Path,
        dynamic: bool = True,
        cache: bool = False,
    ) -> Path:
        """Write the model as an artifact into `folder` and return what `open` takes.

        With `dynamic`, batch size and sequence length stay open; with `cache`, a decoder takes and gives its key-value
        cache. Raises ExportError where the model can't be written so.
        """

    def build_module(self, module: nn.Module, inputs: Sequence[Tensor], path: Path) -> Path:
        """Write one module, called with tensors by position, at the fixed shapes of `inputs`; for timing parts.

        Returns what `open` takes, which lies at `path` with a suffix.
        """
        raise NotImplementedError

    @abstractmethod
    def open(self, path: Path, target: Target) -> Session:
        """Open an artifact on the target's device with the target's threads; raises TargetError where it can't be."""
