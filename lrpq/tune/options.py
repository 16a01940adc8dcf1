"""What is tuned, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Flag, auto

from lrpq.errors import ConfigError


class Trained(Flag):
    """What a tuning may change; any union of these."""

    SCALES = auto()
    """Scales of the groups; codes stay (the second phase of EfficientQAT, Chen et al. 2024, arXiv:2407.11062)."""
    VECTORS = auto()
    """Gains of norms, and biases where the model has them, as AdaQuant does (Hubara et al. 2020, arXiv:2006.10518).

    They stay at 16 bits and cost no bytes."""
    CODES = auto()
    """Codes, through a straight-through estimator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """How a model is tuned. Everything here is part of the result's identity."""

    trained: Trained = Trained.SCALES | Trained.VECTORS
    epochs: int = 1
    """Passes over the windows. More text serves better than more passes (docs/log.md)."""
    batch: int = 4
    """Windows an optimizer step."""
    micro_batch: int = 4
    """Windows computed at once."""
    scale_rate: float = 3e-3
    """Learning rate of scales, relative to the scale that tuning starts from. From a sweep (docs/log.md): 1e-3 gains
    less in as many steps, 1e-2 ends above the start."""
    vector_rate: float = 3e-3
    """Learning rate of gains and biases, relative to the root mean square of the vector."""
    code_rate: float = 1e-3
    """Learning rate of codes, in steps of the grid."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's. The second is below the usual 0.999, for a tuning has hundreds of steps."""
    warm_up: float = 0.1
    """Share of the steps in which the rates rise linearly; then they fall to zero along a cosine."""
    seed: int = 0
    """Of the order of the windows."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: one is out of range.
        """
        for name in ("epochs", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tuning: {name} is {getattr(self, name)}; expected 1 or more")
        for name in ("scale_rate", "vector_rate", "code_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"tuning: {name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.warm_up < 1:
            raise ConfigError(f"tuning: warm_up is {self.warm_up}; expected a share below 1")
        if not self.trained:
            raise ConfigError("tuning: nothing is to be trained; name scales, vectors or codes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """How blocks are rebuilt. Rates are relative, as in TuneOptions."""

    steps: int = 200
    """Of the optimizer, a block."""
    batch: int = 32
    """Images a step."""
    checks: int = 4
    """How often, evenly over the steps, the held-out error is taken; the best counts."""
    held_out: float = 0.25
    """Share of the images, evenly strided, that nothing is trained on."""
    scale_rate: float = 3e-3
    grid_rate: float = 3e-3
    code_rate: float = 1e-2
    """Of codes, in steps of the grid."""
    drop: float = 0.0
    """Chance of an activation to stay unquantized in a step."""
    draws: int = 4
    """Gradients an image that errors are judged by."""
    together: float = 0.0
    """Share of the error of all tokens together (objective)."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: one is out of range.
        """
        for name in ("steps", "batch", "checks", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"reconstruction: {name} is {getattr(self, name)}; expected 1 or more")
        for name in ("scale_rate", "grid_rate", "code_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"reconstruction: {name} is {getattr(self, name)}; expected a positive number")
        if not 0 < self.held_out < 1 or not 0 <= self.drop < 1 or not 0 <= self.together <= 1:
            raise ConfigError("reconstruction: expected shares, of held_out above 0, of held_out and drop below 1")

    @property
    def tuning(self) -> TuneOptions:
        """What of it a part is made with."""
        return TuneOptions(
            trained=Trained.SCALES | Trained.CODES,
            batch=self.batch,
            micro_batch=self.batch,
            scale_rate=self.scale_rate,
            code_rate=self.code_rate,
        )


def rate_factor(step: int, num_steps: int, *, warm_up: float) -> float:
    """Factor of the learning rates in a step (from 0): a linear rise, then a cosine that would be 0 after the last."""
    rising = round(warm_up * num_steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (num_steps - rising))
