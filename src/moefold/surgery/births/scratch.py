"""Birth from nothing: random experts, the baseline that upcycling has to beat.

Komatsuzaki et al., *Sparse Upcycling*, 2023: random experts catch up only after long training.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from moefold.moe import MoE, MoEConfig
from moefold.surgery.births.base import AbstractBirth, with_geometry
from moefold.surgery.hosts import Site
from moefold.surgery.trial import Trial


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FromScratch(AbstractBirth):
    """Experts are drawn as `nn.Linear` draws its weights; they may be of any width.

    They are new, and trainable where the MLP they replace is frozen. Attention, norms, embeddings
    and MLPs that are no sites stay those of the host.
    """

    kind: ClassVar[str] = "random"
    new_experts: ClassVar[bool] = True

    def fit(self, config: MoEConfig, site: Site) -> MoEConfig:
        """As wide as asked for, or as the MLP."""
        return with_geometry(config, site, config.expert_width or site.width)

    def fill(self, moe: MoE, config: MoEConfig, site: Site) -> None:
        """Draws every expert."""
        moe.experts.reset_parameters()

    def keeps(self, config: MoEConfig, trial: Trial) -> tuple[bool, str]:
        """Never."""
        return False, "the experts are random"
