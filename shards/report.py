"""The report of a conversion: what became of each file of a source.

Every file is converted, skipped (it cannot be decoded), ignored (for a reason that is named) or
absent (listed, but not there).
"""

from collections import Counter
from collections.abc import Iterable

LATE_LABEL = "label after its sample"  # of a tar: the reason for which a label is ignored


class Ignored(dict):
    """The files that are not converted: {reason: {"count": files, "first": up to 10 names}}."""

    def add(self, reason: str, names: Iterable[str], count: int = 1) -> None:
        """Add `count` files, of which some names are given."""
        entry = self.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += count
        entry["first"] = [*entry["first"], *map(printable, names)][:10]


def printable(name: str) -> str:
    """Return a name with bytes that are not UTF-8 escaped, as in caf\\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def join_reports(request: dict, parts: list[dict]) -> dict:
    """Return the report of a conversion.

    Args:
        request: the content of request.json.
        parts: the content of each part.json. Earlier versions of data_prep.py wrote fewer entries.
    """
    skipped = [entry for part in parts for entry in part["skipped"]]
    inputs = sum(part["inputs"] for part in parts)
    samples = [part.get("samples", part["inputs"] - len(part["skipped"])) for part in parts]
    sides = [side for part in parts for side in part.get("short_sides", ())]
    ignored = Ignored()
    for report in (request, *parts):
        for reason, entry in report.get("ignored", {}).items():
            ignored.add(reason, entry["first"], entry["count"])
    return request | {
        "inputs": inputs,
        "samples": sum(samples),
        "short": sum(part["short"] for part in parts),  # videos or clips that repeat frames
        # videos with another film after the first, which alone is read
        "joined": [name for part in parts for name in part.get("joined", ())],
        "short_sides": [min(sides), max(sides)] if sides else None,  # pixels
        "samples_per_class": count_classes(request["classes"], parts),
        "ignored": dict(sorted(ignored.items())),
        "skipped": skipped,
    }


def count_classes(classes: list[str], parts: list[dict]) -> dict[str, int] | None:
    """Return the number of samples of each class; None if parts of earlier versions do not say."""
    if not all("labels" in part for part in parts):
        return None
    counts = Counter()
    for part in parts:
        counts.update(dict(part["labels"]))
    names = classes or [str(label) for label in range(max(counts, default=-1) + 1)]
    return {name: counts[label] for label, name in enumerate(names)}


def check_labels(report: dict, parts: list[dict]) -> None:
    """Raise ValueError if a label cannot be assigned, or if only some samples have a label."""
    if late := report["ignored"].get(LATE_LABEL):
        problem = f"{late['first'][0]} has its label after other samples"
        raise ValueError(f"{problem}; sort the tars by name")
    unlabelled = [part["unlabelled"] for part in parts if part.get("unlabelled")]
    if unlabelled and any(part["highest"] >= 0 for part in parts):
        fault = f"{unlabelled[0]} has no label, but other samples have one"
        raise ValueError(f"{fault}; give all a label, or leave out those without")


def print_summary(out: str, report: dict) -> None:
    """Print the classes, then how many inputs were converted, absent, skipped and ignored."""
    counts = report["samples_per_class"] or {}
    if 0 < len(counts) <= 20:
        print("classes: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    elif counts:
        fewest, most = min(counts.values()), max(counts.values())
        print(f"classes: {len(counts)}, with {fewest} to {most} samples each")
    line = ", ".join(f"{report[name]} {name}" for name in ("samples", "absent", "short"))
    line = f"{out}: {line}, {len(report['skipped'])} skipped"
    if report["joined"]:
        line += f", {len(report['joined'])} joined (only the first film of each is read)"
    ignored = {reason: entry["count"] for reason, entry in report["ignored"].items()}
    if ignored:
        reasons = "; ".join(f"{count} {reason}" for reason, count in ignored.items())
        line += f", {sum(ignored.values())} ignored ({reasons})"
    print(line)
