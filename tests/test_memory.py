"""Memory: however a model's weights are stored, as many are told as it has, less the zeros that aren't stored."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import Tensor

from compress import binary, lowbit
from compress.families import layout_of
from compress.memory import stored_bytes, stored_parameters
from compress.sparse.bsr import Bsr
from compress.sparse.formats import round_rows
from compress.sparse.modules import pack_
from compress.sparse.semi import SemiInt4
from passes.packing.pack import Pack
from passes.pruning.sparse.sparsify import Sparsify
from passes.quantization.bitsandbytes import Bitsandbytes
from tests.conftest import TINY
from tests.paper import state_of


def sparse(tmp_path: Path, **options):
    """A tiny model half of whose weights are zero, and those of its layers."""
    (state,) = Sparsify(method="magnitude", samples=8, **options).run(state_of(TINY["bert"], tmp_path))
    weights = {name.removesuffix(".weight"): state.model.get_parameter(name).detach() for name in state.facts["masks"]}
    return state, weights


def packing(stored: Callable[[Tensor], Tensor], **options) -> Callable:
    """The way by `pack`; `stored` gives what a format makes of weights."""

    def way(tmp_path: Path):
        state, weights = sparse(tmp_path, sparsity=0.5, block=4 if options["format"] == "blocks" else 1)
        expected = state.model.num_parameters() - sum(int((stored(one) == 0).sum()) for one in weights.values())
        (state,) = Pack(gain=0, seconds=0.01, **options).run(state)
        return state.model, expected

    return way


def for_a_gpu(kind: type[Bsr | SemiInt4], **options) -> Callable:
    """A format that `pack` has for GPUs, here where it computes without one."""

    def way(tmp_path: Path):
        state, weights = sparse(tmp_path, **options)
        packed = {name: kind.pack(one) for name, one in weights.items()}
        expected = state.model.num_parameters() - sum(int((one.unpack() == 0).sum()) for one in packed.values())
        pack_(state.model, packed)
        return state.model, expected

    return way


def of_one_bit(method: str) -> Callable:
    """Signs, in a model of a width that no byte divides."""

    def way(tmp_path: Path):
        model = TINY["bert"].build()
        binary.binarize_(model, layout_of(model), method, embeddings=True)
        expected = model.num_parameters()
        binary.pack_(model)
        return model, expected

    return way


def of_few_bits(method: str) -> Callable:
    """Planes of bits."""

    def way(tmp_path: Path):
        model = TINY["llama"].build()
        lowbit.lowbit_(model, layout_of(model), method)
        expected = model.num_parameters()
        lowbit.store_(model)
        return model, expected

    return way


def by_bitsandbytes(method: str) -> Callable:
    """What that library stores."""

    def way(tmp_path: Path):
        if find_spec("bitsandbytes") is None:
            pytest.skip("needs the extra bitsandbytes")
        state = state_of(TINY["bert"], tmp_path)
        expected = state.model.num_parameters()
        (state,) = Bitsandbytes(method=method).run(state)
        return state.model, expected

    return way


WAYS = {
    "bitmap": packing(Tensor.clone, format="bitmap"),
    "bitmap of bfloat16": packing(Tensor.bfloat16, format="bitmap", values="bfloat16"),
    "blocks": packing(lambda weight: round_rows(weight)[0], format="blocks"),
    "bsr": for_a_gpu(Bsr, sparsity=0.5),
    "semi_int4": for_a_gpu(SemiInt4, runs={"keep": 2, "of": 4}),
    **{method: of_one_bit(method) for method in ("bibert", "bit")},
    **{method: of_few_bits(method) for method in ("ternary", "onebit")},
    **{method: by_bitsandbytes(method) for method in ("nf4", "int8")},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_storing_changes_the_number_of_parameters_by_the_zeros_alone(way: Callable, tmp_path: Path) -> None:
    model, expected = way(tmp_path)
    assert stored_parameters(model) == expected


def test_a_dense_model_has_what_transformers_counts() -> None:
    for name in ("bert", "llama-tied"):
        model = TINY[name].build()
        assert stored_parameters(model) == model.num_parameters()
        assert stored_bytes(model) == 4 * model.num_parameters()
