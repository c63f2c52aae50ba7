"""Tasks: what a model is for, which class loads it and which score it is judged by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import DataError, LayoutError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Task:
    """A task by its name on the hub.

    `auto` is the transformers class that loads it, `metrics` the scores that can be its headline, best first,
    `endings` how the names of its architectures end, `packs` says that texts are packed to full length, and `generates`
    that the model is deployed to write on, token by token.
    """

    name: str
    auto: str
    metrics: tuple[str, ...]
    endings: tuple[str, ...]
    lower_is_better: bool = False
    packs: bool = False
    generates: bool = False

    @property
    def metric(self) -> str:
        """The name of the headline metric where the data allows it; `evaluate.headline` knows the others."""
        return self.metrics[0]

    def load(self, source: str | Path, **options: Any) -> PreTrainedModel:
        """Load the model in a folder or of a hub name, in float32 unless `options` name a `dtype`.

        Only safetensors are read. Raises DataError where there is no such model, and LayoutError where
        its weights don't fit the task.
        """
        import transformers

        folder = find_model(source)
        loader = getattr(transformers, self.auto)
        given = {"dtype": "float32", "use_safetensors": True, "local_files_only": folder is not None, **options}
        try:
            return loader.from_pretrained(str(folder or source), **given)
        except OSError as error:
            raise DataError(f"model: {source} can't be loaded: {first_line(error)}") from error
        except (ValueError, RuntimeError) as error:
            raise LayoutError(f"model: {source} can't be loaded for {self.name}: {first_line(error)}") from error


TASKS = {
    task.name: task
    for task in (
        Task("feature-extraction", "AutoModel", ("spearman", "cosine"), ("Model",)),
        Task(
            "text-classification",
            "AutoModelForSequenceClassification",
            ("accuracy", "spearman", "top1_agreement", "teacher_pearson"),
            ("ForSequenceClassification",),
        ),
        Task("token-classification", "AutoModelForTokenClassification", ("f1",), ("ForTokenClassification",)),
        Task("question-answering", "AutoModelForQuestionAnswering", ("f1",), ("ForQuestionAnswering",)),
        Task(
            "fill-mask",
            "AutoModelForMaskedLM",
            ("perplexity",),
            ("ForMaskedLM", "WithLMHeadModel", "BertForPreTraining"),
            lower_is_better=True,
            packs=True,
        ),
        Task(
            "text-generation",
            "AutoModelForCausalLM",
            ("perplexity",),
            ("ForCausalLM", "LMHeadModel"),
            lower_is_better=True,
            packs=True,
            generates=True,
        ),
    )
}


def infer_task(config: Mapping[str, Any]) -> Task:
    """Return the task that a parsed config.json was saved for; LayoutError where it doesn't say."""
    architectures = config.get("architectures") or []
    if not architectures:
        raise LayoutError(f"task: config.json names no architectures; give the task, one of {', '.join(TASKS)}")
    name = str(architectures[0])
    matches = [(len(ending), task) for task in TASKS.values() for ending in task.endings if name.endswith(ending)]
    if not matches:
        raise LayoutError(f"task: can't tell the task of {name}; give the task, one of {', '.join(TASKS)}")
    return max(matches, key=lambda match: match[0])[1]


def find_model(source: str | Path) -> Path | None:
    """Return the folder of a local model, None for a hub name, and raise DataError where it is neither."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"model: {source} has no config.json; expected a folder written by save_pretrained")
        return folder
    if folder.exists():
        raise DataError(f"model: {source} is a file; expected a folder with config.json and safetensors, or a hub name")
    if not HUB_NAME.fullmatch(str(source)) or str(source).startswith("."):
        near = folder.parent.iterdir() if folder.parent.is_dir() else ()
        raise DataError(f"model: {source} does not exist{nearest(folder.name, (path.name for path in near))}")
    return None


def first_line(error: Exception) -> str:
    """The first line of an error that says something; libraries often append pages of advice."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
