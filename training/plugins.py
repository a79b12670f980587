"""Algorithms, callbacks and loggers that a YAML file can name.

The lists hold the Composer classes that work with these models. A class of your own is named with
its module, as `my_module.MyCallback` (docs/code.md).
"""

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

from evaluation.online import EffectiveRank, OnlineProbe
from evaluation.probes import KNN
from training.config import Named
from training.speedups import ContrastRamp, FreezeEncoder, PartialDecoding, ProgressiveResizing
from training.spot import SpotNotice

ALGORITHMS = Named(
    (
        ChannelsLast,
        ContrastRamp,
        EMA,
        FreezeEncoder,
        GradientClipping,
        LowPrecisionLayerNorm,
        PartialDecoding,
        ProgressiveResizing,
        SAM,
        SWA,
    ),
    Algorithm,
)
CALLBACKS = Named(
    (
        EarlyStopper,
        EffectiveRank,
        KNN,
        LRMonitor,
        MemoryMonitor,
        MemorySnapshot,
        OOMObserver,
        OnlineProbe,
        OptimizerMonitor,
        RuntimeEstimator,
        SpeedMonitor,
        SpotNotice,
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
