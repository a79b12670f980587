"""The count of shards that an empty machine reads first."""

from benchmarks.count_shards import BATCH, CLIPS, IMAGES, count


def test_smaller_blocks_and_more_machines_need_fewer_shards_at_first():
    found = [count(4000, 2000, block, 1, 64) for block in (10_000, 3000, 1000)]
    assert [count["shards_100"] for count in found] == [24, 24, 24]  # 16 of images, 8 of clips
    first = [count["shards_1"] for count in found]
    assert first == sorted(set(first), reverse=True)
    assert count(4000, 2000, 10_000, 8, 64)["shards_1"] <= 8  # of the 64 samples, 8
    assert found[0]["bytes_100"] == 4000 * 18.7e3 + 2000 * 250e3


def test_the_blocks_of_the_recipes_begin_within_a_minute():
    """At 0.5 GB/s, with the numbers of docs/data.md."""
    found = count(IMAGES, CLIPS, 1 << 20, 1, BATCH)
    assert found["shards_1"] == 1739 and found["bytes_1"] < 60 * 0.5e9
