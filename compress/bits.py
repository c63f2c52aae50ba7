"""Products of values that are one bit each: packed eight to a byte, multiplied as words, summed by counting bits.

A value is 1 or -1, or 1 or 0 where it says whether something counts; its bit is set where it is 1. What is left of a
last byte or word is zero in both factors, where neither product counts it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 8  # bytes
AT_ONCE = 1 << 20  # sums that are counted together, so that they stay near the processor


def pack(codes: Tensor) -> Tensor:
    """The bits of codes (..., count), where they are: (..., bytes) in uint8, the first code the lowest bit.

    Eight truths are eight bytes of a word: three steps bring the lowest bit of each next to its neighbours'.
    """
    found = F.pad(codes.detach() > 0, (0, -codes.shape[-1] % 8)).contiguous().view(torch.int64)
    for shift in (7, 14, 28):
        found = found | found >> shift
    return found.to(torch.uint8)


def unpack(bits: Tensor, count: int) -> Tensor:
    """What bits (..., bytes) say: 1 and -1, (..., count) in float32."""
    places = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=bits.device)
    found = (bits[..., None] & places) != 0
    return found.flatten(-2)[..., :count].float() * 2 - 1


def signs_product(a: Tensor, b: Tensor, count: int) -> Tensor:
    """``a b^T`` of signs: bits (m, bytes) and (n, bytes), or with equal leading dimensions; (..., m, n) in float32.

    Signs that differ count -1 and all others 1, so the sum over `count` places is ``count - 2 popcount(a xor b)``.
    """
    return torch.from_numpy(np.float32(count) - np.float32(2) * _counted(np.bitwise_xor, a, b))


def seen_product(seen: Tensor, values: Tensor) -> Tensor:
    """``a b^T`` of 1 or 0 with signs, bits both: ``2 popcount(a and b) - popcount(a)``, (..., m, n) in float32."""
    seen_bits = np.bitwise_count(_words(seen)).sum(-1, dtype=np.float32)
    return torch.from_numpy(np.float32(2) * _counted(np.bitwise_and, seen, values) - seen_bits[..., None])


def _counted(together: Callable[..., np.ndarray], a: Tensor, b: Tensor) -> np.ndarray:
    """How many bits are set in each row of `a` together with each row of `b`; (..., m, n) in float32."""
    left, right = _words(a), _words(b)
    if left.ndim > 2:
        return _summed(together, left, right)
    pieces = max(1, len(left) * len(right) // AT_ONCE)
    return np.concatenate([_summed(together, piece, right) for piece in np.array_split(left, pieces)])


def _summed(together: Callable[..., np.ndarray], left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The count, word after word."""
    total = np.zeros((*left.shape[:-1], right.shape[-2]), np.float32)
    for place in range(left.shape[-1]):
        both = together(left[..., :, None, place], right[..., None, :, place])
        total += np.bitwise_count(both)
    return total


def _words(bits: Tensor) -> np.ndarray:
    """Bytes (..., bytes) as words (..., words), filled up with zeros."""
    array = bits.numpy()
    lacking = -array.shape[-1] % WORD
    padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, lacking)])
    return np.ascontiguousarray(padded).view(np.uint64)
