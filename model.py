"""ViC-MAE (arXiv:2303.12001): contrastive masked autoencoding of images and video (paper section 3), and its classifier (4).

    model = ViCMAE(embed_dim=1024, depth=24, num_heads=16)                  # ViT-L, the official code's numbers
    batch = {"views": views, "noise": noise}                                # (B, 2, 3, 224, 224), (B, 2, 196)
    losses = model.loss(model(batch), batch)                                # total, reconstruction, contrastive, ...

Two views of one sample, two frames of a video or two crops of an image, pass one encoder, each with its own random mask.
Both are reconstructed, and the means of their visible tokens attract each other while all other samples repel them.

Shapes, here and in every other file:
    B samples   V views of a sample   T frames of a clip   N patches of a view   K patches kept visible   D width
    P numbers of a patch (patch_size * patch_size * 3)     C classes             H, W pixels
    A numbers that augment a view (PARAMETERS of views.py)
A tensor named mask has 1 where a patch is removed.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from composer import ComposerModel
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

from checkpoints import our_layout, read_checkpoint, resized
from contrast import Head, Momentum, Projected, all_gather, info_nce, simsiam, triplet, vicreg, widen
from vit import Decoder, Encoder, MaskKind, PoolKind, flops_of, patchify, pool, random_masking

Fraction = Annotated[float, Field(ge=0, lt=1)]


def reconstruction_loss(
    pred: Tensor, views: Tensor, mask: Tensor, patch_size: int, norm_pix_loss: bool, tubelet_size: int = 1
) -> Tensor:
    """Mean squared error over the removed patches, at least in fp32.

    Args:
        pred: (B, N, P).
        views: (B, 3, H, W), or (B, T, 3, H, W): the input itself.
        mask: (B, N), 1 = removed.
        norm_pix_loss: normalise each target patch by its own mean and unbiased variance.
    """
    target = patchify(widen(views), patch_size, tubelet_size)
    if norm_pix_loss:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    error = (widen(pred) - target).square().mean(dim=-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


class ViCMAE(ComposerModel):
    """The encoder, the decoder and the projector, with the loss that trains them (paper section 3; `code` preset).

    Other methods of the comparison are other arguments; README, "The family", says which.

    Args:
        img_size, patch_size: pixels.
        num_frames, tubelet_size: frames of a view and of one of its patches; 1 frame: views are images.
        embed_dim, depth, num_heads: of the encoder. S 384/12/6, B 768/12/12, L 1024/24/16, H 1280/32/16 (patch 14).
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder. 512/8/16; S 256/8/8.
        projector_hidden_dim, projector_out_dim: of the contrastive head.
        predictor_hidden_dim: of a second head, which predicts the other view's projection; that is then a target without
            gradient. None for one head, shared by both views.
        mask, mask_ratio: see random_masking. With "none" there is no decoder.
        pool: what of the visible tokens is projected, see pool.
        contrast: the contrastive term; "moco" is InfoNCE with a momentum encoder and a queue. With "none" no head is there.
        positives: of "triplet": the other view of a sample, or views of its label's samples too.
        temperature: of InfoNCE, > 0.
        margin: of "triplet", in squared distance of unit vectors.
        momentum, queue_size: see Momentum, which algorithms.MomentumStep lets follow.
        weight_contrast, weight_recon: of the two terms in the total.
        norm_pix_loss: whether the target of a patch is normalised by its own mean and variance.
        chunk_size: pairs that pass encoder and decoder at a time, and again in the backward pass, so that memory holds the
            activations of one chunk, while InfoNCE still sees the whole batch. None for all at once.

    Attributes:
        decode_ratio: fraction of the removed patches, in (0, 1], that is decoded in training.
        ramp: factor of weight_contrast, in [0, 1]. PartialDecoding and ContrastRamp of algorithms.py set the two.

    Raises:
        ValueError: sizes that do not divide, a mask_ratio that keeps no patch or removes none, or nothing to learn.
    """

    def __init__(
        self,
        img_size: PositiveInt = 224,
        patch_size: PositiveInt = 16,
        embed_dim: PositiveInt = 768,
        depth: PositiveInt = 12,
        num_heads: PositiveInt = 12,
        decoder_embed_dim: PositiveInt = 512,
        decoder_depth: PositiveInt = 8,
        decoder_num_heads: PositiveInt = 16,
        projector_hidden_dim: PositiveInt = 4096,
        projector_out_dim: PositiveInt = 128,
        mask_ratio: Fraction = 0.5,
        temperature: PositiveFloat = 0.1,
        weight_contrast: NonNegativeFloat = 0.03,
        weight_recon: NonNegativeFloat = 0.97,
        norm_pix_loss: bool = True,
        chunk_size: PositiveInt | None = None,
        num_frames: PositiveInt = 1,
        tubelet_size: PositiveInt = 2,
        mask: MaskKind = "random",
        pool: PoolKind = "mean",
        contrast: Literal["info_nce", "triplet", "moco", "simsiam", "vicreg", "none"] = "info_nce",
        predictor_hidden_dim: PositiveInt | None = None,
        positives: Literal["view", "label"] = "view",
        margin: PositiveFloat = 0.2,
        momentum: Fraction = 0.999,
        queue_size: PositiveInt = 65536,
    ):
        super().__init__()
        self.tubelet_size = tubelet_size if num_frames > 1 else 1
        self.encoder = Encoder(img_size, patch_size, embed_dim, depth, num_heads, num_frames, self.tubelet_size)
        self.mask, self.mask_ratio, self.decode_ratio, self.ramp = mask, mask_ratio, 1.0, 1.0
        N = self.encoder.num_patches
        if mask != "none" and not 0 < self.kept(N)[0] < N:
            raise ValueError(f"mask_ratio {mask_ratio} must keep and remove at least one of {N} patches")
        if not (weight_recon and mask != "none") and not (weight_contrast and contrast != "none"):
            raise ValueError("mask and contrast are none, or their weights 0: there is nothing to learn")
        if positives == "label" and contrast != "triplet":
            raise ValueError(f"positives label is for contrast triplet, not {contrast}")
        if contrast == "simsiam" and not predictor_hidden_dim:
            raise ValueError("contrast simsiam needs predictor_hidden_dim: without a predictor all features become the same")
        if predictor_hidden_dim and contrast not in ("info_nce", "moco", "simsiam"):
            raise ValueError(f"predictor_hidden_dim is not for contrast {contrast}, which has no targets; set it to null")
        self.decoder = self.projector = self.predictor = self.momentum = None
        if mask != "none":
            self.decoder = Decoder(self.encoder, decoder_embed_dim, decoder_depth, decoder_num_heads)
        if contrast != "none":
            self.projector = Head(embed_dim, projector_hidden_dim, projector_hidden_dim, projector_out_dim)
        if predictor_hidden_dim:
            self.predictor = Head(projector_out_dim, predictor_hidden_dim, projector_out_dim)
        if contrast == "moco":
            self.momentum = Momentum(self.encoder, self.projector, momentum, queue_size)
        self.contrast = contrast
        self.pool = pool
        self.positives = positives
        self.temperature = temperature
        self.margin = margin
        self.weight_contrast = weight_contrast
        self.weight_recon = weight_recon
        self.norm_pix_loss = norm_pix_loss
        self.chunk_size = chunk_size

    def kept(self, N: int) -> tuple[int, int]:
        """How many of N patches the encoder sees, and how many the decoder decodes in training."""
        K = random_masking(torch.zeros(1, N, device="cpu"), self.mask_ratio, self.mask, self.encoder.steps)[0].shape[1]
        return K, K + math.ceil((N - K) * self.decode_ratio)

    def reconstruct(self, views: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Views (B, [T,] 3, H, W) with noise (B, N) -> features (B, D); and, where patches are removed, see forward, pred
        (B, N, P), mask (B, N), scored (B, N).
        """
        ids_keep, ids_restore, mask = random_masking(noise, self.mask_ratio, self.mask, self.encoder.steps)
        if self.decoder is None:
            return (pool(self.encoder(views), self.pool),)
        decoded = self.kept(noise.shape[1])[1] if self.training else noise.shape[1]
        tokens = self.encoder(views, ids_keep)  # (B, 1 + K, D)
        features, pred = pool(tokens, self.pool), self.decoder(tokens, ids_restore, decoded)
        return features, pred, mask, mask * (ids_restore < decoded)

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Features (B, V, D) of this rank -> (B of all ranks, V, out).

        Deviation: the official projector sees one GPU's samples. Gathered first, its BatchNorm spans the global batch, one
        view at a time as there, and the result does not depend on the number of ranks.
        """
        return torch.stack([projector(view) for view in all_gather(features).unbind(1)], dim=1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Reconstruct all views and project what is pooled of their visible tokens.

        Args:
            batch: `views` (B, V, 3, H, W), or (B, V, T, 3, H, W), normalised; `noise` (B, V, N), uniform, of which only the
                first is used where the views are smaller than img_size; `target` (B,), if positives are by label.

        Returns:
            features (B, V, D), pooled; where patches are removed, pred (B, V, N, P), mask (B, V, N) and scored (B, V, N), 1
            where a patch is removed and decoded; with a contrastive term, projected (of all ranks).
        """
        shape = batch["views"].shape[:2]  # (B, V)
        views, noise = batch["views"].flatten(0, 1), batch["noise"].flatten(0, 1)  # (B * V, ...)
        noise = noise[:, : self.encoder.steps * (views.shape[-1] // self.encoder.patch_size) ** 2]
        if self.chunk_size and self.training:
            size = self.chunk_size * shape[1]
            chunks = zip(views.split(size), noise.split(size), strict=True)
            parts = [checkpoint(self.reconstruct, *chunk, use_reentrant=False) for chunk in chunks]
            parts = [torch.cat(part) for part in zip(*parts, strict=True)]
        else:
            parts = self.reconstruct(views, noise)
        names = ("features", "pred", "mask", "scored")
        outputs = {name: part.unflatten(0, shape) for name, part in zip(names, parts, strict=False)}
        if self.projector is not None:
            outputs["projected"] = self.contrasted(outputs["features"], views, noise, batch)
        return outputs

    def contrasted(self, features: Tensor, views: Tensor, noise: Tensor, batch: dict[str, Tensor]) -> Projected:
        """What the contrastive term is given: the projections, and with a predictor or MoCo what they are to be like."""
        predictions = targets = self.project(self.projector, features)
        if self.predictor is not None:
            predictions = torch.stack([self.predictor(view) for view in targets.unbind(1)], dim=1)
            targets = targets.detach()
        labels = all_gather(batch["target"]) if self.positives == "label" else None
        if self.momentum is None:
            return Projected(predictions, targets, labels)
        with torch.no_grad():
            ids_keep = random_masking(noise, self.mask_ratio, self.mask, self.encoder.steps)[0]
            keys = pool(self.momentum.encoder(views, ids_keep), self.pool).unflatten(0, features.shape[:2])
            keys, queue = self.project(self.momentum.projector, keys), self.momentum.queue.clone()
            if self.training:
                self.momentum.push(keys)
        return Projected(predictions, keys, labels, queue)

    def loss(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """total = weight_recon * reconstruction + weight_contrast * contrastive, and these; all scalars.

        Beside them, what tells whether the contrastive task is learnt, or solved by collapse: `accuracy`, see the terms, and
        `feature_std`, of the normalised features over this rank's samples, times sqrt(D): 1 if spread out, 0 if collapsed.
        """
        losses = {}
        z = F.normalize(widen(outputs["features"].detach()), dim=-1)  # (B, V, D)
        total = 0.0
        if self.decoder is not None:
            pred, views, scored = (x.flatten(0, 1) for x in (outputs["pred"], batch["views"], outputs["scored"]))
            sizes = (self.encoder.patch_size, self.norm_pix_loss, self.tubelet_size)
            reconstruction = reconstruction_loss(pred, views, scored, *sizes)
            total = self.weight_recon * reconstruction
            losses["reconstruction"] = reconstruction.detach()
        if self.projector is not None:
            contrastive, losses["accuracy"] = self.term(outputs["projected"])
            total = total + self.ramp * self.weight_contrast * contrastive
            losses["contrastive"] = contrastive.detach()
        losses["feature_std"] = z.var(dim=0, unbiased=False).sum(dim=-1).mean().sqrt()
        return {"total": total} | losses

    def term(self, projected: Projected) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and the fraction of views that find their partner; at least in fp32."""
        with torch.autocast(projected.predictions.device.type, enabled=False):
            if self.contrast in ("info_nce", "moco"):
                return info_nce(projected, self.temperature)
            if self.contrast == "triplet":
                return triplet(projected, self.margin)
            return simsiam(projected) if self.contrast == "simsiam" else vicreg(projected)

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this rank's batch, for MFU: 2 for a multiply-add of matrices.

        The backward pass takes twice the forward's, but for the patches, which need no gradient. What is computed anew in it
        does not count, nor do the few products of a contrastive term but InfoNCE's.
        """
        B, V = batch["views"].shape[:2]
        side, p = batch["views"].shape[-2], self.encoder.patch_size  # square, in either layout
        N, P, D = self.encoder.steps * (side // p) ** 2, 3 * p**2 * self.tubelet_size, self.encoder.norm.normalized_shape[0]
        K, decoded = self.kept(N)
        embed, encode, decode = 2 * N * P * D, flops_of(self.encoder.blocks, 1 + K, D), 0
        if self.decoder is not None:
            d = self.decoder.norm.normalized_shape[0]
            decode = flops_of(self.decoder.blocks, 1 + decoded, d) + 2 * (1 + K) * D * d + 2 * decoded * d * P
        total = B * V * (2 * embed + 3 * (encode + decode))
        if self.projector is None:
            return total
        gathered = V * B * (dist.get_world_size() if dist.is_initialized() else 1)
        one, two = (
            sum(2 * gathered * layer.weight.numel() for layer in head or () if isinstance(layer, nn.Linear))
            for head in (self.projector, self.predictor)
        )
        out = self.projector[-1].out_features
        if self.momentum is not None:
            return total + B * V * (embed + encode) + 4 * one + 2 * 2 * gathered * self.momentum.queue.numel()
        return total + 3 * (one + two) + 3 * 2 * gathered**2 * out


class GlobalBatchNorm(nn.BatchNorm1d):
    """A BatchNorm over the samples of all ranks; for features that need no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        gathered = super().forward(all_gather(x))  # (B of all ranks, D)
        return gathered.view(-1, *x.shape)[dist.get_rank() if len(gathered) > len(x) else 0]


class ProbeHeads(nn.ModuleList):
    """Linear heads on the same features, each to be trained at a learning rate of its own; in evaluation, the best of them.

    The best has most of the held-out training samples right, a step counting 0.98 of the next.
    """

    def __init__(self, dim: int, num_classes: int, count: int):
        super().__init__(nn.Linear(dim, num_classes) for _ in range(count))
        self.register_buffer("right", torch.zeros(count))

    def best(self) -> int:
        return int(self.right.argmax())

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, heads, C) in training, (B, C) in evaluation."""
        return torch.stack([head(x) for head in self], dim=1) if self.training else self[self.best()](x)

    @torch.no_grad()
    def count(self, logits: Tensor, held_out: Tensor) -> None:
        """Count what is right of logits (B, heads, C), where held_out (B,) is a label; -1 is a sample trained on."""
        right = (logits.argmax(dim=-1) == held_out[:, None]).sum(dim=0).float()  # (heads,)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(right)
        self.right.mul_(0.98).add_(right)


class DataSetHeads(nn.ModuleList):
    """A linear head for each of several data sets, whose classes stand one data set after another."""

    def __init__(self, dim: int, classes: list[int]):
        super().__init__(nn.Linear(dim, count) for count in classes)
        owner = [number for number, count in enumerate(classes) for _ in range(count)]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)  # (C,), the data set of a class

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, C) log-probabilities, of each data set among its own classes."""
        return torch.cat([head(x).log_softmax(dim=-1) for head in self], dim=-1)


class Classifier(ComposerModel):
    """The encoder on whole images or clips, pooled, with a linear head (transfer, paper section 4).

    Args:
        num_classes: C; or those of several data sets, for a head each.
        img_size, patch_size, embed_dim, depth, num_heads: of the encoder, as pre-trained.
        num_frames: 1 for images; T for clips, then tubelets of `tubelet_size` frames and learned temporal positions that
            begin at zero (source: mae_st's way of adapting a 2-D encoder).
        pool: "cls", or "mean" over the patches; both after the final norm.
        drop_path: stochastic depth rate of the last block, in [0, 1).
        dropout: before the head, in [0, 1).
        head_init_std: of the head's weights.
        freeze: linear probe: the encoder is fixed, and an affine-free BatchNorm stands before the head (source: MAE).
        heads: how many linear heads are trained at once, see ProbeHeads.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        num_classes: int | list[int],
        heads: int = 1,
        *,
        img_size: PositiveInt = 224,
        patch_size: PositiveInt = 16,
        embed_dim: PositiveInt = 768,
        depth: PositiveInt = 12,
        num_heads: PositiveInt = 12,
        num_frames: PositiveInt = 1,
        tubelet_size: PositiveInt = 2,
        pool: Literal["mean", "cls"] = "mean",
        drop_path: Fraction = 0.0,
        dropout: Fraction = 0.0,
        head_init_std: NonNegativeFloat = 2e-5,
        freeze: bool = False,
    ):
        super().__init__()
        tubelet = tubelet_size if num_frames > 1 else 1
        self.encoder = Encoder(
            img_size, patch_size, embed_dim, depth, num_heads, num_frames, tubelet, drop_path, learn_positions=True
        )
        self.neck = GlobalBatchNorm(embed_dim, affine=False, eps=1e-6) if freeze else nn.Dropout(dropout)
        if isinstance(num_classes, list):
            self.head = DataSetHeads(embed_dim, num_classes)
        else:
            self.head = nn.Linear(embed_dim, num_classes) if heads == 1 else ProbeHeads(embed_dim, num_classes, heads)
        for layer in self.head if isinstance(self.head, nn.ModuleList) else [self.head]:
            nn.init.trunc_normal_(layer.weight, std=head_init_std)
            nn.init.zeros_(layer.bias)
        self.pool = pool
        self.freeze = freeze
        if freeze:
            self.encoder.requires_grad_(False)
        self.num_classes = sum(num_classes) if isinstance(num_classes, list) else num_classes

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """For timm's layer decay: embedding and positions are layer 0, block b is b + 1, norm and head come last."""
        return {
            "stem": r"encoder\.(?:cls_token|pos_embed|temporal_embed|patch_embed)",
            "blocks": r"encoder\.blocks\.(\d+)",
        }

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`inputs` (B, V, T, 3, H, W), normalised; T = 1 for images -> logits of every view (B, V, C).

        With several heads, (B, V, heads, C) in training.
        """
        x = batch["inputs"]
        shape = x.shape[:2]
        x = x.flatten(0, 1)  # (B * V, T, 3, H, W)
        tokens = self.encoder(x if x.shape[1] > 1 else x.squeeze(1))
        return self.head(self.neck(pool(tokens, self.pool))).unflatten(0, shape)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of every view with `target`, (B,) labels or (B, C) mixed ones, in fp32; several heads' sum."""
        V = outputs.shape[1]
        logits = outputs.flatten(0, 1).float()  # (B * V, C) or (B * V, heads, C)
        target = batch["target"].repeat_interleave(V, dim=0)
        if isinstance(self.head, DataSetHeads):  # whose probabilities sum up to the number of heads
            return F.cross_entropy(logits, target) - math.log(len(self.head))
        if logits.ndim == 2:
            return F.cross_entropy(logits, target)
        self.head.count(logits, batch["held_out"].repeat_interleave(V))
        return sum(F.cross_entropy(one, target) for one in logits.unbind(1))

    def eval_forward(self, batch: dict[str, Tensor], outputs: Tensor | None = None) -> Tensor:
        """Class probabilities (B, C), the softmax averaged over the views; 0 for classes of a data set not its own."""
        probabilities = (self(batch) if outputs is None else outputs).float().softmax(dim=-1).mean(dim=1)
        if isinstance(self.head, DataSetHeads):
            owner = self.head.owner
            return probabilities * len(self.head) * (owner == owner[batch["target"]][:, None])
        return probabilities

    def get_metrics(self, is_train: bool = False) -> dict[str, MulticlassAccuracy]:
        """top1 and top5 (topC where there are fewer classes) for evaluation, none in training."""
        sizes = {} if is_train else {"top1": 1, "top5": min(5, self.num_classes)}
        how = {"average": "micro", "ignore_index": -1}  # of what cannot be decoded
        return {name: MulticlassAccuracy(self.num_classes, top_k=k, **how) for name, k in sizes.items()}

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: MulticlassAccuracy) -> None:
        metric.update(outputs, batch["target"])

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this rank's batch, counted as those of ViCMAE."""
        B, V, _, _, H, _ = batch["inputs"].shape
        proj, D = self.encoder.patch_embed["proj"], self.encoder.norm.normalized_shape[0]
        N = self.encoder.steps * (H // self.encoder.patch_size) ** 2
        embed = 2 * N * proj.weight.numel()
        blocks = flops_of(self.encoder.blocks, 1 + N, D)
        heads = sum(2 * parameter.numel() for parameter in self.head.parameters() if parameter.ndim == 2)
        return B * V * (embed + blocks + 2 * heads if self.freeze else 2 * embed + 3 * (blocks + heads))


def load_pretrained(module: nn.Module, source: str | dict[str, Tensor], head: int | None = None) -> dict[str, list[str]]:
    """Fill a ViCMAE or a Classifier from a checkpoint file or from a state dict in our or the official names.

    The encoder must be there whole, but for CLS and positions where the source, as VideoMAE, has none; a decoder, projector
    or head is filled if it is. Weights for another kind of input are brought to this one's, see resized. `head`: see
    read_checkpoint.

    Returns:
        Names by what became of them: `loaded`, `resized` (loaded after inflation or interpolation), `missing` (stay as they
        were), `unused` (in the source alone).

    Raises:
        ValueError: no checkpoint, an encoder that is not whole, or of another size.
    """
    name = source if isinstance(source, str) else "the state dict"
    found = read_checkpoint(source, head) if isinstance(source, str) else our_layout(source)
    own = module.state_dict()
    report = {"loaded": [], "resized": [], "missing": [key for key in own if key not in found], "unused": []}
    filled = {}
    for key, value in found.items():
        if key not in own:
            report["unused"].append(key)
            continue
        shape = own[key].shape
        filled[key] = fit = resized(key, value, shape)
        if fit.shape != shape:
            raise ValueError(
                f"{name}: {key} is {tuple(fit.shape)} but the model's is {tuple(shape)}; set the model's sizes as trained"
            )
        report["loaded"].append(key)
        if fit is not value:
            report["resized"].append(key)
    for key in report["unused"]:
        if key.startswith(("encoder.blocks.", "encoder.norm", "encoder.patch_embed")):
            raise ValueError(f"{name} has {key}, which the model has not; it is of another depth or kind of ViT")
    absent = [key for key in report["missing"] if key.startswith("encoder.") and "temporal_embed" not in key]
    if "encoder.cls_token" in absent and "encoder.pos_embed" in absent:
        absent = [key for key in absent if not key.endswith(("cls_token", "pos_embed"))]
    if absent:
        raise ValueError(
            f"{name} lacks {len(absent)} weights of the encoder, {absent[0]} first; set the model's depth as trained"
        )
    module.load_state_dict(filled, strict=False)
    return report
