"""What stands where a module lost its last unit: nothing is computed there, and at most a bias is left.

Where one Linear was to stand for the module, it has the place of the `Constant` (`compress.linear`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Constant(nn.Module):
    """What a projection gives once nothing is left to read: its bias, or zeros; (..., any) -> (..., features)."""

    def __init__(self, features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.features = features
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the bias over the leading dimensions of `x`."""
        shape = (*x.shape[:-1], self.features)
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class Absent(nn.Module):
    """Stands where a module lost its last unit; gives what the reader gives, or the input where the reader is outside.

    The reader keeps its name, so that its bias keeps its key in the checkpoint.
    """

    def __init__(self, extra: int, reader: tuple[str, Constant] | None) -> None:
        super().__init__()
        self.extra = extra
        self.reader = reader[0] if reader else None
        if reader:
            self.add_module(*reader)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take whatever the module took; its first argument or `hidden_states` sets the shape."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.reader is not None:
            hidden = self.get_submodule(self.reader)(hidden)
        return (hidden, *[None] * self.extra) if self.extra else hidden
