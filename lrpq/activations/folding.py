"""A step a channel becomes one step for the tensor, exactly: what differs moves into the LayerNorm and the next layers.

LayerNorm's outputs x = gain n + beta have channels of very different ranges. With a grid a channel, x^_c = s_c q + o_c,
and a grid for the tensor, s q + o, let r = s_c / s. The LayerNorm with

    gain' = gain / r        beta' = (beta - o_c) / r + o

gives x' = (x - o_c) / r + o, whose codes on the tensor's grid are those of x on the channels', and layers with

    W' = W diag(r)          b' = b + W (o_c - o r)

give W' x' + b' = W x + b. This is RepQ-ViT's scale reparameterisation (Li et al. 2023), which LRP-QViT takes over, with
real offsets instead of zero points: s is the mean of s_c, and o that of o_c, rounded to whole steps.

What a profile finds at the outputs of layers does not change with the folding, for y = W x + b does not: neither
gradients, nor what the rules make of them (a norm's gain and the next layer's columns are one product). Only that does
into which the inputs themselves go. With x' = a x + k, a = 1 / r, k = o - o_c / r,

    sum s x' x'^T = A H A + (A m) k^T + k (A m)^T + S k k^T,      A = diag(a), H = sum s x x^T, m = sum s x, S = sum s

so that one walk back, on the model as it was, serves the grids and the weights of the folded one.

Two cases do not allow a shift: layers without a bias to take it, and windows padded with zeros behind the norm (Swin),
which no norm shifts. There zero has one code in all channels (clipping.channel_candidates, ``shared_zero``): o_c = o r,
so that b' = b, and a zero stays zero. RepQ-ViT gives the layers a bias instead, which is another architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.activations.grids import UniformGrid
from lrpq.errors import ModelError, QuantizationError
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import HessianSum
from lrpq.transform.folds import FoldList, FoldPlan, ScaleColumns

if TYPE_CHECKING:
    from jaxtyping import Float

NORMS: Mapping[str, Mapping[str, str]] = {
    "ViTForImageClassification": {"qkv": "layernorm_before", "up": "layernorm_after"},
    "DeiTForImageClassification": {"qkv": "layernorm_before", "up": "layernorm_after"},
    "Dinov2ForImageClassification": {"qkv": "norm1", "up": "norm2"},
    "SwinForImageClassification": {"qkv": "layernorm_before", "up": "layernorm_after", "merge": "norm"},
}
"""Architecture -> input site -> the LayerNorm of the block that makes it, and that nothing else reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """Of one site."""

    ratio: Float[Tensor, "channels=h"]
    """r, float64."""
    before: Float[Tensor, "channels=h"]
    """o_c, float64."""
    grid: UniformGrid
    """The tensor's grid, float32: that of the folded model."""

    def of_norm(self, gain: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """gain', beta' in float64."""
        return gain.double() / self.ratio, (beta.double() - self.before) / self.ratio + self.grid.offset.double()

    def of_layer(self, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """W', b' in float64."""
        return W.double() * self.ratio, bias.double() + self.of_bias(W)

    @property
    def channels(self) -> UniformGrid:
        """The grid a channel that it was made from, float32."""
        return UniformGrid(
            bits=self.grid.bits, scale=(self.ratio * self.grid.scale.double()).float(), offset=self.before.float()
        )

    def of_grid(self, channels: UniformGrid) -> UniformGrid:
        """Another grid of the site's channels, as the folded model sees them: the codes stay what they are."""
        offset = (channels.offset.double() - self.before) / self.ratio + self.grid.offset.double()
        scale = channels.scale.double() / self.ratio
        return UniformGrid(bits=channels.bits, scale=scale.float(), offset=offset.float())

    @property
    def affine(self) -> tuple[Float[Tensor, "channels=h"], Float[Tensor, "channels=h"]]:
        """a and k of x' = a x + k, float64."""
        return 1 / self.ratio, self.grid.offset.double() - self.before / self.ratio

    def of_hessian(self, sums: HessianSum) -> HessianSum:
        """Sums over the folded model's inputs from those over the original's, in float64 and rounded once.

        Raises:
            QuantizationError: the sums lack that of the inputs themselves.
        """
        if sums.x is None:
            raise QuantizationError("sums over inputs that are shifted need the sum of the inputs: gather it with them")
        a, k = (values.to(sums.xx.device) for values in self.affine)
        first = a * sums.x
        cross = torch.outer(first, k)
        xx = torch.outer(a, a) * sums.xx.double() + cross + cross.T + sums.weight_sum * torch.outer(k, k)
        return replace(sums, xx=xx.float(), x=first + sums.weight_sum * k)

    def of_bias(self, W: Float[Tensor, "d_out channels=h"]) -> Float[Tensor, "rows=d_out"]:
        """b' - b."""
        return W.double() @ (self.before - self.grid.offset.double() * self.ratio)


def folding_of(channels: UniformGrid, *, shared_zero: bool = False) -> Folding:
    """From a grid a channel; on the host, where models are written (a scalar serves tensors of any device).

    With ``shared_zero``, of grids whose zero has one code, nothing is shifted: o_c = o r exactly.
    """
    s_c, o_c = channels.scale.cpu().double(), channels.offset.cpu().double()
    s = s_c.mean().float()
    o = (o_c.mean() / s.double()).round().float() * s
    grid = UniformGrid(bits=channels.bits, scale=s, offset=o)
    ratio = s_c / s.double()
    return Folding(ratio=ratio, before=o.double() * ratio if shared_zero else o_c, grid=grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleAndAdd:
    """factor * v + term of a vector, entry by entry; a fold as those of lrpq.transform.folds."""

    factor: Float[Tensor, " n"]
    term: Float[Tensor, " n"]
    rowwise: bool = field(default=False, init=False)
    column_unit: int | None = field(default=None, init=False)

    def __call__(self, W: Float[Tensor, "entries=n"]) -> Float[Tensor, "entries=n"]:
        """The changed vector."""
        return W * self.factor + self.term


def fold_plan(stream: BlockStream, foldings: Mapping[tuple[int, str], Folding]) -> FoldPlan:
    """What the foldings of some sites, by block and site, make of the model's tensors.

    Write it in float32 (lrpq.transform.writing.write_folded): in bfloat16 the folded values are rounded again.

    Raises:
        ModelError: no table says which norm makes the site, or one of its layers has no bias to take a shift.
    """
    norms = NORMS.get(stream.architecture)
    if norms is None:
        raise ModelError(f"{stream.architecture}: no table says which norms make its sites; supported: {list(NORMS)}")
    folds = FoldList()
    for (block, site), folding in foldings.items():
        norm = f"{stream.block_names[block]}.{norms[site]}"
        r, o = folding.ratio, folding.grid.offset.double()
        folds.add(stream.stored(f"{norm}.weight"), ScaleAndAdd(factor=1 / r, term=0 * r))
        folds.add(stream.stored(f"{norm}.bias"), ScaleAndAdd(factor=1 / r, term=o - folding.before / r))
        for spec in stream.sites(block)[site]:
            shift = folding.of_bias(stream.weight(spec).cpu())
            folds.add(spec.stored, ScaleColumns(factor=r))
            if stream.model.get_submodule(spec.name).bias is None:
                if bool(shift.any()):
                    raise ModelError(
                        f"{spec.name}: has no bias to take what folding shifts its inputs by; calibrate its site with "
                        "one zero for all channels"
                    )
                continue
            folds.add(stream.stored(f"{spec.name}.bias"), ScaleAndAdd(factor=shift * 0 + 1, term=shift))
    return FoldPlan(tensors=folds.tensors())
