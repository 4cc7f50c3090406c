"""The rule for views that are cut from a smaller image, and the batches that come of it."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.conversion.conversion import jpeg
from vitcomposer.data.boxes import enlarged_share
from vitcomposer.data.collate import TrainCollate
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.conversion.sources import FolderSource
from vitcomposer.data.conversion.write import convert
from vitcomposer.data.jpeg.decode import decode_rgb, read_size
from vitcomposer.data.mds.small_column import largest_view, needed_side, small_side
from vitcomposer.data.mds.stream import ImageStream, StreamOptions
from vitcomposer.schema import Augment
from vitcomposer.schema.probe import NO_MIXING

AUGMENT = Augment(
    crop_scale=(0.08, 1.0),
    interpolation="bicubic",
    flip_prob=0.5,
    rand_augment=None,
    three_augment=False,
    color_jitter=0.0,
    random_erasing=0.0,
    repeated_augmentation=1,
)


def test_a_view_gets_the_pixels_that_224_get_of_imagenet():
    assert needed_side(96) == 160 and largest_view(160) == 96
    assert all(largest_view(needed_side(view)) == view for view in range(1, 400))
    assert all(largest_view(needed_side(view) - 1) < view for view in range(1, 400))


RATIO = (3 / 4, 4 / 3)


def test_as_few_crops_are_enlarged_as_at_224_of_imagenet():
    small, full = (enlarged_share(*of, (0.08, 1.0), RATIO) for of in ((96, 160), (224, 375)))
    assert small == pytest.approx(full, abs=0.01) and 0.2 < small < 0.35
    assert enlarged_share(96, 1000, (0.35, 1.0), RATIO) == 0.0 and enlarged_share(96, 40, (0.08, 1.0), RATIO) == 1.0


@pytest.mark.parametrize("value", [None, True, 0, -1, "160", 1 << 20, [160]])
def test_an_index_of_somebody_else_names_no_side(value):
    assert small_side({"shards": [], "image_small": value}) is None
    assert small_side({"shards": [], "image_small": 160}) == 160 and small_side([]) is None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for number in range(8):
        (folder / f"images/{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"images/{number % 2}/{number}.jpg").write_bytes(jpeg(number, 150, 100))
    source = FolderSource(folder / "images", val_fraction=0)
    convert(source, folder / "mds", workers=1, stored=StoreOptions(raw_below=60))
    return folder / "mds"


def open_stream(root: Path, max_bad_fraction: float = 0.0) -> ImageStream:
    chosen = StreamOptions(max_bad_fraction=max_bad_fraction)
    return ImageStream(local=str(root), split="train", batch_size=4, shuffle=True, seed=0, options=chosen)


def collate(size: int, stream: ImageStream | None = None) -> TrainCollate:
    made = TrainCollate(AUGMENT, NO_MIXING, image_size=size, num_classes=2, seed=0, source=stream)
    made.largest_small = largest_view(60)
    return made


def test_views_up_to_the_rule_are_cut_from_the_small_image(root):
    stream = open_stream(root)
    assert stream.small_side == 60
    samples = [stream[at] for at in range(8)]
    assert {min(read_size(sample["image_small"])) for sample in samples} == {60}
    small = [{**sample, "image": sample["image_small"]} for sample in samples]
    for size, expected in ((36, small), (37, samples)):
        plain = collate(size)
        plain.largest_small = 0
        assert np.array_equal(collate(size)(samples)["image"], plain(expected)["image"])
    assert not np.array_equal(collate(36)(samples)["image"], collate(37)(samples)["image"][..., :36, :36])


def test_the_column_follows_the_step(root):
    stream = open_stream(root)
    samples = [stream[at] for at in range(4)]
    staged = collate(48)
    staged.view = lambda step: (36 if step < 3 else 48, 1.0)
    for step, size in ((2, 36), (3, 48), (0, 36)):
        found = staged([{**sample, "step": step} for sample in samples])["image"]
        assert np.array_equal(found, collate(size)(samples)["image"])


def test_what_replaces_a_broken_small_image_is_small_too(root):
    stream = open_stream(root, max_bad_fraction=0.5)
    samples = [stream[at] for at in range(4)]
    broken = [{**samples[0], "image_small": b"\0RAW"}, *samples[1:]]
    found = collate(36, stream)(broken)
    following = {**stream[1], "step": 0}
    assert found["sample_id"].tolist() == [1, 1, 2, 3]
    assert np.array_equal(found["image"][0], collate(36)([following])["image"][0])


def test_the_small_column_as_jpeg():
    buffer, photo = BytesIO(), Image.fromarray(decode_rgb(jpeg(3, 150, 100)))
    photo.resize((90, 60), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    small = store_image(jpeg(3, 150, 100), StoreOptions(raw_below=60, small_quality=90)).columns[1]
    assert small == buffer.getvalue()
    seekable = store_image(jpeg(3, 150, 100), StoreOptions(True, raw_below=60, small_quality=90)).columns[1]
    assert seekable != small and np.array_equal(decode_rgb(seekable), decode_rgb(small))
    with pytest.raises(ValueError, match="--small-quality must be left out without a column image_small, got 90"):
        StoreOptions(small_quality=90)
