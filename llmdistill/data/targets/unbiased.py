"""The common parts of kinds of soft targets whose weighted sums are unbiased: the loss, and the supported losses."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmdistill.data.targets.base import SoftTargets
from llmdistill.data.targets.columns import Array

if TYPE_CHECKING:
    from torch import Tensor

    from llmdistill.losses import Objective


class UnbiasedSample(SoftTargets):
    """A random sample of tokens whose weights add up to one at every position: E[Σ weight · f] = Σ p · f.

    `entropy_N` is −Σ weight · log p, an unbiased estimate of the teacher's entropy that has the same noise as the
    cross-entropy against the sample, so that their difference, the KL, has little.
    """

    entropy_N: Array

    size = "n"
    unbiased = True

    @classmethod
    def refuses(cls, loss: str, temperature: float) -> str | None:
        """Refuse everything that is not linear in the teacher's distribution."""
        if loss != "forward_kl":
            return f"loss is {loss}, but sampled targets give an unbiased estimate of forward_kl only"
        if temperature != 1:
            return f"temperature is {temperature:g}, but sampled targets are unbiased only at temperature 1"
        return None

    def batch(self) -> dict[str, Array]:
        return {"target_ids": self.ids_NK, "target_logweights": self.logweights(), "target_entropy": self.entropy_N}

    @classmethod
    def loss_parts(
        cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any], objective: "Objective"
    ) -> "dict[str, Tensor]":
        from llmdistill.losses import weighted_kl

        return {"kl": weighted_kl(picked_NK - rest_N1, batch["target_logweights"], batch["target_entropy"])}

    @classmethod
    def choice(cls, batch: Mapping[str, Any]) -> "Tensor":
        return batch["target_logweights"].argmax(dim=1, keepdim=True)
