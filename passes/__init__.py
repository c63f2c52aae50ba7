"""What changes a model: every pass by the name it has in a plan."""

from compress.contract import Pass
from passes.distillation.distill import Distill
from passes.distillation.finetune import Finetune
from passes.pruning.calibrate import Calibrate
from passes.pruning.prune import Prune
from passes.pruning.puzzle import Puzzle
from passes.pruning.ziplm import ZipLM

PASSES: dict[str, type[Pass]] = {
    "calibrate": Calibrate,
    "ziplm": ZipLM,
    "prune": Prune,
    "puzzle": Puzzle,
    "distill": Distill,
    "finetune": Finetune,
}
