"""The candidates of the input benchmark: what each one reads, how it is called and what it leaves out.

Each module of this package runs in a process of its own, under the interpreter of its peer, and offers

- ``batches(store, **options)``: an endless iterator of uint8 or float32 batches from what lies in the folder ``store``;
  a multi-crop batch is a list with one array for each crop;
- ``write(photos, store, **options)``, where it reads something else than JPEG files: makes ``store``;
- ``PACKAGES``: the distributions whose versions belong into the results.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

BATCH = 64
# An epoch of ImageNet is 1.28 million images: what a loader does at its ends must not fall on every few turns, so that
# all read their photos this many times in an epoch.
EPOCH_REPEATS = 32
MULTICROP_BATCH = 32
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"

Group = Literal["crop", "augment", "worker", "small-96", "small-128", "small-224", "multicrop-160", "multicrop-224"]


@dataclass(frozen=True, kw_only=True)
class Store:
    """What a candidate reads: made by ``write`` of the module, in the environment of the peer."""

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of the results. ``peer`` names a file in ``peers``; None runs under the benchmark's own interpreter."""

    label: str
    module: str
    group: Group = "crop"
    options: dict[str, Any] = field(default_factory=dict)
    store: str = "photos"
    peer: str | None = None
    remarks: str = ""
    ours: bool = False


def photo_files(folder: Path) -> list[Path]:
    """The JPEG files of a photo set, in a fixed order."""
    return sorted(folder.glob("*/*.jpg"))


def lengthen_epoch(index: Path) -> None:
    """List the shards of an MDS index EPOCH_REPEATS times."""
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "shards": content["shards"] * EPOCH_REPEATS}))


STORES = {
    "ours-plain": Store(module="ours", options={"kind": "plain"}),
    "ours-seekable": Store(module="ours", options={"kind": "seekable"}),
    "ours-raw": Store(module="ours", options={"kind": "raw"}),
    "ours-small-160": Store(module="ours", options={"kind": "seekable", "small": 160}),
    "ours-small-160-jpeg": Store(module="ours", options={"kind": "seekable", "small": 160, "quality": 90}),
    "ours-small-214": Store(module="ours", options={"kind": "seekable", "small": 214}),
    "ours-small-214-jpeg": Store(module="ours", options={"kind": "seekable", "small": 214, "quality": 90}),
    "mds-jpeg": Store(module="streaming_pil"),
    "tar": Store(module="webdataset_pil", peer="webdataset"),
    "tfrecord": Store(module="tensorflow_data", peer="tensorflow"),
    "beton-jpg": Store(module="ffcv_loader", options={"mode": "jpg"}, peer="ffcv"),
    "beton-raw": Store(module="ffcv_loader", options={"mode": "raw"}, peer="ffcv"),
}

BASELINES: dict[Group, str] = {
    "crop": "torchvision",
    "augment": "torchvision",
    "worker": "torchvision",
    "small-96": "torchvision-96",
    "small-128": "torchvision-128",
    "small-224": "torchvision-224",
    "multicrop-160": "swav-160",
    "multicrop-224": "swav-224",
}

_CROP = {
    "torchvision": Candidate(label="torchvision, Pillow", module="torchvision_pil", remarks="float32"),
    "torchvision-u8": Candidate(
        label="torchvision, Pillow, uint8 out", module="torchvision_pil", options={"dtype": "uint8"}
    ),
    "torchvision-v2": Candidate(label="torchvision.io + v2 on tensors", module="torchvision_tensor"),
    "timm": Candidate(label="timm transforms + fast_collate", module="timm_loader"),
    "webdataset": Candidate(
        label="webdataset, Pillow", module="webdataset_pil", store="tar", peer="webdataset", remarks="float32"
    ),
    "streaming": Candidate(
        label="StreamingDataset, Pillow", module="streaming_pil", store="mds-jpeg", remarks="jpeg column; float32"
    ),
    "simplejpeg": Candidate(label="simplejpeg + torch resize", module="simplejpeg_torch"),
    "dali": Candidate(
        label="DALI CPU, fused decode, cubic",
        module="dali_cpu",
        peer="dali",
        options={"filter": "cubic"},
        remarks="one thread",
    ),
    "dali-triangular": Candidate(
        label="DALI CPU, fused decode, triangular",
        module="dali_cpu",
        peer="dali",
        options={"filter": "triangular"},
        remarks="triangular filter instead of bicubic",
    ),
    "ffcv": Candidate(
        label="FFCV, JPEG",
        module="ffcv_loader",
        peer="ffcv",
        store="beton-jpg",
        remarks="area filter, fast DCT",
    ),
    "ffcv-raw": Candidate(
        label="FFCV, raw pixels",
        module="ffcv_loader",
        peer="ffcv",
        store="beton-raw",
        remarks="area filter; no JPEG",
    ),
    "tf-bilinear": Candidate(
        label="tf.data, bilinear without antialias",
        module="tensorflow_data",
        peer="tensorflow",
        store="tfrecord",
        options={"filter": "bilinear", "antialias": False},
        remarks="aliased, fast DCT (as big_vision)",
    ),
    "tf-bicubic": Candidate(
        label="tf.data, bicubic antialias",
        module="tensorflow_data",
        peer="tensorflow",
        store="tfrecord",
        options={"filter": "bicubic", "antialias": True},
        remarks="fast DCT",
    ),
    "ours-seekable": Candidate(
        label="vitcomposer, seekable JPEG", module="ours", store="ours-seekable", ours=True, remarks="exact decode"
    ),
    "ours-plain": Candidate(
        label="vitcomposer, plain JPEG", module="ours", store="ours-plain", ours=True, remarks="exact decode"
    ),
    "ours-raw": Candidate(
        label="vitcomposer, raw pixels", module="ours", store="ours-raw", ours=True, remarks="no JPEG"
    ),
    "ours-repeated": Candidate(
        label="vitcomposer, 3 crops a decode",
        module="ours",
        store="ours-seekable",
        options={"repeated_augmentation": 3, "shared_decodes": True},
        ours=True,
        remarks="exact decode; repeated augmentation",
    ),
}

_AUGMENT = {
    "torchvision-ra": Candidate(
        label="torchvision, Pillow + RandAugment",
        module="torchvision_pil",
        group="augment",
        options={"dtype": "uint8", "policy": "rand_augment"},
    ),
    "torchvision-3a": Candidate(
        label="torchvision, Pillow + 3-Augment",
        module="torchvision_pil",
        group="augment",
        options={"dtype": "uint8", "policy": "three_augment"},
        remarks="with jitter 0.3",
    ),
    "timm-ra": Candidate(
        label="timm + RandAugment", module="timm_loader", group="augment", options={"policy": "rand_augment"}
    ),
    "timm-3a": Candidate(
        label="timm + 3-Augment",
        module="timm_loader",
        group="augment",
        options={"policy": "three_augment"},
        remarks="with jitter 0.3",
    ),
    "ours-none": Candidate(
        label="vitcomposer without either",
        module="ours",
        group="augment",
        store="ours-seekable",
        ours=True,
        remarks="crop and flip",
    ),
    "ours-ra-device": Candidate(
        label="vitcomposer + RandAugment left to the device",
        module="ours",
        group="augment",
        store="ours-seekable",
        options={"rand_augment": RAND_AUGMENT, "on_device": True},
        ours=True,
        remarks="the flip too; same pixels",
    ),
    "ours-3a-device": Candidate(
        label="vitcomposer + 3-Augment left to the device",
        module="ours",
        group="augment",
        store="ours-seekable",
        options={"three_augment": True, "color_jitter": 0.3, "on_device": True},
        ours=True,
        remarks="the flip too; same pixels",
    ),
    "ours-ra": Candidate(
        label="vitcomposer + RandAugment on the CPU",
        module="ours",
        group="augment",
        store="ours-seekable",
        options={"rand_augment": RAND_AUGMENT},
        ours=True,
        remarks="timm's policy",
    ),
    "ours-3a": Candidate(
        label="vitcomposer + 3-Augment on the CPU",
        module="ours",
        group="augment",
        store="ours-seekable",
        options={"three_augment": True, "color_jitter": 0.3},
        ours=True,
        remarks="with jitter 0.3",
    ),
}

_WORKER = {
    "torchvision-worker": Candidate(
        label="torchvision, Pillow, one loader worker",
        module="torchvision_pil",
        group="worker",
        options={"dtype": "uint8", "workers": 1},
    ),
    "timm-worker": Candidate(
        label="timm, one loader worker", module="timm_loader", group="worker", options={"workers": 1}
    ),
    "ours-worker": Candidate(
        label="vitcomposer, seekable, one loader worker",
        module="ours",
        group="worker",
        store="ours-seekable",
        options={"workers": 1},
        ours=True,
        remarks="exact decode",
    ),
}


def _whole(group: Group, size: int) -> dict[str, Candidate]:
    """Views of one size, cut from the whole image."""
    return {
        f"torchvision-{size}": Candidate(
            label="torchvision, Pillow, uint8 out",
            module="torchvision_pil",
            group=group,
            options={"dtype": "uint8", "size": size},
        ),
        f"ours-whole-{size}": Candidate(
            label="vitcomposer, whole image, seekable JPEG",
            module="ours",
            group=group,
            store="ours-seekable",
            options={"size": size},
            ours=True,
            remarks="exact decode",
        ),
    }


def _small(group: Group, size: int, side: int) -> dict[str, Candidate]:
    """Views of a curriculum's first stages; ``side`` is the shorter side that ``convert --for`` stores for them."""
    ours = {"module": "ours", "group": group, "ours": True, "options": {"size": size}}
    remarks = "the whole image beside it"
    return {
        **_whole(group, size),
        f"ours-small-{size}": Candidate(
            label=f"vitcomposer, image_small of {side}, raw pixels",
            store=f"ours-small-{side}",
            remarks=remarks,
            **ours,
        ),
        f"ours-small-jpeg-{size}": Candidate(
            label=f"vitcomposer, image_small of {side}, JPEG of quality 90",
            store=f"ours-small-{side}-jpeg",
            remarks=remarks,
            **ours,
        ),
    }


def _multicrop(group: Group, side: int, large: int, small: int) -> dict[str, Candidate]:
    # Ranges of a crop's share of the area: SwAV's own, section 4 of arXiv:2006.09882.
    crops = {"num_crops": (large, small), "size_crops": (side, 96), "crop_scales": ((0.14, 1.0), (0.05, 0.14))}
    plain, coloured = {**crops, "distort": False}, {**crops, "distort": True}
    return {
        f"swav-{side}": Candidate(
            label="SwAV / VISSL, Pillow", module="multicrop_pil", group=group, options=coloured, remarks="float32"
        ),
        f"swav-plain-{side}": Candidate(
            label="SwAV / VISSL, Pillow, no colour or blur",
            module="multicrop_pil",
            group=group,
            options=plain,
            remarks="float32",
        ),
        f"v2-{side}": Candidate(
            label="torchvision.io + v2 on tensors", module="multicrop_tensor", group=group, options=coloured
        ),
        f"dali-{side}": Candidate(
            label="DALI CPU", module="multicrop_dali", group=group, peer="dali", options=coloured, remarks="one thread"
        ),
        f"ours-{side}": Candidate(
            label="vitcomposer, colour and blur on the CPU",
            module="ours_multicrop",
            group=group,
            store="ours-seekable",
            options={**crops, "on_device": False},
            ours=True,
            remarks="exact decode",
        ),
        f"ours-device-{side}": Candidate(
            label="vitcomposer, colour and blur left to the device",
            module="ours_multicrop",
            group=group,
            store="ours-seekable",
            options={**crops, "on_device": True},
            ours=True,
            remarks="the flip too",
        ),
    }


CANDIDATES: dict[str, Candidate] = {
    **_CROP,
    **_AUGMENT,
    **_WORKER,
    **_small("small-96", 96, 160),
    **_small("small-128", 128, 214),
    **_whole("small-224", 224),  # ties the rows above to those of whole images, which other machines measured too
    **_multicrop("multicrop-160", 160, 2, 4),
    **_multicrop("multicrop-224", 224, 2, 6),
}
