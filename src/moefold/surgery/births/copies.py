"""Birth by copying: every expert starts as the dense MLP.

Komatsuzaki et al., *Sparse Upcycling*, 2023, section 2.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from moefold.moe import MoE, MoEConfig
from moefold.surgery.births.base import AbstractBirth, check_std, stacked
from moefold.surgery.hosts import Site
from moefold.surgery.trial import Trial


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Copies(AbstractBirth):
    """Every expert starts as the dense MLP, the router at random.

    If the combine weights of a token sum to one, as with renormalised token choice, the host
    computes the same function as before.

    Attributes:
        copy_noise_std: standard deviation of Gaussian noise added to every copy; the paper found
            that noise does not help and much of it hurts.
    """

    copy_noise_std: float = 0.0

    kind: ClassVar[str] = "copies"

    def __post_init__(self) -> None:
        AbstractBirth.__post_init__(self)
        check_std("copy_noise_std", self.copy_noise_std)

    @torch.no_grad()
    def fill(self, moe: MoE, config: MoEConfig, site: Site) -> None:
        """Copies the MLP into every expert."""
        assert site.mlp is not None
        for name, parameter in stacked(moe).items():
            fill_with(parameter, getattr(site.mlp, name))
            if self.copy_noise_std:
                parameter.add_(torch.randn_like(parameter), alpha=self.copy_noise_std)

    def keeps(self, config: MoEConfig, trial: Trial) -> tuple[bool, str]:
        """It does where equal experts have weights that sum to one."""
        if self.copy_noise_std:
            std = self.copy_noise_std
            return False, f"noise of standard deviation {std} is added to every copy"
        return equal_experts_keep(config, trial, "experts are copies")


def equal_experts_keep(config: MoEConfig, trial: Trial, because: str) -> tuple[bool, str]:
    """Equal experts whose weights sum to one are the MLP they copy (Sparse Upcycling, App. B)."""
    low, high = trial.mass
    if trial.mixes:
        return False, "experts see mixtures of tokens"
    if left := left_out(trial):
        return False, left
    # The weights are float32 and there are at most `num_experts` of them.
    if max(abs(low - 1), abs(high - 1)) > config.num_experts * torch.finfo(torch.float32).eps:
        return False, f"combine weights of a token sum to {low:.2f} ... {high:.2f}, not to 1"
    return True, f"{because} and the combine weights of every token sum to 1"


def left_out(trial: Trial) -> str:
    """Which tokens no expert takes, as a reason; empty if all are taken."""
    if trial.uncovered:
        return f"no expert takes {trial.uncovered:.1%} of random tokens"
    if trial.uncovered_alike:
        return f"no expert takes {trial.uncovered_alike:.1%} of tokens that are all alike"
    return ""


def fill_with(stack: Tensor, weight: Tensor | None) -> None:
    """Copies a weight into every expert of a stack; a bias that is missing is zero."""
    if weight is None:
        stack.zero_()
    else:
        stack.copy_(weight.detach().expand_as(stack))
