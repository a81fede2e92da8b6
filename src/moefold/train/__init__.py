"""Train an encoder on pairs of texts, for a number of examples or of floating-point operations.

The loops are those of `sentence-transformers`; this package fixes what a fair comparison needs
fixed: the order of the data, the budget, the schedule.
"""

from moefold.train.competition import CompetitionSchedule
from moefold.train.contrastive import Curve, FineTuning, fine_tune, in_batches
from moefold.train.flops import training_flops
from moefold.train.similarity import SimilaritySchedule

__all__ = [
    "CompetitionSchedule",
    "Curve",
    "FineTuning",
    "SimilaritySchedule",
    "fine_tune",
    "in_batches",
    "training_flops",
]
