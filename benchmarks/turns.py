"""Ratios of things that are run in turn."""

import json
import statistics
import time
from collections.abc import Callable


def take_turns(
    contenders: dict[str, Callable[[], int]],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return {contender: seconds per item in each turn}, after a turn that warms up.

    Args:
        contenders: functions that process some items and return their number.
        clock: returns seconds.
    """
    seconds = {name: [] for name in contenders}
    for _ in range(turns + 1):
        for name, work in contenders.items():
            begin = clock()
            count = work()
            seconds[name].append((clock() - begin) / count)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of the turns."""
    pairs = zip(numerators, denominators, strict=True)
    return round(statistics.median(above / below for above, below in pairs), 3)


def report(what: str, value: float, relative_to: str, counted: str, **more: object) -> None:
    """Print a ratio as a line of JSON."""
    line = {"what": what, "ratio": value, "relative_to": relative_to, "counted": counted}
    print(json.dumps(line | more), flush=True)
