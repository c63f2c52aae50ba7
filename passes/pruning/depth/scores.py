"""How much the blocks of a model matter, on tensors: block influence, angular distance, greedy removal.

Both distances are computed from the difference of unit vectors instead of their product, which loses all digits where
the vectors nearly agree: blocks that change nothing are at zero to the bit, and nothing needs to be clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import normalize


def influence(before: Tensor, after: Tensor) -> Tensor:
    """One minus the cosine of states (..., hidden), for each token (...,); ShortGPT, arXiv:2403.03853."""
    return (normalize(after.float(), dim=-1) - normalize(before.float(), dim=-1)).square().sum(-1) / 2


def angular_distances(states: Tensor) -> Tensor:
    """The angle between the states of any two places, in half turns and averaged over samples: (places, places).

    `states` are (places, samples, hidden), place i being the input of block i and the last what leaves the last block.
    Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887; the angle is Kahan's
    ``2 atan2(|u - v|, |u + v|)``.
    """
    units = normalize(states.float(), dim=-1)
    rows = [2 * torch.atan2((units - one).norm(dim=-1), (units + one).norm(dim=-1)) / pi for one in units]
    return torch.stack(rows).mean(-1)


def nearest_range(distances: Tensor, length: int, first: int, last: int) -> tuple[float, int]:
    """The least distance over `length` consecutive blocks among the blocks first..last - 1, and where it starts."""
    return min((float(distances[start, start + length]), start) for start in range(first, last - length + 1))


def greedily(
    parts: Sequence[str], losses: Callable[[Sequence[str], Sequence[str]], Mapping[str, float]]
) -> Iterator[tuple[str, float]]:
    """Yield, one after the other, the part whose removal leaves the least loss, and that loss.

    `losses` tells, for what is gone already and what is left, what the model loses by each part that goes as well; it
    is asked anew after every removal. SLEB, arXiv:2402.09025.
    """
    gone: list[str] = []
    while left := [part for part in parts if part not in gone]:
        found = losses(gone, left)
        gone.append(min(left, key=found.__getitem__))
        yield gone[-1], found[gone[-1]]
