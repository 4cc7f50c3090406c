"""The tables of ``benchmarks.accuracy.photos``: which recipe, which images, and what each row changes.

The 20 classes of Tiny ImageNet, each with 500 images of 64 pixels for training and 50 held out:
n01768244, n02058221, n02113799, n02321529, n02509815, n02802426, n02814533, n03085013, n03089624, n03179701,
n03424325, n03970156, n04133789, n04285008, n04507155, n04560804, n07614500, n07695742, n07749582, n12267677.
"""

from dataclasses import dataclass, field
from typing import Any

VIT, CONVIT = "yamls/cifar10_vit.yaml", "yamls/cifar10_convit.yaml"


@dataclass(frozen=True)
class Row:
    """One run, and what it changes of the table's."""

    yaml: str
    keys: dict[str, Any] = field(default_factory=dict)
    after: str | None = None  # the row whose last weights it starts from


@dataclass(frozen=True)
class Table:
    """Rows that share data and keys.

    Attributes:
        train_images: A part of the training split, balanced over the classes; None takes it whole.
        baseline: The row that the others' FLOPs and seconds are divided by.
    """

    title: str
    data: str
    text: str
    rows: dict[str, Row]
    baseline: str
    train_images: int | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    drawn: bool = True


# A network that many short runs can afford.
_SMALL = {"model.embed_dim": 96, "model.depth": 4, "model.num_heads": 3, "model.image_size": 24}
_SHORT = {
    "run.eval_interval": "1dur",
    "run.save_interval": "1dur",
    "data.num_workers": 0,
    "global_train_batch_size": 128,
    "schedule.progress": "compute",
    "optimizer.lr_scaling": "none",
}
_PLAIN = {"algorithms.Curriculum": "null", "algorithms.EMA.half_life": "0.07dur"}
_MIXED = {"mixing.mixup_alpha": 0.2, "mixing.cutmix_alpha": 1.0, "mixing.prob": 0.5, "mixing.switch_prob": 0.5}
_ADAMW = {"optimizer.name": "adamw", "optimizer.lr": 2e-3}


def _speedups(sizes: str) -> dict[str, Row]:
    sizes = f"{{image_sizes: {sizes}, compute: [0.3, 0.3, 0.4], rand_augment_from: 1.0}}"
    curriculum, muon = {"algorithms.Curriculum": sizes}, {"optimizer.name": "muon", "optimizer.lr": 2e-2}
    dropped = {"algorithms.PatchDropout": "{keep_rates: [0.5, 0.75, 1.0], until: [0.4, 0.8, 1.0]}"}
    end = {"mixing.prob": 0.0, "mixing.mixup_alpha": 0.0, "mixing.cutmix_alpha": 0.0, "max_duration": "2ep"}
    end |= {"optimizer.lr": 4e-4, "schedule.t_warmup": "0ep", "schedule.alpha_i": 1.0}
    return {
        "AdamW": Row(VIT),
        "curriculum": Row(VIT, curriculum),
        "patch dropout": Row(VIT, dropped),
        "stochastic depth 0.3, subset": Row(VIT, {"model.drop_path_rate": 0.3, "model.drop_path_mode": "constant"}),
        "LAMB": Row(VIT, {"optimizer.name": "lamb", "optimizer.lr": 8e-3}),
        "schedule-free AdamW": Row(
            VIT,
            {
                "optimizer.name": "adamw_schedulefree",
                "optimizer.lr": 4e-3,
                "schedule.alpha_f": 1.0,
                "algorithms.EMA": "null",
            },
        ),
        "Muon": Row(VIT, muon),
        "NAdaMuon": Row(VIT, {"optimizer.name": "nadamuon", "optimizer.lr": 2e-2}),
        "eight epochs of ten": Row(VIT, {"max_duration": "8ep"}),
        "two last epochs without mixing": Row(VIT, end, after="eight epochs of ten"),
        "Muon, curriculum": Row(VIT, curriculum | muon),
    }


def _scarce(images: int | None, share: str, epochs: int) -> Table:
    same = {"model.embed_dim": 72, "model.depth": 4, "model.num_heads": 9, "model.image_size": 24}
    same |= {"model.stem": "linear", "max_duration": f"{epochs}ep"}
    return Table(
        title=f"ConViT and DeiT on {share} of CIFAR-10",
        data="cifar10",
        text=f"The same width, depth and heads, patches of 4 of 24 pixels by one projection, {epochs} epochs; ConViT's "
        "nine heads start as a convolution of 3 x 3 patches in all blocks but the last (Table 3 of arXiv:2103.10697: "
        "the gain is largest where data is scarce).",
        rows={
            "DeiT": Row(VIT),
            "ConViT": Row(CONVIT, {"model.local_up_to_layer": 3}),
            "ConViT without the local start": Row(
                CONVIT, {"model.local_up_to_layer": 3, "model.use_local_init": False}
            ),
        },
        baseline="DeiT",
        train_images=images,
        shared={**_SHORT, **_PLAIN, **_ADAMW, **same},
        drawn=False,
    )


def _unlabelled() -> Table:
    same = {
        "model.embed_dim": 96,
        "model.depth": 4,
        "model.num_heads": 3,
        "model.image_size": 32,
        "model.patch_size": 4,
    }
    same |= {"model.position_embedding": "sincos", "model.class_token": False, "model.pool": "avg"}
    same |= {"data.num_workers": 0, "run.save_interval": "1dur"}
    colours = {f"{block}.{key}": value for block in ("crops",) for key, value in _COLOURS.items()}
    crops = {
        **colours,
        "crops.size_crops": "[32, 16]",
        "crops.crop_scales": "[[0.3, 1.0], [0.1, 0.3]]",
        "crops.flip_prob": 0.5,
        "crops.color_jitter": "[0.4, 0.4, 0.2, 0.1]",
        "crops.gray_prob": 0.2,
        "global_train_batch_size": 128,
        "head.dims": "[96, 256, 64]",
        "head.num_clusters": "[100]",
        "optimizer.lr": 1e-3,
        "optimizer.lr_batch_size": 128,
        "max_duration": "20ep",
        "monitor.interval": "20ep",
        "monitor.k": "[20]",
    }
    learn = {**_SHORT, **_PLAIN, **_MIXED, **_ADAMW, "model.num_classes": 20, "model.stem": "linear"}
    return Table(
        title="Without labels, 20 classes of Tiny ImageNet",
        data="tiny_imagenet_20",
        text="SwAV, 2 crops of 32 and 4 of 16 pixels, for 20 epochs; then its frozen features and the whole network "
        "are trained with labels, and the same network from scratch, for as many epochs and for the FLOPs of both.",
        rows={
            "SwAV": Row("yamls/swav_demo.yaml", crops),
            "linear classifier on SwAV's features": Row(
                "yamls/probe_linear.yaml",
                {
                    "model.num_classes": 20,
                    "heads.features": "[mean]",
                    "max_duration": "10ep",
                    "run.eval_interval": "1dur",
                    "global_train_batch_size": 256,
                    "augment.crop_scale": "[0.4, 1.0]",
                    **{f"augment.{key}": value for key, value in _COLOURS.items()},
                },
                after="SwAV",
            ),
            "fine-tuned from SwAV": Row(VIT, {**learn, "max_duration": "10ep"}, after="SwAV"),
            "from scratch, as many epochs": Row(VIT, {**learn, "max_duration": "10ep"}),
            "from scratch, as many FLOPs": Row(VIT, {**learn, "max_duration": "40ep"}),
        },
        baseline="fine-tuned from SwAV",
        shared=same,
        drawn=False,
    )


_COLOURS = {"mean": "[0.48, 0.45, 0.4]", "std": "[0.27, 0.26, 0.27]"}
_TEXT = (
    "A ViT of width 96, 4 blocks, 3 heads, patches of 4 of {pixels} pixels by two convolutions; {images:,} training "
    "images, {epochs} epochs, mixing in half of the batches, averaged weights."
)
TABLES = {
    "records": Table(
        title="CIFAR-10, a recipe for a laptop",
        data="cifar10",
        text="The two yamls as they are, all 50,000 training images, evaluated on the 10,000 test images.",
        rows={"cifar10_vit": Row(VIT), "cifar10_convit": Row(CONVIT)},
        baseline="cifar10_convit",
        drawn=False,
    ),
    "speedups_cifar10": Table(
        title="What a speed-up is worth, CIFAR-10",
        data="cifar10",
        text=_TEXT.format(pixels=24, images=10_000, epochs=10),
        rows=_speedups("[16, 20, 24]"),
        baseline="AdamW",
        train_images=10_000,
        shared={**_SHORT, **_SMALL, **_PLAIN, **_MIXED, **_ADAMW, "max_duration": "10ep"},
    ),
    "speedups_tiny": Table(
        title="What a speed-up is worth, 20 classes of Tiny ImageNet",
        data="tiny_imagenet_20",
        text=_TEXT.format(pixels=48, images=10_000, epochs=10).replace("patches of 4", "patches of 8"),
        rows=_speedups("[32, 40, 48]"),
        baseline="AdamW",
        shared={
            **_SHORT,
            **_SMALL,
            **_PLAIN,
            **_MIXED,
            **_ADAMW,
            "max_duration": "10ep",
            "model.num_classes": 20,
            "model.image_size": 48,
            "model.patch_size": 8,
        },
    ),
    "unlabelled": _unlabelled(),
    "scarce_10": _scarce(5_000, "a tenth", 20),
    "scarce_30": _scarce(15_000, "three tenths", 8),
    "scarce_100": _scarce(None, "all", 4),
}
