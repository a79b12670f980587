"""Algorithms, callbacks and loggers that a YAML file can name.

The lists hold our classes, and Composer's that YAML files and docs/ use. Any other class is named
with its module: `composer.callbacks.EarlyStopper`, or `my_module.MyCallback` (docs/code.md).
"""

import time
from pathlib import Path
from typing import Any

from composer import Algorithm, Callback
from composer.algorithms import EMA, SAM, SWA, ChannelsLast, GradientClipping, LowPrecisionLayerNorm
from composer.callbacks import LRMonitor, MemoryMonitor, RuntimeEstimator, SpeedMonitor
from composer.loggers import FileLogger, LoggerDestination, TensorboardLogger, WandBLogger
from omegaconf import OmegaConf

from evaluation.online import EffectiveRank, OnlineProbe
from evaluation.probes import KNN
from training.config import Named
from training.speedups import ContrastRamp, FreezeEncoder, PartialDecoding, ProgressiveResizing
from training.spot import SpotNotice

# Our classes, then Composer's.
ALGORITHMS = Named(
    (
        ContrastRamp,
        FreezeEncoder,
        PartialDecoding,
        ProgressiveResizing,
        ChannelsLast,
        EMA,
        GradientClipping,
        LowPrecisionLayerNorm,
        SAM,
        SWA,
    ),
    Algorithm,
)
CALLBACKS = Named(
    (
        EffectiveRank,
        KNN,
        OnlineProbe,
        SpotNotice,
        LRMonitor,
        MemoryMonitor,
        RuntimeEstimator,
        SpeedMonitor,
    ),
    Callback,
)
LOGGERS = Named((FileLogger, TensorboardLogger, WandBLogger), LoggerDestination)


def place_files(block: dict[str, dict] | None, run: Path) -> dict[str, dict]:
    """Return a block of callbacks or loggers whose files are in a run directory by default."""
    start = time.strftime("%Y%m%d-%H%M%S")  # Composer would overwrite the log of an earlier start.
    places: dict[str, dict[str, Any]] = {
        "FileLogger": {"filename": f"{run}/logs-{start}-rank{{rank}}.txt"},
        "TensorboardLogger": {"log_dir": f"{run}/tensorboard"},
        "WandBLogger": {"init_kwargs": {"dir": str(run)}},
    }
    placed = dict(block or {})
    for name in placed.keys() & places.keys():
        placed[name] = OmegaConf.to_container(OmegaConf.merge(places[name], placed[name]))
    return placed
