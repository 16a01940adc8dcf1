"""Random orthogonal matrices in float64: Haar distributed ones and randomised Hadamard matrices."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float


class RotationKind(Enum):
    """Where a rotation comes from."""

    HADAMARD = "hadamard"
    """Randomised Hadamard: spreads an outlier channel over all channels alike."""
    RANDOM = "random"
    """Uniformly random."""


def rotation_matrix(kind: RotationKind, size: int, *, generator: torch.Generator) -> Float[Tensor, "size size"]:
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


def random_orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Haar distributed orthogonal matrix: QR of a Gaussian matrix with R's diagonal made positive.

    Without the signs the distribution depends on how the library reflects (Stewart 1980; Mezzadri 2007,
    arXiv:math-ph/0609050).
    """
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(gaussian)
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).contiguous()


def randomized_hadamard(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """diag(random signs) (S kron O): S Sylvester's Hadamard matrix of size 2^k, O a random orthogonal m x m.

    size = 2^k m with m odd. For m = 1, O is a sign and all entries have the magnitude size^-1/2. For another m (576 =
    64 * 9, 3072 = 1024 * 3) the m x m blocks are equal up to signs, so that an outlier is spread evenly over
    2^k channels and by O over the m inside. QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) takes tabled Hadamard
    matrices for some m instead; O serves every m and needs no table.
    """
    m = size
    while m % 2 == 0:
        m //= 2
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * torch.kron(sylvester(size // m), random_orthogonal(m, generator))


def sylvester(size: int) -> Float[Tensor, "size size"]:
    """Orthonormal Hadamard matrix of a power of two, by Sylvester's doubling."""
    S = torch.ones(1, 1, dtype=torch.float64)
    while len(S) < size:
        S = torch.cat([torch.cat([S, S], 1), torch.cat([S, -S], 1)])
    return S / size**0.5
