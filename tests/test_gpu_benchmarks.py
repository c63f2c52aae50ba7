"""The suites for GPUs refuse where there is none; what they compute besides times is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import decoders, kernels
from benchmarks.tables import sparse
from compress.sparse.modules import SparseLinear

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def small(kind: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=50, max_position_embeddings=1024)
    return LlamaForCausalLM(config).to(kind).eval()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_decoders_suite_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["decoders"])
    with pytest.raises(SystemExit, match="gpu-decoders: no CUDA device found; expected an NVIDIA GPU"):
        decoders.main()


def test_options_are_read(capsys) -> None:
    assert decoders.parsed(["--batches", "2"]).decoders == ["llama-1b", "llama-8b"]
    with pytest.raises(SystemExit):
        decoders.parsed(["--decoders", "smollm2"])
    assert "smollm2 asked without --model; expected its folder" in capsys.readouterr().err


@pytest.mark.parametrize("density", [None, 0.3])
def test_every_way_multiplies_by_the_matrix_that_it_is_compared_with(density, monkeypatch) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)  # it wants a GPU

    def drawn() -> Tensor:
        torch.manual_seed(1)
        return torch.randn(64, 128, dtype=kernels.KIND)

    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).to(kernels.KIND)
    found = list(kernels.ways(drawn(), density))
    dense = {"dense", "semi_int4", "torch_2_4", "signs"}
    assert {name for name, _, _ in found} == ({"bitmap", "bsr_64", "bsr_32", "bsr_16"} if density else dense)
    for name, product, size in found:
        matrix = kernels.matrix_of(name, drawn(), density)
        assert kernels.worst_error(product(x), x, matrix) < 2**-8, name
        assert kernels.worst_error(product(x), x, matrix + 1) > 2**-8, name
        assert size <= 2 * 64 * 128 + 64


def test_tables_tell_how_much_faster_than_dense() -> None:
    speeds = [{"decoder": "a", "batch": 4, "way": way, "tokens_a_second": s} for way, s in (("dense", 2.0), ("x", 5.0))]
    assert list(sparse.gpu_decoders({"card": "c", "rows": speeds}))[-1] == "| a | 4 | x | 5.0 | 2.50x |"


@pytest.mark.parametrize("name", decoders.formats())
def test_whole_decoders_are_packed_but_for_the_head(name: str) -> None:
    model = small(torch.bfloat16)
    before = {layer: one.weight for layer, one in model.named_modules() if isinstance(one, nn.Linear)}
    decoders.pack_blocks(model, decoders.formats()[name])
    packed = {layer: one for layer, one in model.named_modules() if isinstance(one, SparseLinear)}
    assert before.keys() - packed.keys() == {"lm_head"}
    zeros = [float((one.packed().unpack() == 0).float().mean()) for one in packed.values()]
    wanted = 0.5 if name == "semi_int4" else 1 - float(name.split()[1])
    if not name.startswith("bsr"):  # tiles of 64 are too few here to count on
        assert zeros == pytest.approx([wanted] * 14, abs=0.02)
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_each_step_writes_one_more_token() -> None:
    model = small(torch.float32)
    past = torch.arange(2 * decoders.PAST).view(2, decoders.PAST) % 50
    with torch.inference_mode():
        step = decoders.step(model, model.config, 2, "cpu")
        for more in (1, 2, 3):
            ids = torch.cat([past, past[:, -1:].expand(2, more)], 1)
            torch.testing.assert_close(step()[:, -1], model(ids).logits[:, -1], rtol=1e-4, atol=1e-5)
