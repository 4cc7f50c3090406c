"""EXIF orientation, from photograph to pixels: what Pillow's ``ImageOps.exif_transpose`` gives, bit for bit."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.conftest import read_photo
from vitcomposer.cli import main
from vitcomposer.data.collate import EvalCollate, TrainCollate
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.files import ImageFiles
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.jpeg.markers import read_index
from vitcomposer.data.jpeg.upright import read_mark
from vitcomposer.data.labeled_sets import open_labelled_images
from vitcomposer.evaluation.trained import load_trained
from vitcomposer.runs.identity import read_identity, write_identity
from vitcomposer.schema import Augment, Mixing

ORIENTATIONS = range(1, 9)
AUGMENT = Augment(
    crop_scale=(0.1, 1.0),
    interpolation="bicubic",
    flip_prob=0.5,
    rand_augment=None,
    three_augment=False,
    color_jitter=0.0,
    random_erasing=0.0,
    repeated_augmentation=1,
)
MIXING = Mixing(mixup_alpha=0, cutmix_alpha=0, prob=0, switch_prob=0, mode="batch", label_smoothing=0)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return read_photo("china").resize((203, 117))  # neither side a whole number of blocks


def lying(photo: Image.Image, orientation: int, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    photo.convert(mode).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def upright(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        turned = ImageOps.exif_transpose(image)
        return np.asarray(turned.convert("RGB"))


KINDS = {
    "JPEG": {},
    "JPEG 4:4:4": {"subsampling": 0},
    "JPEG 4:2:2, progressive": {"subsampling": 1, "progressive": True},
    "JPEG, grey": {"mode": "L"},
    "JPEG, CMYK": {"mode": "CMYK"},
    "PNG": {"kind": "PNG"},
    "PNG, grey": {"kind": "PNG", "mode": "L"},
    "WEBP": {"kind": "WEBP"},
    "TIFF": {"kind": "TIFF"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_stored_images_are_read_as_pillow_turns_them(photo: Image.Image, kind: str, orientation: int) -> None:
    data = lying(photo, orientation, **KINDS[kind])
    expected = upright(data)
    assert expected.shape[:2] == ((203, 117) if orientation > 4 else (117, 203))
    rng = np.random.default_rng(orientation)
    for seekable in (True, False):
        stored = store_image(data, StoreOptions(seekable=seekable, exif="apply"))
        turned = orientation > 1 and kind != "TIFF"  # which Pillow itself turns
        assert stored.outcome.endswith(", turned by EXIF") == turned
        assert (stored.height, stored.width) == expected.shape[:2]
        image = stored.columns[0]
        assert (read_index(image) is not None) == (seekable and kind.startswith("JPEG") and "CMYK" not in kind)
        assert jpeg.read_size(image) == expected.shape[:2]
        np.testing.assert_array_equal(jpeg.decode_rgb(image), expected)
        with Image.open(io.BytesIO(image)) as again:  # any viewer shows the same
            np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(again).convert("RGB")), expected)
        for _ in range(4):
            height, width = (int(rng.integers(1, side + 1)) for side in expected.shape[:2])
            top, left = (int(rng.integers(0, s - n + 1)) for s, n in zip(expected.shape, (height, width), strict=False))
            region = expected[top : top + height, left : left + width]
            np.testing.assert_array_equal(jpeg.decode_region(image, (top, left, height, width)), region)
            crop = jpeg.decode_crop(image, (top, left, height, width), 32)
            small = Image.fromarray(region).resize((32, 32), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), np.asarray(small))
        with pytest.raises(ValueError, match=f"inside the {expected.shape[0]}x{expected.shape[1]} image"):
            jpeg.decode_region(image, (0, 1, *expected.shape[:2]))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_reduced_decode_turns_too(photo: Image.Image, orientation: int) -> None:
    """The approximation of ``scale="dct"``: as near to the exact crop as that of an upright image."""
    image = store_image(lying(photo, orientation, quality=95), StoreOptions(exif="apply")).columns[0]
    height, width = jpeg.read_size(image)
    box = (5, 9, height - 20, width - 13)
    outs = [torch.empty((3, 24, 40), dtype=torch.uint8) for _ in range(2)]
    for out, scale in zip(outs, ("exact", "dct"), strict=True):
        jpeg.decode_crop_into(image, box, out, "bicubic", scale)
    assert not torch.equal(*outs) and (outs[0].float() - outs[1].float()).abs().mean() < 5  # 3.7 of the upright one


@pytest.mark.parametrize("options", [{"raw_fraction": 1.0}, {"short_side": 50}, {"raw_below": 40}, {"reencode": 90}])
def test_every_way_of_storing_turns_once(photo: Image.Image, options: dict) -> None:
    for kind in ("JPEG", "WEBP"):
        data = lying(photo, 6, kind)
        with Image.open(io.BytesIO(data)) as image:
            flat = io.BytesIO()
            ImageOps.exif_transpose(image).convert("RGB").save(flat, "PNG")
        chosen = StoreOptions(seekable=True, **options)
        found = store_image(data, StoreOptions(seekable=True, exif="apply", **options))
        for column, like in zip(found.columns, store_image(flat.getvalue(), chosen).columns, strict=True):
            if not (kind == "JPEG" and "reencode" in options):  # which keeps what can be seekable
                np.testing.assert_array_equal(jpeg.decode_rgb(column), jpeg.decode_rgb(like))


def test_what_is_kept_is_read_as_it_is_stored(photo: Image.Image) -> None:
    data = lying(photo, 6)
    for seekable in (True, False):
        marked = store_image(data, StoreOptions(seekable=seekable, exif="apply")).columns[0]
        kept = store_image(marked, StoreOptions(seekable=seekable))  # its mark is that of another conversion
        assert read_mark(marked) == 6 and read_mark(kept.columns[0]) == 1 and "turned" not in kept.outcome
        assert jpeg.read_size(kept.columns[0]) == (117, 203)
        again = store_image(marked, StoreOptions(seekable=True, exif="apply")).columns[0]
        np.testing.assert_array_equal(jpeg.decode_rgb(again), upright(data))


def test_damaged_exif_turns_nothing(photo: Image.Image) -> None:
    data = lying(photo, 6)
    at = data.index(b"Exif\0\0")
    for begin, end in ((6, 14), (14, 26), (6, 8)):
        damaged = data[: at + begin] + b"\xff" * (end - begin) + data[at + end :]
        stored = store_image(damaged, StoreOptions(seekable=True, exif="apply"))
        assert stored.outcome == "seekable" and jpeg.read_size(stored.columns[0]) == (117, 203)


@pytest.fixture(scope="module")
def folder(photo: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes, a class for an orientation, in train and val, as JPEG and as PNG."""
    root = tmp_path_factory.mktemp("lying")
    for split in ("train", "val"):
        for orientation in ORIENTATIONS:
            place = root / split / str(orientation)
            place.mkdir(parents=True)
            (place / "a.jpg").write_bytes(lying(photo, orientation))
            (place / "b.png").write_bytes(lying(photo, orientation, "PNG"))
    return root


def shown(path: Path, exif: str) -> bytes:
    """The pixels that a file stands for, as PNG."""
    with Image.open(path) as image:
        whole = ImageOps.exif_transpose(image) if exif == "apply" else image
        buffer = io.BytesIO()
        whole.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("exif", ["apply", "keep"])
def test_training_evaluation_and_files_agree(folder: Path, tmp_path: Path, exif: str) -> None:
    """The views that training draws of the shards, and the crops of evaluation, are those of Pillow's pixels."""
    out = tmp_path / "mds"
    more = [] if exif == "apply" else ["--exif", "keep"]
    assert main(["convert", "folder", str(folder), str(out), "--workers", "1", *more]) == 0
    stored = json.loads((out / "summary.json").read_text())["splits"]["train"]["stored"]
    assert sum(count for name, count in stored.items() if name.endswith("turned by EXIF")) == 14 * (exif == "apply")
    assert json.loads((out / "train/index.json").read_text()).get("exif") == (None if exif == "keep" else "apply")
    for split in ("train", "val"):
        images = open_labelled_images(str(out / split), split="", batch_size=16)
        samples = [images.samples[at] for at in range(16)]
        plain = [{**sample, "image": shown(_file(folder, split, sample), exif)} for sample in samples]
        _assert_same_views(samples, plain)
    paths = sorted(map(str, folder.glob("val/*/*")))
    files = ImageFiles(paths, upright=exif == "apply")
    loose = [{"step": 0, "epoch": 0, "copy": 0, **files[at], "label": 0} for at in range(16)]
    _assert_same_views(loose, [{**s, "image": shown(Path(p), exif)} for s, p in zip(loose, paths, strict=True)])


def _file(folder: Path, split: str, sample: dict) -> Path:
    """The file of a sample: PNG is stored as PNG, JPEG as JPEG."""
    return (
        folder / split / str(sample["label"] + 1) / ("a.jpg" if bytes(sample["image"][:2]) == b"\xff\xd8" else "b.png")
    )


def _assert_same_views(samples: list, plain: list) -> None:
    centre = EvalCollate(image_size=48, crop_ratio=0.875, interpolation="bicubic", num_classes=1 << 62)
    train = TrainCollate(AUGMENT, MIXING, image_size=48, num_classes=8, seed=1)
    for collate in (centre, train):
        assert torch.equal(collate(samples)["image"], collate(plain)["image"])
    assert len(samples) == 16


def test_conversion_that_was_begun_goes_on_as_it_was_begun(folder: Path, tmp_path: Path, capsys) -> None:
    command = ["convert", "folder", str(folder), str(tmp_path / "mds"), "--workers", "1"]
    assert main([*command, "--exif", "keep"]) == 0
    before = (tmp_path / "mds/train/index.json").read_bytes()
    assert main(command) == 0 and (tmp_path / "mds/train/index.json").read_bytes() == before
    capsys.readouterr()
    assert main([*command, "--exif", "apply"]) == 2
    assert "--exif was not given and is apply" in capsys.readouterr().err


def test_run_and_exported_model_say_how_their_images_lay(trained_run: Path, tmp_path: Path) -> None:
    """The run folder outlives its data; photographs are turned, too, where nothing says how those of training lay."""
    assert load_trained(trained_run).upright
    run = shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    identity = read_identity(run)
    assert identity is not None and identity["images"]["train"]["exif"] == "apply"
    for said, upright in (("keep", False), (None, False), ("apply", True)):  # None: of an earlier version
        identity["images"]["train"]["exif"] = said
        write_identity(run, identity)
        assert load_trained(run).upright == upright
        assert main(["export", str(run), "--out", str(tmp_path / str(said))]) == 0
        assert load_trained(tmp_path / str(said)).upright == upright
        card = (tmp_path / str(said) / "README.md").read_text()
        assert ("exif_transpose" in card, "EXIF orientation is ignored" in card) == (upright, not upright)
    (run / "identity.json").unlink()
    assert load_trained(run, ["data.local=/nowhere"]).upright
