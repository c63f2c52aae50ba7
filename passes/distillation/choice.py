"""Which losses a recovery is trained by: `losses:` in a plan, each by its name with a weight or with its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model, model_validator

from compress.contract import Options
from passes.distillation.losses import LOSSES, Loss

if TYPE_CHECKING:
    from compress.tasks import Task

# One field a loss, so that the schema and the messages know them; from Python they are keywords of `Losses`.
_FIELDS: Any = create_model(
    "_FIELDS",
    __base__=Options,
    **{
        name: (cls | None, Field(default=None, description=str(cls.__doc__).splitlines()[0]))
        for name, cls in LOSSES.items()
    },  # type: ignore[call-overload]
)


class Losses(_FIELDS):
    """The losses by their names: a number is a weight, options stand in braces with their `weight` among them."""

    @model_validator(mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        """Refuse what gives no names."""
        if not isinstance(given, dict | Losses):
            raise ValueError(f"met {given!r}; expected losses with their weights, such as {{hidden: 1, logits: 1}}")
        return given

    @model_validator(mode="after")
    def _some_weight(self) -> Losses:
        if not self.chosen():
            raise ValueError("every loss has a weight of 0; expected one above 0")
        return self

    @classmethod
    def fitting(cls, task: Task, labelled: bool, same_width: bool = True) -> Losses:
        """The losses where a plan gives none; labels help a classifier, a language model is better off without.

        Hidden states of unlike widths can't be compared.
        """
        names = ["hidden"] if same_width else []
        if task.name == "feature-extraction":
            names += ["embedding"] if same_width else ["similarity"]
        else:
            names += ["logits", "task"] if labelled and not task.packs else ["logits"]
        return cls.model_validate(dict.fromkeys(names, 1.0))

    def chosen(self) -> dict[str, Loss]:
        """The losses that count."""
        given = {name: getattr(self, name) for name in LOSSES}
        return {name: loss for name, loss in given.items() if loss is not None and loss.weight}
