"""How many parameters a model has where pruning takes them, and how many a unit of an axis has."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.layout import Axis, stored_dim


def counted(model: PreTrainedModel) -> int:
    """Parameters of a model outside of its embeddings and of the head that is as large as those."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables += [head] if (head := model.get_output_embeddings()) is not None else []
    apart = {id(one) for table in tables for one in table.parameters()}
    return sum(one.numel() for one in model.parameters() if id(one) not in apart)


def of_one_unit(model: PreTrainedModel, axis: Axis) -> int:
    """Parameters that go with each unit of an axis at the present sizes of others, tables left out as well."""
    total = 0
    for site in axis.sites:
        module = model.get_submodule(site.module)
        if isinstance(module, nn.Embedding):
            continue
        weight: Tensor = module.weight  # type: ignore[assignment]  # torch types attributes as tensor or module
        across = weight.shape[1 - stored_dim(module, site.dim)]
        total += site.width * (across + int(site.dim == 0 and getattr(module, "bias", None) is not None))
    return total
