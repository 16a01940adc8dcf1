"""Rotations are orthogonal, reproducible, and spread an outlier channel."""

from __future__ import annotations

import pytest
import torch

from lrpq.errors import ConfigError
from lrpq.model.layers import Choice
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform.orthogonal import RotationKind, rotation_matrix, sylvester


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kurtosis(W: torch.Tensor) -> float:
    return float((W**4).mean() / (W**2).mean() ** 2)


def planted() -> torch.Tensor:
    """Gaussian weights with one channel 30 times as large."""
    W = torch.randn(48, 96, dtype=torch.float64, generator=seeded(3))
    W[:, 17] *= 30
    return W


@pytest.mark.parametrize("kind", RotationKind)
@pytest.mark.parametrize("size", [1, 2, 7, 64, 96, 576])
def test_orthogonal_in_float64(kind: RotationKind, size: int) -> None:
    Q = rotation_matrix(kind, size, generator=seeded())
    assert Q.dtype == torch.float64
    eye = torch.eye(size, dtype=torch.float64)
    assert (Q @ Q.T - eye).abs().max() < 1e-12
    assert (Q.T @ Q - eye).abs().max() < 1e-12


@pytest.mark.parametrize("kind", RotationKind)
def test_the_seed_decides(kind: RotationKind) -> None:
    Q = rotation_matrix(kind, 24, generator=seeded(5))
    assert torch.equal(Q, rotation_matrix(kind, 24, generator=seeded(5)))
    assert not torch.equal(Q, rotation_matrix(kind, 24, generator=seeded(6)))


def test_hadamard_of_a_power_of_two_has_one_magnitude() -> None:
    Q = rotation_matrix(RotationKind.HADAMARD, 64, generator=seeded())
    assert torch.allclose(Q.abs(), torch.full_like(Q, 1 / 8), rtol=0, atol=1e-15)
    assert 0.3 < float((Q < 0).double().mean()) < 0.7


def test_hadamard_blocks_have_equal_magnitudes() -> None:
    Q = rotation_matrix(RotationKind.HADAMARD, 96, generator=seeded())  # 32 * 3
    blocks = Q.abs().view(32, 3, 32, 3).transpose(1, 2).reshape(-1, 3, 3)
    assert torch.allclose(blocks, blocks[:1].expand_as(blocks), rtol=0, atol=1e-15)
    first = torch.linalg.norm(blocks[0], dim=1)
    assert torch.allclose(first, torch.full_like(first, 32**-0.5))


def test_hadamard_signs_are_random() -> None:
    """Without them the first channel would be the plain mean of all."""
    Q = rotation_matrix(RotationKind.HADAMARD, 64, generator=seeded())
    assert not torch.allclose(Q.abs() * 8, Q * 8)
    assert not torch.equal(Q.sign(), sylvester(64).sign())


def test_random_rotations_favour_no_sign() -> None:
    """Haar: unlike a raw QR, whose R has a negative diagonal in LAPACK, so that Q's diagonal leans to one side."""
    generator = seeded(1)
    traces = [float(rotation_matrix(RotationKind.RANDOM, 8, generator=generator).trace()) for _ in range(300)]
    mean = sum(traces) / len(traces)
    assert abs(mean) < 4 / 300**0.5  # the trace has mean 0 and variance 1
    assert 0.8 < sum(t * t for t in traces) / len(traces) < 1.25


@pytest.mark.parametrize("kind", RotationKind)
def test_an_outlier_channel_is_spread(kind: RotationKind) -> None:
    W = planted()
    rotated = W @ rotation_matrix(kind, 96, generator=seeded())
    assert kurtosis(W) > 30
    assert kurtosis(rotated) < kurtosis(W) / 4  # not 3, a Gaussian's: the outlier still makes some rows larger
    peaks = [float(V.abs().amax(0).max() / V.abs().amax(0).median()) for V in (W, rotated)]
    assert peaks[0] > 10
    assert peaks[1] < peaks[0] / 2


def test_hadamard_spreads_an_outlier_evenly() -> None:
    """All channels come out alike; behind a random rotation some are larger."""
    W = planted()[:, :64]
    rotated = W @ rotation_matrix(RotationKind.HADAMARD, 64, generator=seeded())
    assert float(rotated.abs().amax(0).max() / rotated.abs().amax(0).median()) < 1.5


@pytest.mark.parametrize("kind", RotationKind)
def test_rounding_loses_less_behind_a_rotation(kind: RotationKind) -> None:
    """Error of the outputs for white inputs; the rotation is no change of the layer but of what is rounded."""
    W, choice = planted(), Choice(bits=3, group_size=-1)
    Q = rotation_matrix(kind, 96, generator=seeded())

    def error(V: torch.Tensor) -> float:
        return float((round_to_nearest(V, choice).dequantize(V.dtype) - V).square().sum())

    assert error(W @ Q) < 0.8 * error(W)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="size 0"):
        rotation_matrix(RotationKind.RANDOM, 0, generator=seeded())
