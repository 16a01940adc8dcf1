"""After rounding: codes and scales in turn, each the best given the other, and no row worse than it came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.descent import descend, descend_checked
from lrpq.quant.doubts import Doubts
from lrpq.quant.gptq import Rows, loss_of
from lrpq.quant.grid import QuantizedWeight, power_of_two
from lrpq.quant.refit import refit, refit_checked
from lrpq.quant.trellis import segment_edges, summed
from lrpq.quant.trellis_loop import descend_trellis

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Ten times GPTQ's, as for the correction. With 32,768 tokens .03 and .1 are equal on held-out tokens (within .3% at
# every width), with 8,192 .1 is 1 to 2% better, and with 256 it is 1 to 5% (docs/log.md).
DEFAULT_DAMPING = 0.1
_TRELLIS_ROUNDS = 1
"""A second one takes as long again and left KL as it was: on SmolLM2 at 3.25 bits, two seeds (docs/log.md)."""


def rounds_of(choice: Choice, rounds: int) -> int:
    """Of so many rounds those that are worth their time."""
    return min(rounds, _TRELLIS_ROUNDS) if choice.trellis else rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """A weight after polishing, and how it went."""

    weight: QuantizedWeight
    before: QuantizedWeight
    """As it came in."""
    restored: Bool[Tensor, "rows=d_out"]
    """Rows that were better on the undamped H as they came in, and stayed so."""

    @property
    def changed_codes(self) -> int:
        """Codes that differ from those that came in."""
        return int((self.weight.codes != self.before.codes).sum())

    @property
    def changed_scales(self) -> int:
        """Scales that differ from those that came in."""
        return int((self.weight.scales != self.before.scales).sum())

    @property
    def restored_rows(self) -> int:
        """How many rows are as they came in."""
        return int(self.restored.sum())


def polish(
    T: Float[Tensor, "d_out d_in"],
    quantized: Sequence[QuantizedWeight],
    H: Float[Tensor, "d_in d_in"],
    *,
    rounds: int = 2,
    sweeps: int = 2,
    damping: float = DEFAULT_DAMPING,
    rows: Rows | None = None,
    name: str = "layer",
) -> list[Polished]:
    """``rounds`` times ``sweeps`` of coordinate descent and a refit of the scales, for several choices at once.

    Both work under H + damping mean(diag H) I, the mean over live inputs: descent fits single codes to H, noise
    included, and more of it is noise the fewer tokens H has. GPTQ's own damping need not be the same.

    Guard: a row whose error (T - Q) H (T - Q)^T under the *undamped* H has grown is as it came in, and counted (of a
    large layer on a GPU as far as products by halves can tell). Rows of a trellis's segment stay so together.

    FLOPs a row and choice: (2 sweeps + 3) d_in^2 a round, and about 2 d_in^2 for the guard. Memory: a copy of H.

    Raises QuantizationError naming the layer for negative damping, shapes that do not belong together, or values that
    are not finite.
    """
    polisher = Polisher(H, damping=damping, sweeps=sweeps, name=name)
    return polisher(T, quantized, rounds=rounds, rows=rows)


class Polisher:
    """``polish`` of rows that share an H, some at a time: it is damped once. Memory: a copy of H while this lives.

    Args:
        H: undamped.
        damping: as for ``polish``.
        sweeps: as for ``polish``.
        doubts: where what would wait for the device is asked; by default every call waits.
        name: module name for errors.

    Raises:
        QuantizationError: negative damping.
    """

    def __init__(
        self,
        H: Float[Tensor, "d_in d_in"],
        *,
        damping: float = DEFAULT_DAMPING,
        sweeps: int = 2,
        doubts: Doubts | None = None,
        name: str = "layer",
    ) -> None:
        if not damping >= 0:
            raise QuantizationError(f"{name}: damping must not be negative, got {damping}")
        self._H, self._damped, self._damping = H, _damped(H, damping), damping
        self._sweeps, self._doubts, self._name = sweeps, doubts, name

    def __call__(
        self,
        T: Float[Tensor, "rows d_in"],
        quantized: Sequence[QuantizedWeight],
        *,
        rounds: int,
        rows: Rows | None = None,
    ) -> list[Polished]:
        """Polished rows, of one layer.

        Raises:
            QuantizationError: as ``polish``; of what waits for the device, where the doubts are settled.
        """
        if any(q.choice.trellis for q in quantized):
            return [self._polished(T, q, rounds, Rows.of(T, rows, name=self._name)) for q in quantized]
        found = list(quantized)
        for turn in range(rounds):
            if turn and self._damping > 0:
                # what was checked stays so: T and H are the same, no refitted scale vanishes, and an error that falls
                # under a damped H bounds them all
                step = descend_checked(T, found, self._damped, sweeps=self._sweeps, name=self._name)
            else:
                step = descend(T, found, self._damped, sweeps=self._sweeps, doubts=self._doubts, name=self._name)
            found = [refit_checked(T, d.weight, self._damped).weight for d in step]
        return [_guarded(T, q, before, self._H) for q, before in zip(found, quantized, strict=True)]

    def _polished(self, T: Tensor, before: QuantizedWeight, rounds: int, rows: Rows) -> Polished:
        """Codes of one choice, after one sweep of descent a round where they are a trellis's: Viterbi's algorithm takes
        a column to its best stream at once."""
        if not before.choice.trellis:
            return self(T, [before], rounds=rounds)[0]
        if len(rows.parts) != 1:
            raise QuantizationError(f"{self._name}: {len(rows.parts)} parts; polish the streams of one part at a time")
        edges, weights = segment_edges(rows.parts, T.device, name=self._name), rows.weights_on(T)
        T, found = T.to(self._damped.dtype), refit(T, before, self._damped, name=self._name).weight
        for _ in range(rounds):
            found = descend_trellis(T, found, self._damped, weights, edges)
            found = refit_checked(T, found, self._damped).weight
        return _guarded(T, found, before, self._H, weights)


def _damped(H: Tensor, damping: float) -> Tensor:
    """Damped H in units of a power of two near its largest entry: products with small weights then keep their digits.

    The scale of H changes neither codes nor scales.
    """
    diagonal = H.diagonal()
    mean = diagonal.sum(dtype=torch.float64) / (diagonal > 0).sum().clamp_(min=1)
    damped = H.clone()
    damped.diagonal().add_(damping * mean)
    return damped.div_(power_of_two(diagonal.amax()))


def _guarded(
    T: Tensor, after: QuantizedWeight, before: QuantizedWeight, H: Tensor, weights: Tensor | None = None
) -> Polished:
    T = T.to(H.dtype)
    grown = loss_of(T, after, H) - loss_of(T, before, H)
    worse = (grown if weights is None else summed(grown * weights)) > 0
    codes = torch.where(worse.unsqueeze(1), before.codes, after.codes)
    scales = torch.where(worse.unsqueeze(1), before.scales, after.scales)
    return Polished(
        weight=replace(after, codes=codes, scales=scales),
        before=before,
        restored=worse,
    )
