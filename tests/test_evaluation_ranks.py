"""What rank 0 does for all ranks."""

import pytest
from composer.utils import dist

from evaluation.ranks import on_rank_0


def fail() -> None:
    raise FileNotFoundError(2, "no such file", "a/config.yaml")


def check_answers(rank: int) -> None:
    assert on_rank_0(lambda: f"of rank {dist.get_global_rank()}") == "of rank 0"
    with pytest.raises(FileNotFoundError) as raised:
        on_rank_0(fail)
    assert raised.value.filename == "a/config.yaml"


def test_all_ranks_get_the_result_or_the_error_of_rank_0(on_ranks):
    on_ranks(2, check_answers)
