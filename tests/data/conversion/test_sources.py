"""Where images come from: folders, lists, torchvision and the digits; each wrong one explained."""

import json
import pickle
import struct
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.conversion.conversion import items, read_shards, write_images
from vitcomposer.data.conversion.sources import DigitsSource, FolderSource, ListSource, UnlabelledSource
from vitcomposer.data.conversion.write import convert

pytestmark = pytest.mark.timeout(120)


def test_different_classes_in_val_are_named(folder: Path) -> None:
    (folder / "val/emu").rename(folder / "val/fox")
    with pytest.raises(ValueError, match=r"fox \(only in .*/val\), emu \(only in .*/train\)"):
        FolderSource(folder)


def test_val_folder_is_found_by_its_usual_names_or_by_option(folder: Path) -> None:
    (folder / "val").rename(folder / "validation")
    assert len(FolderSource(folder).splits["val"]) == 7
    (folder / "validation").rename(folder / "dev")
    assert len(FolderSource(folder, val_name="dev").splits["val"]) == 7
    with pytest.raises(ValueError, match="folder for training .* and the folder val "):
        FolderSource(folder, val_name="val")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "There is no such folder"),
        (lambda root: root.mkdir(), "holds no folder"),
        (lambda root: (root / "a").mkdir(parents=True), r"class folders without an image \(1\): a\."),
        (lambda root: write_images(root / "train", {"a": 1}), "got train alone"),
        (lambda root: write_images(root, {"a": 1, "b": 1}), "No class has two images"),
    ],
)
def test_folder_that_holds_no_splits_is_explained(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path / "images")


def test_val_fraction_holds_out_a_share_of_every_class(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"many": 50, "two": 2, "one": 1})
    splits = FolderSource(tmp_path / "images", val_fraction=0.2).splits
    names = {split: {item.name for item in members} for split, members in splits.items()}
    assert not names["train"] & names["val"] and len(names["train"] | names["val"]) == 53
    # labels follow the sorted names: many, one, two
    assert Counter(item.label for item in splits["val"]) == {0: 10, 2: 1}
    again = FolderSource(tmp_path / "images", val_fraction=0.2).splits["val"]
    other = FolderSource(tmp_path / "images", val_fraction=0.2, seed=1).splits["val"]
    assert {item.name for item in again} == names["val"] != {item.name for item in other}


def test_images_without_classes_are_all_of_a_folder_and_below(folder: Path, tmp_path: Path) -> None:
    source = UnlabelledSource(folder)
    assert len(source.splits["train"]) == 35 and source.splits.keys() == {"train"}
    assert {item.label for item in source.splits["train"]} == {0} and source.class_names == ["unlabelled"]
    assert any(".txt" in line for line in source.warnings)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="must hold images, or folders of them. It holds none"):
        UnlabelledSource(tmp_path / "none")
    with pytest.raises(ValueError, match="There is no such folder"):
        UnlabelledSource(tmp_path / "nowhere")


def test_list_takes_csv_tsv_and_spaces_with_or_without_header(folder: Path, tmp_path: Path) -> None:
    rows = [("train/cat/000.JPEG", "cat"), ("train/dog/000.JPEG", "dog"), ("val/cat/001.JPEG", "cat")]
    for mark in ",", "\t", " ":
        for header in "", f"path{mark}label\n":
            file = tmp_path / "list.txt"
            file.write_text(header + "\n".join(mark.join(row) for row in rows) + "\n\n")
            source = ListSource(file, split="train", root=folder)
            assert source.class_names == ["cat", "dog"]
            assert [(item.name, item.label) for item in source.splits["train"]] == [
                ("train/cat/000.JPEG", 0),
                ("train/dog/000.JPEG", 1),
                ("val/cat/001.JPEG", 0),
            ]
            assert source.read(source.splits["train"][1]) == (folder / rows[1][0]).read_bytes()


def test_list_of_numbers_takes_its_names_from_them_or_from_a_file(folder: Path) -> None:
    file = folder / "list.csv"
    file.write_text("train/cat/000.JPEG,2\n'train/dog/000.JPEG',0\n".replace("'", '"'))
    assert ListSource(file, split="train").class_names == ["0", "1", "2"]
    assert ListSource(file, split="train", class_names=["a", "b", "c", "d"]).class_names == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"list.csv:1: the label must be one of the 2 classes, got '2'"):
        ListSource(file, split="train", class_names=["a", "b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/cat/000.JPEG,cat\ntrain/cat/001.JPEG\n", "list.csv:2: a line must be a path and a label"),
        ("train/cat/000.JPEG,cat\ntrain/cat/none.JPEG,cat\n", "list.csv:2: .*none.JPEG cannot be read.*--root"),
        ("train/cat/000.JPEG,cat\n\ntrain/cat/001.JPEG,3\n", "list.csv:3: labels must be all numbers or all names"),
        ("train/cat/000.JPEG,0\ntrain/cat/001.JPEG,-1\n", "list.csv:2: the label must be one of"),
        ("path,label\n", "It holds none"),
    ],
)
def test_list_errors_name_file_and_line(folder: Path, text: str, message: str) -> None:
    (folder / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        ListSource(folder / "list.csv", split="train")


def test_list_with_an_unknown_name_suggests_the_right_one(folder: Path) -> None:
    (folder / "list.csv").write_text("train/cat/000.JPEG,catt\n")
    with pytest.raises(ValueError, match="Did you mean 'cat'"):
        ListSource(folder / "list.csv", split="train", class_names=["cat", "dog"])


def test_list_without_a_split_holds_out_a_share_of_every_class(folder: Path) -> None:
    names = [f"train/{label}/00{at}.JPEG,{label}" for label in ("cat", "dog") for at in range(4)]
    (folder / "list.csv").write_text("\n".join(names))
    splits = ListSource(folder / "list.csv", split=None, val_fraction=0.25).splits
    assert {split: Counter(item.label for item in found) for split, found in splits.items()} == {
        "train": {0: 3, 1: 3},
        "val": {0: 1, 1: 1},
    }
    assert list(ListSource(folder / "list.csv", split=None, val_fraction=0).splits) == ["train"]
    with pytest.raises(ValueError, match=r"--val-fraction must be in \[0, 1\), got 1"):
        ListSource(folder / "list.csv", split=None, val_fraction=1)


def test_second_list_must_have_the_classes_of_the_first(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder / "train.csv").write_text("train/cat/000.JPEG,cat\ntrain/dog/000.JPEG,dog\n")
    (folder / "val.csv").write_text("val/emu/000.JPEG,emu\n")
    convert(ListSource(folder / "train.csv", split="train"), out, workers=1)
    with pytest.raises(ValueError, match="must have the same classes.*only in val: emu"):
        convert(ListSource(folder / "val.csv", split="val"), out, workers=1)
    convert(ListSource(folder / "val.csv", split="val", class_names=["emu"]), tmp_path / "other", workers=1)
    (folder / "val.csv").write_text("val/dog/000.JPEG,dog\n")
    convert(ListSource(folder / "val.csv", split="val", class_names=["cat", "dog"]), out, workers=1)
    assert read_shards(out, "val") == [((folder / "val/dog/000.JPEG").read_bytes(), 1)]
    assert set(json.loads((out / "summary.json").read_text())["splits"]) == {"train", "val"}


def test_digits_are_lossless_and_stratified(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    summary = convert(DigitsSource(), tmp_path / "out", workers=1)
    digits: Any = load_digits()
    assert summary["train"]["images"] + summary["val"]["images"] == 1797
    assert 350 <= summary["val"]["images"] <= 370
    for label, count in enumerate(summary["val"]["class_counts"].values()):
        assert abs(count - 0.2 * (digits.target == label).sum()) <= 1
    for (name, _, label), (png, stored) in zip(
        items(tmp_path / "out", "val"), read_shards(tmp_path / "out", "val"), strict=True
    ):
        index = int(Path(name).stem)
        pixels = np.asarray(Image.open(BytesIO(png)))
        assert stored == label == digits.target[index]
        np.testing.assert_array_equal(pixels, np.round(digits.images[index] * 255 / 16))


def write_fashion_mnist(root: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = {}
    for prefix, count in counts.items():
        images[prefix] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images[prefix].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
    return images


def test_torchvision_arrays_become_png_without_loss(tmp_path: Path) -> None:
    from vitcomposer.data.conversion.torchvision_source import TorchvisionSource

    images = write_fashion_mnist(tmp_path, {"train": 30, "t10k": 12})
    source = TorchvisionSource("FashionMNIST", root=tmp_path)
    summary = convert(source, tmp_path / "out", workers=1, shard_size="6kb")
    assert summary["train"]["images"] == 30 and summary["val"]["images"] == 12
    assert source.class_names[9] == "Ankle boot"
    for split, prefix in (("train", "train"), ("val", "t10k")):
        for (name, _, label), (png, stored) in zip(
            items(tmp_path / "out", split), read_shards(tmp_path / "out", split), strict=True
        ):
            index = int(name.split("/")[1])
            assert stored == label == index % 10
            np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(png))), images[prefix][index])


def test_torchvision_files_are_kept_bit_for_bit(tmp_path: Path) -> None:
    from vitcomposer.data.conversion.torchvision_source import TorchvisionSource

    root = tmp_path / "food-101"
    write_images(root / "images", {"apple": 4, "bread": 4})
    (root / "meta").mkdir()
    for split, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        listed = {name: [f"{name}/{number:03}" for number in numbers] for name in ("apple", "bread")}
        (root / "meta" / f"{split}.json").write_text(json.dumps(listed))
    for path in (root / "images").rglob("*.JPEG"):
        path.rename(path.with_suffix(".jpg"))
    source = TorchvisionSource("Food101", root=tmp_path)
    convert(source, tmp_path / "out", workers=1)
    assert source.class_names == ["apple", "bread"]
    item = source.splits["train"][0]
    assert pickle.loads(pickle.dumps(source)).read(item) == source.read(item)  # as in a worker
    assert sorted(read_shards(tmp_path / "out", "val")) == sorted(
        ((root / f"images/{name}/003.jpg").read_bytes(), label) for label, name in enumerate(source.class_names)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "Did you mean 'CIFAR10'"),
        ("FashionMNIST", "Dataset not found.*--download"),
        ("EuroSAT", "no training and test split"),
        ("VOCDetection", "no train split|cannot be opened|no training and test split"),
    ],
)
def test_torchvision_data_that_cannot_be_used_is_explained(tmp_path: Path, name: str, message: str) -> None:
    from vitcomposer.data.conversion.torchvision_source import TorchvisionSource

    with pytest.raises(ValueError, match=message):
        TorchvisionSource(name, root=tmp_path)
