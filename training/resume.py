"""Compare a launch with the run that it resumes: its settings, its data sets, and its end."""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from composer.core import TimeUnit, ensure_time

from shards.format import fingerprint
from training.announce import say_if_slow
from training.sources import one_line, read_settings

# Blocks and keys that may change when a run resumes.
FREE = ("trainer", "callbacks", "loggers", "checkpoints", "make_demo")
FREE_KEYS = ("data.num_workers", "data.prefetch_factor", "data.download", "model.chunk_size")
OLD_KEYS = ("allow_changes", "data.make_demo")  # in the config.yaml of earlier versions


def flatten(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value in nested blocks with its key, such as augment.video.hue."""
    for name, value in block.items():
        if value and isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def fixed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that may not change when a run resumes, as {block.key: value}."""
    blocks = {name: block for name, block in config.items() if name not in FREE and block != {}}
    free = tuple(f"{key}." for key in FREE_KEYS + OLD_KEYS)
    return {key: value for key, value in flatten(blocks) if not f"{key}.".startswith(free)}


def read_config(run: Path) -> dict[str, Any]:
    """Return the content of a run's config.yaml, empty if there is none.

    Raises:
        ValueError: config.yaml is corrupt.
    """
    path = run / "config.yaml"
    return read_settings(path) if path.exists() else {}


def read_record(file: Path) -> dict[str, Any]:
    """Return the content of a run's result.json or data_sets.json, empty if there is none.

    Raises:
        ValueError: the file is corrupt.
    """
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: corrupt ({one_line(error)}); restore it or delete it") from error


def changed_settings(before: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return "key (old -> new)" for each fixed setting that differs from an earlier config."""
    if not before:
        return []
    before = fixed_settings(before)
    now = fixed_settings(json.loads(json.dumps(config)))  # lists for tuples, as in the file
    changed = []
    for key in sorted(before | now):
        if before.get(key) != now.get(key):
            old = json.dumps(before[key]) if key in before else "not given"
            new = json.dumps(now[key]) if key in now else "not given"
            changed.append(f"{key} ({old} -> {new})")
    return changed


def is_finished(run: Path, before: str | None, now: str | None) -> bool:
    """Return whether a run has a result, and its duration was not raised since.

    A duration in another unit, such as 600ba after 10ep, is compared with what the run has done.

    Args:
        before, now: trainer.max_duration of the run and of this launch.
    """
    result = run / "result.json"
    if not (now and result.exists()):
        return False
    old, new = ensure_time(before or now, "ep"), ensure_time(now, "ep")
    if old.unit == new.unit:
        return new <= old
    done = read_record(result)
    key = {TimeUnit.EPOCH: "epoch", TimeUnit.BATCH: "step"}.get(new.unit)
    return key in done and new.value <= done[key]


def compare_with_run(run: Path, settings: dict[str, Any]) -> bool:
    """Return whether a run is finished, for a launch with these settings.

    Raises:
        ValueError: it was started with other settings.
    """
    before = read_config(run)
    if changed := changed_settings(before, settings):
        raise ValueError(
            f"{run} was started with other values of {', '.join(changed)}; "
            "choose another run_name, or delete the run directory"
        )
    duration = (before.get("trainer") or {}).get("max_duration")
    return is_finished(run, duration, settings["trainer"].get("max_duration"))


@say_if_slow("comparing the data sets with the run's")
def check_data_sets(run: Path, paths: list[str]) -> dict[str, dict]:
    """Compare data sets with the run's data_sets.json, and return its new content.

    Raises:
        ValueError: other samples or classes are at a path than when the run was started.
    """
    before = read_record(run / "data_sets.json")
    now = {path: fingerprint(path) for path in paths}
    for path in paths:
        new, old = now[path], before.get(path, now[path])
        if new == old:
            continue
        kind = "samples"
        if new["classes"] != old.get("classes"):
            pairs = zip_longest(new["classes"], old.get("classes", []), fillvalue="none")
            differing = [pair for pair in pairs if pair[0] != pair[1]][:5]
            names, earlier = (", ".join(classes) for classes in zip(*differing, strict=True))
            kind = f"classes ({names} instead of {earlier})"
        remedy = "restore it, or choose another run_name"
        raise ValueError(f"{path} has other {kind} than when {run} was started; {remedy}")
    return before | now
