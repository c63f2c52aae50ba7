"""What exporters have in common: an artifact is written aside, compared with the model, and only then put in place."""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from compress.contract import FLOAT, Fact, Options
from compress.errors import ExportError
from compress.verdict import KeepIf

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.runtimes import Artifact
    from compress.state import State

SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


class Exporter(Options):
    """One kind of artifact: its fields are its options in a plan."""

    kind: ClassVar[str]
    as_stored: ClassVar[bool] = False  # whether weights are written as they are, whatever their format

    keep_if: KeepIf | None = Field(default=None, description="put aside what doesn't pay; null keeps it")

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.keep_if is not None and self.precision == FLOAT:
            raise ValueError("keep_if compares what is quantized with what isn't, and this is not quantized")
        return self

    @property
    def folder(self) -> str:
        """Where in a run's output it lies."""
        return self.kind

    @property
    def precision(self) -> str:
        """The number format of its weights; any but float32 makes of the artifact a model to be judged by itself."""
        return FLOAT

    @property
    def requires(self) -> frozenset[Fact]:
        """What it must be told of a model besides the model."""
        return frozenset()

    @abstractmethod
    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Write the state's model into an empty folder.

        Returns the worst difference between the two, and what the report is to tell of the artifact (JSON values).
        """

    def run(self, state: State, folder: Path, card: Mapping[str, Any] | None = None) -> Artifact:
        """Write the artifact to `folder`, whole or not at all; `card` holds figures to tell to its readers.

        Raises ExportError where the folder can't be written or the artifact disagrees with the model.
        """
        from safetensors import SafetensorError

        from compress.checkpoint import library_of
        from compress.runtimes import Artifact

        if not self.as_stored and (library := library_of(state.model)):
            raise ExportError(f"{self.kind}: its weights are those of {library}; expected export: [huggingface]")
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
            raise ExportError(f"{folder}: exists and is no exported model; expected a new or an empty folder")
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            worst, figures = self.write(state, unfinished, card or {})
            _copy_sentence_files(state.dense.source, unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{folder}: can't be written: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return Artifact.of(self.kind, folder, worst, self.precision, figures)


class Quantizing(Exporter):
    """One that can write weights in other number formats: those that its `quantize` lists, besides ``none``."""

    quantize: str = "none"
    tolerance: float | None = Field(default=None, gt=0, description="null: 1e-3, and any where quantized")

    @property
    def folder(self) -> str:
        """Where in a run's output it lies."""
        return self.kind if self.quantize == "none" else f"{self.kind}-{self.quantize}"

    @property
    def precision(self) -> str:
        """The number format of its weights."""
        return FLOAT if self.quantize == "none" else self.quantize

    @property
    def allowed(self) -> float:
        """The largest relative error taken."""
        return self.tolerance or (1e-3 if self.quantize == "none" else float("inf"))


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors among a model's outputs by name, in evaluation mode, without a cache, on the CPU."""
    import torch

    from compress.runtimes.torch import uncached

    was_training = model.training
    with torch.inference_mode():
        outputs = model.eval()(**{k: v.to(model.device) for k, v in inputs.items()}, **uncached(model))
    model.train(was_training)
    return {name: value.cpu() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _copy_sentence_files(source: str | None, folder: Path) -> None:
    """Bring along what sentence-transformers reads beside the model: its list of modules and how they pool."""
    modules = Path(source or "", "modules.json")
    if source is None or not modules.is_file():
        return
    inner = [f"{entry['path']}/config.json" for entry in json.loads(modules.read_text()) if entry["path"]]
    for name in (*SENTENCE_FILES, *inner):
        if (found := modules.parent / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(found, folder / name)
