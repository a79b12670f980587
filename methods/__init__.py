"""The tables of methods; a YAML names a method by its key `method`.

A method is a subclass of ViCMAE or Classifier. It may have more attributes:

    supports_fsdp             False if FSDP must not shard it
    algorithms()              Composer algorithms of its own
    takes_image_frames        images may have fewer frames than clips, see augment.image_frames
    check_augment(augment)    raises ValueError if the block `augment` does not suit it; called by
                              check_blocks
    needs_labels              a pre-training's data sets must be labelled
    images_as_stored          a classifier of clips sees an image as one frame, with its depth map
    head_per_data_set         a classifier is built with the number of classes of each data set; it
                              has classes_in() and classes_of(), see MultiHead
"""

from typing import Any

from torch import Tensor

from methods.contrastive import MoCoV2, SimCLR, SimSiam, Triplet, VICReg
from methods.linear_probe import LinearProbe
from methods.masked import MAE, STMAE, OmniMAE, VideoMAE
from methods.supervised import Omnivore
from methods.tubevit import TubeViT
from model import Classifier, ViCMAE

PRETRAINING = {
    "vicmae": ViCMAE,
    "simclr": SimCLR,
    "moco_v2": MoCoV2,
    "triplet": Triplet,
    "simsiam": SimSiam,
    "vicreg": VICReg,
    "mae": MAE,
    "st_mae": STMAE,
    "videomae": VideoMAE,
    "omnimae": OmniMAE,
}
CLASSIFIERS = {
    "classifier": Classifier,
    "omnivore": Omnivore,
    "linear_probe": LinearProbe,
    "tubevit": TubeViT,
}


def check_blocks(net: ViCMAE | Classifier, data: dict[str, Any], augment: dict[str, Any]) -> None:
    """Raise ValueError if the blocks `data` and `augment` of a training do not suit its method."""
    image_frames = augment.get("image_frames")
    if image_frames and not getattr(net, "takes_image_frames", False):
        raise ValueError(f"augment.image_frames={image_frames}: works with method=omnimae only")
    if hasattr(net, "check_augment"):
        net.check_augment(augment)
    shapes_differ = bool(image_frames) or getattr(net, "images_as_stored", False)
    if shapes_differ and not data.get("one_stream_per_batch"):
        key = "augment.image_frames" if image_frames else "model.depth_maps"
        reason = "since images and clips have different shapes"
        raise ValueError(f"data.one_stream_per_batch=false: must be true with {key}, {reason}")


def method_of(stage: str, sizes: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """Return the method of a checkpoint that does not name it, such as files of earlier versions.

    Args:
        stage: "pretrain", or "finetune" for a classifier.
        sizes: arguments of the model, as far as they are known.
        weights: by our names.
    """
    if stage == "finetune":
        if "neck.running_mean" in weights:
            return "linear_probe"
        return "omnivore" if "head.0.bias" in weights else "classifier"
    if sizes.get("num_frames", 1) == 1:
        return "vicmae"  # an encoder of images, with whatever method it was trained
    return "videomae" if sizes.get("mask") == "tube" else "st_mae"
