"""Necessary arithmetic: FLOPs (a multiplication and an addition are two) that no arrangement of the same algorithm
avoids.

T tokens in windows of length L; a linear layer [d_out, d_in]; P weights of a block's linear layers; h the width of
attention's output.

    linear layers, forward, or backward to activations     2 P T each
    causal attention, forward: q k^T and its product with v    2 products of T (L + 1) / 2 pairs: 2 h T (L + 1)
        backward to q, k, v: four such products (a fused kernel's recomputed scores are not necessary)
    Hessian of a site with d inputs: symmetric                 T d (d + 1)
    second moments of a layer's output gradients, chunks of c rows: symmetric    T c (c + 1)
    D of a site: not symmetric                                 2 T d^2
    P of a layer that adds to the hidden states: W (x - xq), and the product with xq    4 T d_out d_in
    Cholesky                                                   d^3 / 3
    column loop: each error reaches each later column once     d_out d (d - 1)
    quadratic form of a symmetric matrix                       d_out d (d + 1)

Profile: the block's forward, its recomputation (memory that is flat in depth needs it; ``profile_once`` leaves it out),
a backward for Fisher and one for LRP, Hessians, output moments. Refinement: a forward of both streams, Hessians, D and
P. Norms, softmax and rotary embeddings are no products and count nothing, nor do embedding and head.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.shapes import BlockShape
from lrpq.relevance.outputs import CHUNK_ROWS

BF16_BYTES = 2
ADDING = ("o", "down")
"""Sites whose one layer adds to the hidden states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFlops:
    """One block on some windows."""

    linear: float
    """Linear layers, once."""
    attention: float
    """Causal attention, forward."""
    hessians: float
    moments: float
    correction: float
    """D and P."""

    @property
    def forward(self) -> float:
        """One stream."""
        return self.linear + self.attention

    def backward(self, passes: int) -> float:
        """To activations only."""
        return passes * (self.linear + 2 * self.attention)

    @property
    def profile_once(self) -> float:
        """Profile if nothing had to be recomputed."""
        return self.forward + self.backward(2) + self.hessians + self.moments

    @property
    def profile(self) -> float:
        """Forward stream, recomputation, both backward passes, Hessians, output moments."""
        return self.profile_once + self.forward

    @property
    def refine(self) -> float:
        """Both streams, Hessians, correction products."""
        return 2 * self.forward + self.hessians + self.correction


def block_flops(shape: BlockShape, *, windows: int, length: int) -> BlockFlops:
    """Count one block."""
    tokens = windows * length
    widths = {site: shape.layers[members[0]][1] for site, members in shape.sites.items()}
    correction = 0.0
    for site, members in shape.sites.items():
        d_out, d_in = shape.layers[members[0]]
        correction += 4.0 * tokens * d_out * d_in if site in ADDING else 2.0 * tokens * d_in * d_in
    return BlockFlops(
        linear=2.0 * tokens * num_weights(shape),
        attention=2.0 * shape.hidden * tokens * (length + 1),
        hessians=sum(hessian(d, tokens) for d in widths.values()),
        moments=sum(moments(d_out, tokens) for d_out, _ in shape.layers.values()),
        correction=correction,
    )


def num_weights(shape: BlockShape) -> int:
    """Weights of the block's linear layers."""
    return sum(d_out * d_in for d_out, d_in in shape.layers.values())


def hessian(d: int, tokens: int) -> float:
    """Symmetric sum of outer products."""
    return float(tokens) * d * (d + 1)


def moments(d_out: int, tokens: int) -> float:
    """`lrpq.relevance.outputs.add_outputs`, one triangle of each chunk."""
    chunks = [min(CHUNK_ROWS, d_out - start) for start in range(0, d_out, CHUNK_ROWS)]
    return sum(hessian(rows, tokens) for rows in chunks)


def cholesky(d: int) -> float:
    """A factorisation."""
    return d**3 / 3


def column_loop(d_out: int, d_in: int, widths: int = 1) -> float:
    """GPTQ's sweep with its updates."""
    return float(widths) * d_out * d_in * (d_in - 1)


def quadratic_form(d_out: int, d_in: int, widths: int = 1) -> float:
    """Predicted costs."""
    return float(widths) * d_out * d_in * (d_in + 1)


def solve(d_out: int, d_in: int) -> float:
    """Two triangular solves for d_out right-hand sides."""
    return 2.0 * d_out * d_in * d_in


def pass_bytes(shape: BlockShape, *, windows: int, length: int, micro_batch: int) -> float:
    """One pass through the linear layers in bfloat16: inputs, outputs, and the weights once a micro-batch."""
    tokens, batches = windows * length, -(-windows // micro_batch)
    activations = tokens * sum(d_out + d_in for d_out, d_in in shape.layers.values())
    return float(BF16_BYTES * (activations + batches * num_weights(shape)))
