"""What changes a model: every pass by the name it has in a plan."""

from compress.contract import Pass
from passes.distillation.distill import Distill
from passes.distillation.finetune import Finetune
from passes.distillation.teach import Teach
from passes.merging.merge import Merge
from passes.packing.pack import Pack
from passes.pruning.calibrate import Calibrate
from passes.pruning.depth.drop_blocks import DropBlocks
from passes.pruning.depth.fold import Fold
from passes.pruning.replace.puzzle import Puzzle
from passes.pruning.rotate.slice_hidden import SliceHidden
from passes.pruning.sparse.obert import Obert
from passes.pruning.sparse.sparsify import Sparsify
from passes.pruning.uniform.minitron import Minitron
from passes.pruning.vocabulary import Vocabulary
from passes.pruning.widths.optin import Optin
from passes.pruning.widths.prune import Prune
from passes.pruning.widths.ziplm import ZipLM
from passes.quantization.binarize import Binarize
from passes.quantization.bitsandbytes import Bitsandbytes
from passes.quantization.cross import Crossquant
from passes.quantization.gptq import Gptq
from passes.quantization.lowbit import Lowbit
from passes.quantization.smooth import Smoothquant
from passes.rows.select import Select
from passes.rows.self_data import SelfData

PASSES: dict[str, type[Pass]] = {
    "calibrate": Calibrate,
    "ziplm": ZipLM,
    "prune": Prune,
    "optin": Optin,
    "drop_blocks": DropBlocks,
    "fold": Fold,
    "vocabulary": Vocabulary,
    "minitron": Minitron,
    "slice_hidden": SliceHidden,
    "puzzle": Puzzle,
    "smoothquant": Smoothquant,
    "crossquant": Crossquant,
    "gptq": Gptq,
    "sparsify": Sparsify,
    "obert": Obert,
    "bitsandbytes": Bitsandbytes,
    "binarize": Binarize,
    "lowbit": Lowbit,
    "pack": Pack,
    "self_data": SelfData,
    "select": Select,
    "teach": Teach,
    "distill": Distill,
    "finetune": Finetune,
    "merge": Merge,
}
