"""Random orthogonal matrices in float64: Haar distributed ones and randomised Hadamard matrices.

A Hadamard matrix is a Kronecker product and is kept as its factors: each of 8192 channels takes 128 + 64 products
instead of 8192, and no matrix of 537 MB is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lrpq.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float


MAX_EXPONENT = 7
"""Powers of two up to 2^7 stay one factor: the products of smaller ones would not keep a processor busy."""


class RotationKind(Enum):
    """Where a rotation comes from."""

    HADAMARD = "hadamard"
    """Randomised Hadamard: spreads an outlier channel over all channels alike."""
    RANDOM = "random"
    """Uniformly random."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hadamard:
    """diag(signs) (F_1 kron F_2 kron ..), which is orthogonal where every factor is."""

    signs: Float[Tensor, "channels=size"]
    factors: tuple[Float[Tensor, "m m"], ...]
    """The first one turns the channels that lie farthest apart."""

    def __len__(self) -> int:
        return len(self.signs)

    def dense(self) -> Float[Tensor, "size size"]:
        """The matrix."""
        matrix = torch.ones(1, 1, dtype=self.signs.dtype)
        for factor in self.factors:
            matrix = torch.kron(matrix, factor)
        return self.signs[:, None] * matrix


Orthogonal: TypeAlias = "Float[Tensor, 'size size'] | Hadamard"
"""A matrix, or its factors."""


def draw_rotation(kind: RotationKind, size: int, *, generator: torch.Generator) -> Orthogonal:
    """Orthogonal matrix of a kind, float64 on the CPU, drawn from ``generator``.

    Raises:
        ConfigError: the size is not positive, or the generator is not the CPU's.
    """
    if size < 1:
        raise ConfigError(f"a rotation of size {size} was asked for; expected a positive size")
    if generator.device.type != "cpu":
        raise ConfigError(
            f"the generator is on {generator.device}; give one of the CPU, whose stream is the same anywhere"
        )
    make = {RotationKind.HADAMARD: randomized_hadamard, RotationKind.RANDOM: random_orthogonal}
    return make[kind](size, generator)


def rotation_matrix(kind: RotationKind, size: int, *, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """`draw_rotation`, as a matrix."""
    drawn = draw_rotation(kind, size, generator=generator)
    return drawn.dense() if isinstance(drawn, Hadamard) else drawn


def rotate_axis(X: Float[Tensor, "before size after"], Q: Orthogonal) -> Float[Tensor, "before size after"]:
    """Y[b, j, a] = sum_i Q[i, j] X[b, i, a], in the dtype of X and Q, which is one."""
    if not isinstance(Q, Hadamard):
        return _turned(X, Q)
    Y = X * Q.signs[:, None]
    after = X.shape[1] * X.shape[2]
    for factor in Q.factors:
        after //= len(factor)
        Y = _turned(Y.reshape(-1, len(factor), after), factor)
    return Y.reshape(X.shape)


def _turned(X: Tensor, Q: Tensor) -> Tensor:
    return (X[..., 0] @ Q)[..., None] if X.shape[2] == 1 else Q.T @ X


def random_orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Haar distributed orthogonal matrix: QR of a Gaussian matrix with R's diagonal made positive.

    Without the signs the distribution depends on how the library reflects (Stewart 1980; Mezzadri 2007,
    arXiv:math-ph/0609050).
    """
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(gaussian)
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).contiguous()


def randomized_hadamard(size: int, generator: torch.Generator) -> Hadamard:
    """diag(random signs) (S kron O): S Sylvester's Hadamard matrix of size 2^k, O a random orthogonal m x m.

    size = 2^k m with m odd. For m = 1, O is a sign and all entries have the magnitude size^-1/2. For another m (576 =
    64 * 9, 3072 = 1024 * 3) the m x m blocks are equal up to signs, so that an outlier is spread evenly over
    2^k channels and by O over the m inside. QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) takes tabled Hadamard
    matrices for some m instead; O serves every m and needs no table.

    S is itself a Kronecker product of Hadamard matrices of any powers of two that make 2^k.
    """
    m = size
    while m % 2 == 0:
        m //= 2
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    O = random_orthogonal(m, generator)  # noqa: E741 - the symbol of the formula
    exponent = (size // m).bit_length() - 1
    inner = exponent if exponent <= MAX_EXPONENT else exponent // 2
    factors = (sylvester(2 ** (exponent - inner)), sylvester(2**inner), O)
    if m == 1:
        signs *= O[0]
    return Hadamard(signs=signs, factors=tuple(factor for factor in factors if len(factor) > 1))


def sylvester(size: int) -> Float[Tensor, "size size"]:
    """Orthonormal Hadamard matrix of a power of two, by Sylvester's doubling."""
    S = torch.ones(1, 1, dtype=torch.float64)
    while len(S) < size:
        S = torch.cat([torch.cat([S, S], 1), torch.cat([S, -S], 1)])
    return S / size**0.5
