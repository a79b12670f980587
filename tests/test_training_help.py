"""--help prints every key, with type, default and a text."""

import re
import sys
from typing import Annotated, Literal

import pytest

import eval as evaluation
import finetune
import pretrain
from training.config import Choice, Named
from training.help import stage_help


def block(*, width: int, names: list[str] = ("a",)) -> None:
    """Make a block.

    Args:
        width: of it, in pixels; and more. A second sentence.
        names: of what
            follows.
    """


class Other:
    """Does something else."""

    def __init__(self, size: float | None = None):
        pass


class Stage:
    """A stage.

    Args:
        kind, unit: what they are.
        inner: overrides the sentence of the block.
    """

    def __init__(
        self,
        *,
        kind: Literal["x", "y"] = "x",
        unit: str | None,
        inner: Annotated[dict, block, "names"] | None = None,
        many: list[Annotated[dict, block]] = (),
        chosen: Annotated[dict, Choice("kind", {"x": Other}, "x")],
        named: Annotated[dict, Named((Other,), object)],
        switch: bool = True,
    ):
        pass


def test_help_has_every_key_with_type_default_and_first_sentence(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = stage_help("Usage.", Stage).splitlines()
    assert printed == [
        "Usage.",
        "",
        "Keys, with types and defaults:",
        "  kind: x or y = x                           what they are",
        "  unit: str or null                          what they are",
        "  inner:                                     overrides the sentence of the block",
        "    width: int                               of it, in pixels",
        "  many:                                      Make a block",
        "    width: int                               of it, in pixels",
        "    names: list[str] = ('a',)                of what follows",
        "  chosen:                                    arguments of the kind, one of x; here of x",
        "    size: float or null = null",
        "  named:                                     arguments by the name of a class",
        "    Other:                                   Does something else",
        "  switch: bool = true",
    ]


def test_help_is_as_wide_as_the_terminal(monkeypatch):
    def take(
        *, size: int = 3, names_of_all_classes: dict[str, list[str]] | list[str] | None = None
    ) -> None:
        """Take.

        Args:
            size: the number of words in a sentence that is longer than a line.
            names_of_all_classes: a short text.
        """

    monkeypatch.setenv("COLUMNS", "80")
    texts = " " * 45
    assert stage_help("", take).splitlines()[3:] == [
        "  size: int = 3                              the number of words in a sentence",
        f"{texts}that is longer than a line",
        "  names_of_all_classes: dict[str, list[str]] or list[str] or null = null",
        f"{texts}a short text",
    ]


@pytest.mark.parametrize("stage", [pretrain, finetune, evaluation])
def test_help_of_a_stage_needs_no_file_and_cuts_no_text(stage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--help"])
    monkeypatch.setenv("COLUMNS", "1000")
    stage.main()
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "100")
    stage.main()
    printed = capsys.readouterr().out
    assert "".join(printed.split()) == "".join(wide.split())
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    keys = [line for line in lines if re.match(r"  +\w+:", line)]
    assert len(keys) > 20
    own = [line for line in keys if not re.match(r" +(size|[A-Z])", line)]
    texts = [line for line in own if re.search(r"\w {2,}\w|: {2,}\w| \S+ +\S+ \S+", line)]
    assert len(texts) > 0.8 * len(own)
