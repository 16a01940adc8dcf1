"""Swin written out: no windows and no shifts, but one dense attention over all patches of the padded plane.

Two patches see each other if the shifted plane puts them into one window; those that wrap around its border lower each
other's scores by 100. Position by position, from the definitions of the paper (Liu et al. 2021), in plain autograd with
constants detached: the gradients are those of the rules (docs/methods.md), found another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrpq.relevance.rules import Pass, stabilize


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Positions of the padded plane in the order of the shifted windows."""

    source: list[tuple[int, int]]
    """(row, column) of the unshifted plane of every slot; beyond the image there is padding."""
    window: Tensor
    region: Tensor
    inside: Tensor
    """Row and column in the window [slots, 2]."""


def plane(height: int, width: int, *, size: int, shift: int) -> Plane:
    """Windows one after the other, their slots row by row."""
    tall, wide = -(-height // size) * size, -(-width // size) * size
    source, window, region, inside = [], [], [], []

    def part(at: int, length: int) -> int:
        return 0 if shift == 0 or at < length - size else 1 if at < length - shift else 2

    for top in range(0, tall, size):
        for left in range(0, wide, size):
            for row in range(top, top + size):
                for column in range(left, left + size):
                    source.append(((row + shift) % tall, (column + shift) % wide))
                    window.append(top * wide + left)
                    region.append(3 * part(row, tall) + part(column, wide))
                    inside.append((row - top, column - left))
    return Plane(source=source, window=torch.tensor(window), region=torch.tensor(region), inside=torch.tensor(inside))


def in_windows(x: Tensor, places: Plane, *, height: int, width: int) -> Tensor:
    """[n, height width, h] -> [n, slots, h], zeros where there is padding."""
    empty = torch.zeros_like(x[:, 0])
    rows = [x[:, r * width + c] if r < height and c < width else empty for r, c in places.source]
    return torch.stack(rows, 1)


def from_windows(y: Tensor, places: Plane, *, height: int, width: int) -> Tensor:
    """The other way round; padding is dropped."""
    slot = {place: i for i, place in enumerate(places.source)}
    return torch.stack([y[:, slot[r, c]] for r in range(height) for c in range(width)], 1)


def layer(block: Any, x: Tensor, *, height: int, width: int, size: int, shift: int, running: Pass) -> Tensor:
    """A Swin layer on the weights of transformers' own."""
    places = plane(height, width, size=size, shift=shift)
    attention = block.attention
    heads = attention.num_attention_heads
    z = in_windows(norm(block.layernorm_before, x, running), places, height=height, width=width)

    def split(projection: nn.Module) -> Tensor:
        y: Tensor = projection(z)
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(attention.q_proj), split(attention.k_proj), split(attention.v_proj)
    if running is Pass.LRP:
        q, k, v = share(q, 0.25), share(k, 0.25), share(v, 0.5)
    apart = places.inside[:, None] - places.inside[None] + size - 1
    table = attention.relative_position_bias.relative_position_bias_table
    bias = table[apart[..., 0] * (2 * size - 1) + apart[..., 1]].permute(2, 0, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    scores = scores - 100.0 * (places.region[:, None] != places.region[None])
    scores = scores.masked_fill(places.window[:, None] != places.window[None], -torch.inf)
    pattern = torch.softmax(scores, -1)
    if running is Pass.CP_LRP:
        pattern = pattern.detach()
    y = attention.o_proj((pattern @ v).transpose(1, 2).flatten(2))
    x = x + from_windows(y, places, height=height, width=width)
    z = block.mlp.fc1(norm(block.layernorm_after, x, running))
    act: Callable[[Tensor], Tensor] = nn.functional.gelu
    up = act(z) if running is Pass.FISHER else z * (act(z) / stabilize(z)).detach()
    y = block.mlp.fc2(up)
    return x + y


def merge(module: Any, x: Tensor, *, height: int, width: int, running: Pass) -> Tensor:
    """Four neighbours side by side, down before right; beyond the border zeros."""
    empty = torch.zeros_like(x[:, 0])

    def at(r: int, c: int) -> Tensor:
        return x[:, r * width + c] if r < height and c < width else empty

    four = [
        torch.cat([at(r, c), at(r + 1, c), at(r, c + 1), at(r + 1, c + 1)], -1)
        for r in range(0, height, 2)
        for c in range(0, width, 2)
    ]
    y: Tensor = module.reduction(norm(module.norm, torch.stack(four, 1), running))
    return y


def logits(model: Any, hidden: Tensor, *, height: int, width: int, running: Pass) -> Tensor:
    """From the first block's input on."""
    size = model.config.window_size
    for stage in model.swin.encoder.layers:
        for index, block in enumerate(stage.blocks):
            shift = size // 2 if index % 2 and min(height, width) > size else 0
            hidden = layer(block, hidden, height=height, width=width, size=size, shift=shift, running=running)
        if stage.downsample is not None:
            hidden = merge(stage.downsample, hidden, height=height, width=width, running=running)
            height, width = -(-height // 2), -(-width // 2)
    found: Tensor = model.classifier(norm(model.swin.layernorm, hidden, running).mean(1))
    return found


def norm(module: Any, x: Tensor, running: Pass) -> Tensor:
    """LayerNorm, its deviation a constant of the rules."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    deviation = deviation if running is Pass.FISHER else deviation.detach()
    y: Tensor = centred / deviation * module.weight + module.bias
    return y


def share(x: Tensor, part: float) -> Tensor:
    """The value of x, a part of its gradient."""
    return part * x + (1 - part) * x.detach()
