"""Builds the loader of images without labels that Composer's Trainer takes, from the blocks of a yaml."""

from composer.core import DataSpec
from composer.utils import dist

from vitcomposer.data.augment.policies import ColorDistortion
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.loader import (
    augments_on_device,
    check_fills_a_batch,
    holds_seekable,
    make_dataspec,
    open_dataset,
    source_of,
)
from vitcomposer.data.multicrop import MultiCrop, MultiCropTransform
from vitcomposer.data.synthetic import NUM_IMAGES
from vitcomposer.errors import ConfigError, ShardError, require
from vitcomposer.schema import Crops, SelfSupervised


def build_multicrop_dataspec(cfg: SelfSupervised, *, device_batch_size: int) -> DataSpec:
    """Loader and device-side transforms of the training split; a short last batch is dropped.

    Args:
        device_batch_size: Images per batch and rank.

    Raises:
        ConfigError: Data that cannot be found or do not fill a batch; a batch that would be cut into microbatches.
        ShardError: Later, in the loader: a shard that cannot be had or whose hash is wrong.
    """
    _check_microbatch(cfg, device_batch_size)
    try:
        dataset = open_dataset(cfg.data, "train", num_classes=NUM_IMAGES, batch_size=device_batch_size, seed=cfg.seed)
    except ShardError as error:  # found before anything is read
        raise ConfigError(str(error)) from error
    jpeg.warm_up(seekable=holds_seekable(dataset))
    check_fills_a_batch(dataset, device_batch_size * dist.get_world_size())
    crops = cfg.crops
    collate = MultiCrop(
        num_crops=crops.num_crops,
        size_crops=crops.size_crops,
        crop_scales=[(low, high) for low, high in crops.crop_scales],
        seed=cfg.seed,
        distortions=build_distortions(crops),
        flip_prob=crops.flip_prob,
        interpolation=crops.interpolation,
        augment_on_device=augments_on_device(cfg.data, rand_augment=False),
        source=source_of(dataset),
    )
    collate.warm_up()
    transform = MultiCropTransform(crops.mean, crops.std)
    return make_dataspec(
        dataset,
        cfg.data,
        collate,
        transform,
        batch_size=device_batch_size,
        sample_bytes=3 * crops.pixels,
        drop_last=True,
    )


def build_distortions(crops: Crops) -> list[ColorDistortion]:
    """The colours of each group of crops."""
    return [
        ColorDistortion(
            crops.color_jitter,
            jitter_prob=crops.jitter_prob,
            gray_prob=crops.gray_prob,
            blur_prob=blur,
            solarize_prob=solarize,
        )
        for blur, solarize in zip(crops.blur_prob, crops.solarize_prob, strict=True)
    ]


def _check_microbatch(cfg: SelfSupervised, device_batch_size: int) -> None:
    size = cfg.run.device_train_microbatch_size
    require(
        size is None or (not isinstance(size, str) and size >= device_batch_size),
        "run.device_train_microbatch_size",
        f"null or {device_batch_size}, the device's share of the batch, since the loss compares all of its images",
        size,
        "Leave it out; use more devices or a smaller global_train_batch_size where memory is short.",
    )
