"""The name of the processor, which Composer records in every Trainer and checkpoint."""

import platform

from composer.utils import collect_env


def name_processor_without_processes() -> None:
    """Let Composer take the name of the processor from Python; call this before a Trainer is built.

    Composer has py-cpuinfo find the name, and offers no option against it. Each time, py-cpuinfo
    starts processes and takes a second or more, also while a checkpoint is written.
    """
    collect_env.get_cpu_model = platform.processor
