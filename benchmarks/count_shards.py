"""Count the shards that a machine with an empty cache reads in its first steps.

    uv run python benchmarks/count_shards.py

No data are needed: Streaming's own functions order the samples of ImageNet-1k and Kinetics-400, as
data_prep.py stores them, for several values of data.shuffle_block_size. The order is the same as in
vit*.yaml, whose batch of 4,096 is shared by the machines. It takes a minute.
"""

import sys

import numpy as np
from streaming.base.shuffle import get_shuffle

BATCH = 4096
PART = 256  # samples of a shard: the inputs of a part of data_prep.py
IMAGES, CLIPS = 1_281_167, 241_255
IMAGE_BYTES, CLIP_BYTES = 18.7e3, 250e3  # docs/data.md, Cost of a conversion
CLASSES = 1000  # of images, which are sorted by class
BLOCKS = (4_000_000, 1 << 20, 1 << 19, 1 << 18, 1 << 17, 1 << 16)


def shards_of(samples: int) -> list[int]:
    """Return the samples of each shard of a data set."""
    whole, rest = divmod(samples, PART)
    return [PART] * whole + [rest] * (rest > 0)


def count(images: int, clips: int, block: int, machines: int, batch: int) -> dict[str, float]:
    """Return what one of the machines reads in an epoch's first step, and in its first 100.

    Returns:
        shards and bytes of the first step and of the first 100 steps, and the classes of images in
        a batch in the middle of the epoch.
    """
    sizes = np.array(shards_of(images) + shards_of(clips))
    order = get_shuffle("py1e", sizes, 1, 0, 0, block)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    first_clip = len(shards_of(images))
    sample_bytes = np.where(np.arange(len(sizes)) < first_clip, IMAGE_BYTES, CLIP_BYTES)
    found = {}
    for steps in (1, 100):
        read = np.unique(shard_of[: steps * batch : machines])
        found[f"shards_{steps}"] = len(read)
        found[f"bytes_{steps}"] = float((sizes * sample_bytes)[read].sum())
    middle = order[len(order) // 2 :][:batch]
    found["classes"] = len(np.unique(middle[middle < images] * CLASSES // images))
    return found


def main() -> None:
    print("block      machines  first step       first 100 steps  classes in a batch")
    for block in BLOCKS:
        for machines in (1, 4):
            found = count(IMAGES, CLIPS, block, machines, BATCH)
            read = [
                f"{found[f'shards_{steps}']:,} ({found[f'bytes_{steps}'] / 1e9:.1f} GB)"
                for steps in (1, 100)
            ]
            print(f"{block:<11,}{machines:<10}{read[0]:<17}{read[1]:<17}{found['classes']}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
