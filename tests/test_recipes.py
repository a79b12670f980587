"""Quantities computed from the recipes in yamls/, compared with the published values."""

import numpy as np
import pytest
from composer.core import ensure_time
from conftest import ROOT

import finetune
import pretrain
from shards.views import PretrainingViews, pick_frames
from training.config import load_config

IN1K, K400, SSV2, PLACES = 1_281_167, 240_000, 169_000, 1_803_460  # training samples
SLOWFAST = "SlowFast configs/masked_ssl/"
OMNIVORE = "omnivore omnivision/config/experiments/omnivore/swin_train_in1k_k400_sun_concat"
OMNIMAE = "omnivore omnivision/config/experiments/omnimae/"
VIDEOMAE = "VideoMAE scripts/"
VICMAE = "ViC-MAE scripts/"
TUBEVIT = "TubeViT, arXiv:2212.03229"
VITB = "vitb.yaml "

# Overlays follow the file that they are laid over.
PUBLISHED = [  # (files in yamls/, quantity, published value, source)
    ("vitb.yaml", "lr", 1.5e-4 * 16, VICMAE + "pretrain_in1k_k400.sh: blr 1.5e-4, batch 4096"),
    ("vitl.yaml", "lr", 1.5e-4 * 16, VICMAE + "pretrain_in1k_k400.sh: blr 1.5e-4, batch 4096"),
    ("vitl.yaml", "updates", 800 * ((IN1K + K400) // 4096), VICMAE + "pretrain_in1k_k400.sh"),
    ("vitl.yaml", "warmup", 40, VICMAE + "pretrain_in1k_k400.sh"),
    ("vitl.yaml paper.yaml", "mask_ratio", 0.75, "ViC-MAE, section 4"),
    ("finetune_in1k_vitb.yaml", "lr", 2e-3, VICMAE + "finetune_imagenet_vicmae_base.sh"),
    ("finetune_in1k_vitl.yaml", "lr", 2e-3, VICMAE + "finetune_imagenet_vicmae_large.sh"),
    ("finetune_in1k_vitb.yaml", "end", 1e-6 / 2e-3, "ViC-MAE image_finetune.py: min_lr 1e-6"),
    ("finetune_in1k_vitb.yaml", "updates", 100 * (IN1K // 1024), VICMAE + "finetune_imagenet_*"),
    ("finetune_places365_vitb.yaml", "lr", 2e-3, VICMAE + "finetune_imagenet_vicmae_base.sh"),
    ("finetune_k400_vitl.yaml", "lr", 2.4e-3 * 2, "mae_st FINETUNE.md: blr 2.4e-3 per 256 clips"),
    ("finetune_k400_vitl.yaml", "lr", 3e-4 * 512 / 32, SLOWFAST + "k400_VIT_L_16x4_FT: 32 clips"),
    ("finetune_k400_vitl.yaml", "end", 1e-5 / 3e-4, SLOWFAST + "k400_VIT_L_16x4_FT: COSINE_END_LR"),
    ("finetune_k400_vitb.yaml", "end", 1e-5 / 6e-4, SLOWFAST + "k400_VIT_B_16x4_FT: COSINE_END_LR"),
    ("finetune_k400_vitl.yaml", "passes", 50 * 2, SLOWFAST + "k400_VIT_L_16x4_FT: NUM_SAMPLE 2"),
    ("finetune_k400_vitb.yaml", "passes", 75 * 2, SLOWFAST + "k400_VIT_B_16x4_FT: NUM_SAMPLE 2"),
    ("finetune_k400_vitb.yaml", "warmup", 5, SLOWFAST + "k400_VIT_B_16x4_FT: WARMUP_EPOCHS"),
    ("finetune_k400_vitl.yaml", "distinct", 16, SLOWFAST + "k400_VIT_L_16x4_FT: NUM_FRAMES"),
    ("finetune_k400_vitl.yaml", "span", 15 * 4 / 30, SLOWFAST + "k400_VIT_L_16x4_FT: 16 x 4"),
    ("finetune_ssv2_vitb.yaml", "lr", 1e-3, OMNIMAE + "omnimae_vitbase_ft_ssv2: 32 GPUs x 8"),
    ("finetune_ssv2_vitb.yaml", "end", 1e-6 / 1e-3, OMNIMAE + "omnimae_vitbase_ft_ssv2"),
    ("finetune_ssv2_vitb.yaml", "warmup", 12.5, OMNIMAE + "omnimae_vitbase_ft_ssv2: 0.125 of 100"),
    (
        "finetune_ssv2_vitb.yaml",
        "updates",
        100 * (SSV2 // 256),
        OMNIMAE + "omnimae_vitbase_ft_ssv2",
    ),
    ("finetune_ssv2_vitb.yaml", "distinct", 16, OMNIMAE + "omnimae_vitbase_ft_ssv2: num_samples"),
    (
        "finetune_ssv2_vitb.yaml finetune_ssv2_videomae.yaml",
        *("lr", 1e-3, VIDEOMAE + "ssv2/..._epoch_800/finetune.sh: 5e-4 per 256, 64 GPUs x 8"),
    ),
    (
        "finetune_ssv2_vitb.yaml finetune_ssv2_videomae.yaml",
        *("end", 1e-6 / 5e-4, "VideoMAE run_class_finetuning.py: min_lr, scaled as lr"),
    ),
    ("linprobe_in1k_vitb.yaml", "passes", 90, "MAE FINETUNE.md: linear probing"),
    (VITB + "methods/mae_paper.yaml", "lr", 2.4e-3, "MAE PRETRAIN.md: blr 1.5e-4, batch 4096"),
    (VITB + "methods/mae_paper.yaml", "passes", 1600, "MAE README: the released model"),
    (VITB + "methods/st_mae_paper.yaml", "lr", 8e-4, SLOWFAST + "k400_VIT_B_16x4_MAE_PT, 8 shards"),
    (VITB + "methods/st_mae_paper.yaml", "end", 1e-6 / 1e-4, SLOWFAST + "k400_VIT_B_16x4_MAE_PT"),
    (VITB + "methods/st_mae_paper.yaml", "warmup", 60, SLOWFAST + "k400_VIT_B_16x4_MAE_PT"),
    (
        VITB + "methods/st_mae_paper.yaml",
        "passes",
        800,
        SLOWFAST + "k400_VIT_B_16x4_MAE_PT: 200 x 4",
    ),
    (
        VITB + "methods/videomae_paper.yaml",
        "lr",
        1.2e-3,
        VIDEOMAE + "kinetics/..._epoch_800/pretrain.sh",
    ),
    (
        VITB + "methods/videomae_paper.yaml",
        *("end", 1e-5 / 1.5e-4, "VideoMAE run_mae_pretraining.py: min_lr, scaled as lr"),
    ),
    (VITB + "methods/omnimae_paper.yaml", "mask_ratio", 0.95, "OmniMAE, section 4: of a video"),
    (VITB + "methods/omnimae_paper.yaml", "image_mask_ratio", 0.9, "OmniMAE: of an image"),
    (VITB + "methods/omnimae_paper.yaml", "lr", 1.6e-3, OMNIMAE + "omnimae_vitbase_ssv2_in1k"),
    (VITB + "methods/omnimae_paper.yaml", "warmup", 40, OMNIMAE + "omnimae_vitbase_ssv2_in1k"),
    ("methods/omnivore_paper.yaml", "lr", 2e-3, OMNIVORE),
    ("methods/omnivore_paper.yaml", "end", 2e-4 / 2e-3, OMNIVORE),
    ("methods/omnivore_paper.yaml", "warmup", 30, OMNIVORE + ": 0.1 of 300"),
    ("methods/omnivore_paper.yaml", "decay", 0.05, OMNIVORE),
    ("methods/omnivore_paper.yaml", "updates", 300 * 860, OMNIVORE + ": repeat_factors 1, 50, 1"),
    ("methods/omnivore_paper.yaml", "drop_colours", 0.5, OMNIVORE + ": RGB of images with depth"),
    ("methods/tubevit_b.yaml", "lr", 5e-5, TUBEVIT),
    ("methods/tubevit_b.yaml", "decay", 1e-3, TUBEVIT),
    ("methods/tubevit_b.yaml", "warmup", 10_000, TUBEVIT + ": steps"),
    ("methods/tubevit_b.yaml", "updates", 300_000, TUBEVIT),
    ("methods/tubevit_b.yaml methods/tubevit_l.yaml", "lr", 1e-5, TUBEVIT),
    ("methods/tubevit_b.yaml methods/tubevit_l.yaml", "decay", 1e-5, TUBEVIT),
    (VITB + "methods/moco_v2_paper.yaml", "projector_layers", 2, "moco main_moco.py: --mlp"),
    (
        VITB + "methods/simclr_paper.yaml",
        "projector_layers",
        2,
        "SimCLR, section 2: one hidden layer",
    ),
    (VITB + "methods/moco_v2_paper.yaml", "decay", 0.1, "moco-v3 CONFIG.md: AdamW with ViT-B"),
    (VITB + "methods/simclr_paper.yaml", "decay", 0.1, "moco-v3 CONFIG.md: AdamW with ViT-B"),
]
SAMPLES = {"in1k": IN1K, "k400": K400, "ssv2": SSV2, "places365": PLACES, "sunrgbd": 4845}
# Seconds of the frames that the data_prep.py command in a file's header keeps of a clip
CONVERTED = {"k400_7.5fps": np.arange(75) / 7.5, "ssv2": np.arange(48) * 4.0 / 48}


def load(files: str) -> dict:
    is_finetuning = files.startswith(
        ("finetune", "linprobe", "methods/omnivore", "methods/tubevit")
    )
    config = finetune.FinetuneConfig if is_finetuning else pretrain.PretrainConfig
    return load_config([str(ROOT / "yamls" / name) for name in files.split()], config)


def epochs_of(duration: str, config: dict) -> float:
    time = ensure_time(duration, "ep")
    if time.unit.value == "dur":
        return time.value * epochs_of(config["trainer"]["max_duration"], config)
    return time.value


def quantity(name: str, config: dict) -> float:
    """Compute a quantity of a recipe from its settings.

    lr: highest learning rate; end: final / highest; warmup: epochs, or steps if the file counts
    steps; updates: optimiser steps; passes: times that a sample is seen; distinct, span: frames of
    a training clip that differ, and seconds from the first to the last; decay: weight decay;
    others: keys of the blocks augment and model.
    """
    data, trainer = config["data"], config["trainer"]
    batch, repeats = data["global_train_batch_size"], data.get("repeats", 1)
    epochs = epochs_of(trainer["max_duration"], config)
    names = [stream["path"].split("/")[1] for stream in data["streams"]]
    if name == "lr":
        return config["optimizer"]["base_lr"] * batch / 256
    if name == "updates" and trainer["max_duration"].endswith("ba"):
        return ensure_time(trainer["max_duration"], "ba").value
    if name == "updates":
        weights = [stream.get("repeat", 1) for stream in data["streams"]]
        sizes = [SAMPLES[data_set.split("_")[0]] for data_set in names]
        samples = np.dot(weights, sizes)
        return epochs * (samples * repeats // batch)
    if name in ("distinct", "span"):
        timestamps = CONVERTED[names[0]]
        frames, interval = config["model"]["num_frames"], config["augment"].get("frame_interval")
        picked = pick_frames(timestamps, frames, interval, 0.3)
        if name == "distinct":
            return len(set(picked))
        return timestamps[picked[-1]] - timestamps[picked[0]]
    values = {
        "end": lambda: config["schedule"]["alpha_f"],
        "warmup": lambda: epochs_of(config["schedule"]["t_warmup"], config),
        "passes": lambda: epochs * repeats,
        "decay": lambda: config["optimizer"]["weight_decay"],
    }
    return values[name]() if name in values else (config["augment"] | config["model"])[name]


@pytest.mark.parametrize(("files", "name", "published", "source"), PUBLISHED)
def test_recipe_has_the_published_value(files, name, published, source):
    assert quantity(name, load(files)) == pytest.approx(published, rel=2e-3), source


@pytest.mark.parametrize(
    ("files", "timestamps", "gap"),
    [
        ("vitl.yaml paper.yaml", np.arange(75) / 7.5, 1.06),  # the paper: about 1.06 s, in 2.1 s
        ("vitl.yaml paper.yaml", (np.arange(16) + 0.5) * 10 / 16, 0.94),  # stated in paper.yaml
        ("vitl.yaml", (np.arange(16) + 0.5) * 10 / 16, 0.83),  # stated in vitl.yaml
    ],
)
def test_mean_gap_of_a_pair_is_the_stated_number_of_seconds(files, timestamps, gap):
    views = PretrainingViews(224, 196, **load(files)["augment"])
    rng = np.random.default_rng(0)
    sample = {"ends": np.zeros(len(timestamps)), "timestamps": timestamps}
    gaps = []
    for _ in range(20_000):
        (first,), (second,) = views.draw_frames(sample, rng)
        gaps.append(abs(timestamps[first] - timestamps[second]))
    assert np.mean(gaps) == pytest.approx(gap, abs=0.012)
    assert max(gaps) < 2.1
