"""The quantizer by which transformers loads cut models: it reads the record in config.json and reshapes the modules.

No weight is quantized here. The quantizer registry is transformers' public place for reshaping modules before weights
are loaded; once they are, the model is made an ordinary one again, free to be trained, cast, cut and saved. This module
is imported while transformers itself still is, so nothing at its top may need whole transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.binary import binarize_, pack_
from compress.errors import LayoutError
from compress.families import dense_layout
from compress.linear import linearise
from compress.lowbit import lowbit_, store_
from compress.record import RECORD, VERSION, own_record, prefix_of
from compress.sharing import cure_, hollow_, tie_
from compress.sparse import modules as sparse_modules
from compress.stream import narrow_stream_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HfCompressConfig(QuantizationConfigMixin):
    """The record of cuts while a model is loaded: `sizes` of the cut axes, and the origins of the `blocks` left.

    Where blocks were folded, also which of them are `shared` and `cured`; `compress.sharing` tells of both.
    `linear` names the axes for which a Linear stands; a model that has had none lacks the entry. `compress.stream`
    tells of `stream`, `compress.binary` of `binary`, `compress.lowbit` of `lowbit`, `compress.sparse` of `sparse`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int] | None = None,
        blocks: Mapping[str, list[int]] | None = None,
        version: int = VERSION,
        quant_method: str = RECORD,
        shared: Mapping[str, str] | None = None,
        cured: Mapping[str, int] | None = None,
        linear: Sequence[str] | None = None,
        stream: int | None = None,
        binary: Mapping[str, Any] | None = None,
        lowbit: Mapping[str, Any] | None = None,
        sparse: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if version != VERSION:
            raise LayoutError(
                f"config.json: the record of cuts has version {version}; this hf-compress reads {VERSION}"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # the base class knows only its own methods
        self.version = version
        self.sizes = dict(sizes or {})
        self.blocks = dict(blocks or {})
        if shared:
            self.shared = dict(shared)
        if cured:
            self.cured = dict(cured)
        if linear is not None:
            self.linear = list(linear)
        if stream is not None:
            self.stream = stream
        if binary is not None:
            self.binary = dict(binary)
        if lowbit is not None:
            self.lowbit = dict(lowbit)
        if sparse is not None:
            self.sparse = {name: dict(told) for name, told in sparse.items()}


class HfCompressQuantizer(HfQuantizer):
    """Cuts the empty modules to the sizes in the record, so that weights fit; binary and sparse ones as they were."""

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        """A cut model can be saved as any other."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        record = self.quantization_config.to_dict()
        shared, cured = record.pop("shared", {}), record.pop("cured", {})
        linear, sizes = record.pop("linear", []), record.pop("sizes")
        apart = ("stream", "binary", "lowbit", "sparse")
        stream, binary, lowbit, sparse = (record.pop(name, None) for name in apart)
        model.config.quantization_config = {**copy.deepcopy(record), "sizes": {}}
        layout, prefix = dense_layout(model), prefix_of(model)
        if stream is not None:
            narrow_stream_(model, layout, stream)
            own_record(model)["stream"] = stream
        for name in linear:
            layout = linearise(model, layout, prefix + name)
        for name, size in sizes.items():
            layout = layout.cut(model, prefix + name, range(size))
        cure_(model, own_record(model), cured)
        hollow_(model, shared)
        if binary is not None:
            binarize_(model, layout, **binary)
            pack_(model)
        if lowbit is not None:
            lowbit_(model, layout, **lowbit)
            store_(model)
        if sparse is not None:
            sparse_modules.hollow_(model, sparse)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from transformers import PreTrainedModel

        self.remove_quantization_config(model)
        sparse_modules.refuse_broken(model)
        tie_(model, getattr(self.quantization_config, "shared", {}))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.quantization_config = self.quantization_config.to_dict()
                vars(module.config).pop("_is_quantized", None)


def register() -> None:
    """Enter both classes in transformers' registry, where they aren't there already."""
    if RECORD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(RECORD)(HfCompressConfig)
        register_quantizer(RECORD)(HfCompressQuantizer)
