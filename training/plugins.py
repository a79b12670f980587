"""Algorithms, callbacks and loggers that a YAML file can name.

The lists hold the Composer classes that work with these models. A class of your own is named with
its module, as `my_module.MyCallback` (docs/code.md).
"""

import os
import time
from pathlib import Path
from typing import Any

from composer import Algorithm, Callback
from composer.algorithms import EMA, SAM, SWA, ChannelsLast, GradientClipping, LowPrecisionLayerNorm
from composer.callbacks import (
    EarlyStopper,
    LRMonitor,
    MemoryMonitor,
    MemorySnapshot,
    OOMObserver,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
    SystemMetricsMonitor,
    ThresholdStopper,
)
from composer.loggers import (
    CometMLLogger,
    ConsoleLogger,
    FileLogger,
    LoggerDestination,
    MLFlowLogger,
    NeptuneLogger,
    SlackLogger,
    TensorboardLogger,
    WandBLogger,
)
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
        EarlyStopper,
        LRMonitor,
        MemoryMonitor,
        MemorySnapshot,
        OOMObserver,
        OptimizerMonitor,
        RuntimeEstimator,
        SpeedMonitor,
        SystemMetricsMonitor,
        ThresholdStopper,
    ),
    Callback,
)
LOGGERS = Named(
    (
        CometMLLogger,
        ConsoleLogger,
        FileLogger,
        MLFlowLogger,
        NeptuneLogger,
        SlackLogger,
        TensorboardLogger,
        WandBLogger,
    ),
    LoggerDestination,
)


def place_files(block: dict[str, dict] | None, run: Path) -> dict[str, dict]:
    """Return a block of callbacks or loggers whose files are in a run directory by default."""
    start = time.strftime("%Y%m%d-%H%M%S")  # Composer would overwrite the log of an earlier start.
    places: dict[str, dict[str, Any]] = {
        "FileLogger": {"filename": f"{run}/logs-{start}-rank{{rank}}.txt"},
        "MLFlowLogger": {"tracking_uri": f"{run}/mlruns"},
        "MemorySnapshot": {"folder": f"{run}/torch_traces"},
        "OOMObserver": {"folder": f"{run}/torch_traces"},
        "TensorboardLogger": {"log_dir": f"{run}/tensorboard"},
        "WandBLogger": {"init_kwargs": {"dir": str(run)}},
    }
    if {"MLFLOW_TRACKING_URI", "DATABRICKS_TOKEN"} & os.environ.keys():
        del places["MLFlowLogger"]  # The user has a server.
    placed = dict(block or {})
    for name in placed.keys() & places.keys():
        placed[name] = OmegaConf.to_container(OmegaConf.merge(places[name], placed[name]))
    return placed
