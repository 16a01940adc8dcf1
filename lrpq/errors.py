"""Every error that lrpq raises on purpose.

    LrpqError
    |-- ConfigError        what the user asked for is not possible or contradicts itself
    |   |-- BudgetError    the size budget is below the smallest or above the largest possible checkpoint
    |   `-- OutputBusy     another process is writing the output folder
    |-- ModelError         the source model: unknown, unsupported, truncated, not finite
    |-- CalibrationError   calibration or evaluation text: empty, too short, unreadable
    |-- QuantizationError  a layer cannot be quantized as asked
    |   `-- Diverged       a loss or a gradient of the tuning is not finite
    |-- CheckpointError    the written checkpoint is not what was meant
    |-- ClusterError       the workers: none left, none started, or one item ends them all
    |   `-- WorkerLost     a worker died or was given up; the stage goes on without it
    `-- StoreError         the store: not writable, a damaged or missing object
        `-- RunMismatch    the run id exists with another configuration

A message is one line: what is wrong and where, what was expected, what to do. The command line prints it
without a traceback and exits with code 2.
"""

from __future__ import annotations


class LrpqError(Exception):
    """Base of all errors a user can act upon."""


class ConfigError(LrpqError):
    """What the user asked for is not possible or contradicts itself."""


class BudgetError(ConfigError):
    """The budget lies outside what the choices of bit widths allow."""


class OutputBusy(ConfigError):
    """Another process is writing the output folder."""


class ModelError(LrpqError):
    """The source model cannot be read or is not supported."""


class CalibrationError(LrpqError):
    """Calibration or evaluation text cannot be used."""


class QuantizationError(LrpqError):
    """A layer cannot be quantized as asked."""


class Diverged(QuantizationError):
    """A loss or a gradient of the tuning is not finite."""


class CheckpointError(LrpqError):
    """The written checkpoint does not hold what was meant to be written."""


class ClusterError(LrpqError):
    """The workers cannot do what they are asked to."""


class WorkerLost(ClusterError):
    """A worker died or had to be given up."""


class StoreError(LrpqError):
    """The store cannot be read or written, or an object in it is damaged."""


class WaypointGone(StoreError):
    """A stage's state on the way is not there any more: another driver of the run has completed the stage."""


class RunMismatch(StoreError):
    """The run id is taken by a run with another configuration."""
