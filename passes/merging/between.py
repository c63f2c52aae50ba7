"""Between two weights: along the line that joins them, or round the sphere that they lie on."""

from __future__ import annotations

from torch import Tensor

NEAR = 1e-6  # the sine of an angle below which the arc is its chord


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at the share `t` of the line from `a` to `b`, of any one shape; exactly an end at 0 and 1."""
    return a.lerp(b, t)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at the share `t` of the arc from `a` to `b`, tensors of one shape taken as vectors (Shoemake, 1985).

    ``(sin((1 - t) W) a / |a| + sin(t W) b / |b|) / sin W``, W being their angle, with a length between theirs: that of
    `a` at 0, of `b` at 1, straight in between. Of equal lengths it is the formula of arXiv:2410.09982. Where the angle
    is 0 or half a turn, and no arc is told from others, it is the line.
    """
    one, other = a.double(), b.double()
    lengths = one.norm(), other.norm()
    angle = angle_between(a, b)
    if not angle.sin() > NEAR:
        return lerp(a, b, t)
    length = lengths[0].lerp(lengths[1], t)
    shares = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    return (shares[0] * (length / lengths[0]) * one + shares[1] * (length / lengths[1]) * other).to(a.dtype)


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle of two tensors of one shape taken as vectors, in radians; not a number where one of them is zero."""
    one, other = a.double(), b.double()
    return ((one * other).sum() / (one.norm() * other.norm())).clamp(-1, 1).acos()
