"""What can go wrong on the user's side, said in one sentence that names the place, the met and the expected."""

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """A mistake the user can mend; the command line prints it without a traceback and exits with 2."""


class PlanError(CompressError):
    """The plan can't be run as written; carries every problem found, not the first."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class LayoutError(CompressError):
    """The model's structure is unknown, or can't be cut as asked."""


class DataError(CompressError):
    """Data that can't be read, is empty, or doesn't fit the task."""


class TargetError(CompressError):
    """A device, runtime or speed-up that this machine or model can't give."""


class ReachError(TargetError):
    """A budget that no model keeps; `fastest` is the most times as fast that was measured, where speed was asked for.

    A pass yields it in place of that model, so that the others of its models are made.
    """

    def __init__(self, message: str, fastest: float | None = None) -> None:
        self.fastest = fastest
        super().__init__(message)


class TrainingError(CompressError):
    """Training that broke down: a loss that isn't a number, nothing to train."""


class ExportError(CompressError):
    """An artifact that could not be written, or that disagrees with the model it came from."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known word, or the empty string where none is near."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
