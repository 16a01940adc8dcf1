"""What is planned: a job and the machines for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrpq.allocate.forecast import measured_windows
from lrpq.model.layers import Choice
from lrpq.plan.machine import Machine
from lrpq.quant.grid import Grid
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import CHUNK_TOKENS
from tasks.calibration.held_out import default_held_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A compression, as far as its cost depends on it; the fields are those of the configuration."""

    dtype: torch.dtype
    num_windows: int
    length: int
    held_out: int | None
    num_shards: int
    """None of them empty."""
    shards_asked: bool
    """Whether that number was asked for."""
    micro_batch: int
    threads: int
    relevance: Relevance
    choices: tuple[Choice, ...]
    grid: Grid
    budget_bits: float
    sequential: bool
    corrected: bool
    polish_rounds: int
    row_blocks: int
    evaluated_windows: int
    """0 measures nothing."""
    evaluated_length: int
    control: bool
    forecast: bool = False
    """Whether candidates are measured before their refinement."""
    head_choice: Choice | None = None
    gradients_every: int = 1
    cost_rows: int | None = None
    """Rows of a layer that its costs are found from; None quantizes all at every choice."""
    label_tokens: int = CHUNK_TOKENS
    """Rows of logits at a time."""
    trellis: bool = False
    """Whether a plan's codes are a trellis's where they can be; candidates' and the control's are uniform."""
    low_memory: bool = False
    """On a GPU, what is not at work waits in host memory."""

    @property
    def held_out_windows(self) -> int:
        """Windows that guard the result."""
        return default_held_out(self.num_windows) if self.held_out is None else self.held_out

    @property
    def forecast_windows(self) -> int:
        """Windows that candidates are measured on before their refinement: of the evaluation, else of the guard."""
        return measured_windows(self.evaluated_windows or self.held_out_windows) if self.forecast else 0

    @property
    def forecast_length(self) -> int:
        """Tokens of one of these."""
        return self.evaluated_length if self.evaluated_windows else self.length

    @property
    def weighs_tokens(self) -> bool:
        """Whether gradients weigh tokens and say how outputs work together, or give the costs alone."""
        return self.gradients_every == 1

    @property
    def explained_share(self) -> float:
        """Share of the calibration windows of which gradients are taken."""
        return -(-self.num_windows // self.gradients_every) / self.num_windows

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.num_windows * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines of one kind, and what connects them."""

    machine: Machine
    nodes: int
    gpus_per_node: int
    """0: workers on CPUs."""
    cpus_per_node: int
    host_bytes: int
    """Memory of a node."""
    device_bytes: int
    """Memory of a GPU; 0 without GPUs."""
    disk_bytes: int
    """Free local disk of a node."""
    network_bytes_per_second: float
    """Of a node, to the store and to the other nodes."""
    remote_store: bool
    workers: int | None = None
    """Asked for; None is one a GPU, or one for every ``threads`` cores."""
