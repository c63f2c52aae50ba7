"""What changes a model: every pass by the name it has in a plan."""

from compress.contract import Pass
from passes.distillation.distill import Distill
from passes.distillation.finetune import Finetune
from passes.pruning.calibrate import Calibrate
from passes.pruning.drop_blocks import DropBlocks
from passes.pruning.fold import Fold
from passes.pruning.minitron import Minitron
from passes.pruning.optin import Optin
from passes.pruning.prune import Prune
from passes.pruning.puzzle import Puzzle
from passes.pruning.vocabulary import Vocabulary
from passes.pruning.ziplm import ZipLM

PASSES: dict[str, type[Pass]] = {
    "calibrate": Calibrate,
    "ziplm": ZipLM,
    "prune": Prune,
    "optin": Optin,
    "drop_blocks": DropBlocks,
    "fold": Fold,
    "vocabulary": Vocabulary,
    "minitron": Minitron,
    "puzzle": Puzzle,
    "distill": Distill,
    "finetune": Finetune,
}
