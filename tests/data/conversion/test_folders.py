"""What is odd about folders of images: no wrong label, no hang, and all of it said at once."""

import os
import socket
from pathlib import Path

import pytest

from tests.data.conversion.conversion import jpeg, write_images
from vitcomposer.data.conversion import folder_splits
from vitcomposer.data.conversion.folders import Report, find_images, read_file
from vitcomposer.data.conversion.sources import FolderSource, ListSource
from vitcomposer.data.conversion.write import convert
from vitcomposer.data.labeled_sets import open_labelled_images

pytestmark = pytest.mark.timeout(120)


def counts(source: FolderSource) -> dict[str, dict[str, int]]:
    """Images of each class of each split."""
    return {
        split: {name: sum(i.label == at for i in items) for at, name in enumerate(source.class_names)}
        for split, items in source.splits.items()
    }


def warnings(source: FolderSource) -> str:
    return "\n".join(source.warnings)


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "Test"), ("training", "validation"), ("train", "dev"), ("TRAIN", "VAL"), ("train", "eval")],
)
def test_usual_names_of_splits_are_splits_in_any_case_for_convert_and_eval(
    tmp_path: Path, train: str, val: str
) -> None:
    write_images(tmp_path / "x" / train, {"cat": 3, "dog": 2})
    write_images(tmp_path / "x" / val, {"cat": 1, "dog": 2}, seed=500)
    source = FolderSource(tmp_path / "x")
    assert counts(source) == {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 2}}
    assert f"The splits: train is {train}, val is {val}." in warnings(source)
    images = open_labelled_images(str(tmp_path / "x"), split="val", batch_size=1)
    assert images.class_names == ["cat", "dog"] and images.num_samples == 3


def test_test_beside_validation_is_a_third_split_where_it_has_the_classes(tmp_path: Path) -> None:
    for seed, (split, number) in enumerate({"train": 3, "validation": 2, "test": 1}.items()):
        write_images(tmp_path / split, {"cat": number, "dog": number}, seed=5000 * seed)
    assert counts(FolderSource(tmp_path)) == {
        s: {"cat": n, "dog": n} for s, n in (("train", 3), ("val", 2), ("test", 1))
    }
    assert "test" in convert(FolderSource(tmp_path), f"{tmp_path}-mds", workers=1)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "unknown")
    source = FolderSource(tmp_path)
    assert list(source.splits) == ["train", "val"]
    assert "test is left out: its folders are not the classes of the split train" in warnings(source)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "training"], "which look like splits"),
        (["val", "test"], "which look like splits"),
        (["train2017", "val2017"], "which look like splits"),
        (["trainA", "trainB"], "which look like splits"),
        (["first", "second"], "which look like splits, as all hold the folders cat, dog"),
        (["train", "val", "valid"], "one folder for the split val, got val, valid. Choose one by --val-name"),
        (["train"], "got train alone"),
    ],
)
def test_folders_that_look_like_splits_never_become_classes(tmp_path: Path, names: list[str], message: str) -> None:
    for seed, name in enumerate(names):
        write_images(tmp_path / name, {"cat": 1, "dog": 1}, seed=5000 * seed)
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_labelled_images(str(tmp_path), split="elsewhere", batch_size=1)


def test_classes_may_be_called_like_splits_or_hold_one_folder_of_the_same_name(tmp_path: Path) -> None:
    write_images(tmp_path / "cifar", {"bus": 2, "train": 2})
    assert FolderSource(tmp_path / "cifar").class_names == ["bus", "train"]
    for at, name in enumerate(("n01", "n02")):  # Tiny ImageNet
        write_images(tmp_path / "tiny" / name, {"images": 2}, seed=5000 * at)
    assert FolderSource(tmp_path / "tiny").class_names == ["n01", "n02"]


@pytest.mark.parametrize("wrapper", ["photos", "a/b"])
def test_folder_that_wraps_everything_is_gone_through(tmp_path: Path, wrapper: str) -> None:
    write_images(tmp_path / "x" / wrapper, {"cat": 3, "dog": 2})
    (tmp_path / "x" / "__MACOSX" / "photos").mkdir(parents=True)
    source = FolderSource(tmp_path / "x", val_fraction=0)
    assert counts(source) == {"train": {"cat": 3, "dog": 2}}
    assert source.splits["train"][0].name == f"{wrapper}/cat/000.JPEG"
    assert "which is all that" in warnings(source)
    images = open_labelled_images(str(tmp_path / "x"), split="val", batch_size=1)
    assert images.class_names == ["cat", "dog"]
    for split in ("train", "val"):
        write_images(tmp_path / "y" / wrapper / split / "data", {"cat": 1, "dog": 1}, seed=len(split) * 100)
    assert counts(FolderSource(tmp_path / "y")) == dict.fromkeys(("train", "val"), {"cat": 1, "dog": 1})


def test_hidden_files_and_clutter_are_left_out_inside_classes_too(tmp_path: Path) -> None:
    write_images(tmp_path / "x", {"cat": 2, "dog": 2})
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        write_images(tmp_path / "x/cat" / hidden, {"deep": 1}, seed=7)
    for name in (".DS_Store", "._000.JPEG", "Thumbs.db"):
        (tmp_path / "x/dog" / name).write_bytes(b"x")
    source = FolderSource(tmp_path / "x", val_fraction=0)
    assert counts(source) == {"train": {"cat": 2, "dog": 2}}
    assert "hidden files and folders, and those of the system (6): " in warnings(source)
    assert not source.report.left_out
    assert len(list(find_images(tmp_path / "x", Report()))) == 4


def test_links_in_circles_neither_multiply_nor_mislabel(tmp_path: Path) -> None:
    write_images(tmp_path / "x", {"cat": 3, "dog": 2})
    for at in range(3):
        (tmp_path / "x" / f"self{at}").symlink_to(".")
        (tmp_path / "x/cat" / f"self{at}").symlink_to(".")
    (tmp_path / "x/dog/up").symlink_to("..")
    (tmp_path / "x/dog/far_up").symlink_to(tmp_path)
    (tmp_path / "x/cat/itself.jpg").symlink_to("itself.jpg")
    source = FolderSource(tmp_path / "x", val_fraction=0)
    assert counts(source) == {"train": {"cat": 4, "dog": 2}}  # with itself.jpg, a broken one
    assert "links back to a folder that they lie in (8): " in warnings(source)
    assert "links to nowhere (1): cat/itself.jpg." in warnings(source)
    assert len(list(find_images(tmp_path / "x", Report()))) == 6
    (tmp_path / "three").mkdir()
    for at in range(3):
        (tmp_path / "three" / f"link{at}").symlink_to(".")
    assert not list(find_images(tmp_path / "three", Report()))
    with pytest.raises(ValueError, match="nothing but links to itself"):
        FolderSource(tmp_path / "three")


def test_one_folder_in_two_classes_is_refused_and_twice_in_one_is_read_once(tmp_path: Path) -> None:
    write_images(tmp_path / "archive", {"many": 5, "few": 2})
    (tmp_path / "x/b_cat").mkdir(parents=True)
    (tmp_path / "x/b_cat/one").symlink_to(tmp_path / "archive/many")
    (tmp_path / "x/b_cat/two").symlink_to(tmp_path / "archive/many")
    (tmp_path / "x/c_dog").symlink_to(tmp_path / "archive/few")
    source = FolderSource(tmp_path / "x", val_fraction=0)
    assert counts(source) == {"train": {"b_cat": 5, "c_dog": 2}}
    assert "reached twice, by links (1): b_cat/two." in warnings(source)
    (tmp_path / "x/a_bird").mkdir()
    (tmp_path / "x/a_bird/x.jpg").write_bytes(jpeg(99))
    (tmp_path / "x/a_bird/more").symlink_to("../c_dog")  # found first, but it is the class c_dog
    with pytest.raises(ValueError, match=r"folders in two classes \(1\): a_bird/more is c_dog\."):
        FolderSource(tmp_path / "x")


def test_pipes_sockets_and_links_to_nowhere_are_broken_images_and_nothing_waits(tmp_path: Path) -> None:
    write_images(tmp_path / "x", {"cat": 300, "dog": 2}, size=8)
    os.mkfifo(tmp_path / "x/cat/pipe.jpg")
    (tmp_path / "x/cat/zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "x/cat/gone.jpg").symlink_to("nowhere.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path / "x/cat")  # an address of a socket is short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
    source = FolderSource(tmp_path / "x", val_fraction=0)
    assert "devices with names of images (3): cat/pipe.jpg, cat/socket.png, cat/zero.jpg." in warnings(source)
    assert "links to nowhere (1): cat/gone.jpg." in warnings(source)
    for name in ("pipe.jpg", "zero.jpg", "socket.png"):
        with pytest.raises(ValueError, match="a pipe, socket or device"):
            read_file(tmp_path / "x/cat" / name)
    summary = convert(source, tmp_path / "out", workers=1, max_bad_fraction=0.02)
    assert summary["train"]["images"] == 302
    with pytest.raises(ValueError, match=r"list.csv:1: .*pipe.jpg must be a file"):
        (tmp_path / "list.csv").write_text("x/cat/pipe.jpg,cat\n")
        ListSource(tmp_path / "list.csv", split="train")


def test_all_that_is_wrong_is_listed_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "x/train", {"Hat": 1, "cat": 2, "dog": 2, "hat": 1, "locked": 1})
    write_images(tmp_path / "x/val", {"cat": 1, "fox": 1}, seed=5000)
    (tmp_path / "x/train/empty").mkdir()
    (tmp_path / "x/train/nothing").symlink_to(tmp_path / "unmounted")
    (tmp_path / "x/train/cat/gone.png").symlink_to("nowhere")
    (tmp_path / "x/train/cat/notes.txt").write_text("x")
    (tmp_path / "x/train/loose.jpg").write_bytes(jpeg(77))
    (tmp_path / "x/labels").mkdir()
    listing, access = os.scandir, os.access

    def scandir(folder: os.PathLike[str]) -> object:
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: "dog/001" not in str(path) and access(path, mode))
    with pytest.raises(ValueError) as caught:
        FolderSource(tmp_path / "x")
    for line in (
        "class folders without an image (2): empty, locked.",
        "folders that are links to nowhere (1): train/nothing.",
        "cannot be read (2): train/dog/001.JPEG (Permission denied), train/locked (Permission denied).",
        "class folders of one split alone (6): fox (only in ",
        "class names that differ in upper and lower case alone (1): Hat / hat.",
        "links to nowhere (1): train/cat/gone.png.",
        "images beside the class folders (1): train/loose.jpg.",
        "folders beside the splits (1): labels.",
        "left out (1): 1 .txt.",
    ):
        assert line in str(caught.value), line


def test_file_under_two_labels_or_in_two_splits_is_found_by_its_bytes(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "val", {"cat": 1, "dog": 1}, seed=5000)
    twin = (tmp_path / "train/cat/000.JPEG").read_bytes()
    (tmp_path / "train/dog/twin.jpg").write_bytes(twin)
    (tmp_path / "val/cat/twin.jpg").write_bytes(twin)
    (tmp_path / "train/cat/twin.jpg").write_bytes(twin)  # again in its class: no fault
    (tmp_path / "train/dog/near.jpg").write_bytes(twin[:-3] + b"\x00" + twin[-2:])  # same size, other bytes
    (tmp_path / "train/dog/000.JPEG").write_bytes(b"")
    (tmp_path / "train/cat/001.JPEG").write_bytes(b"")
    source = FolderSource(tmp_path)
    assert "byte for byte in two classes (1): train/cat/000.JPEG = train/dog/twin.jpg." in warnings(source)
    assert "in another split (1): train/cat/000.JPEG = val/cat/twin.jpg." in warnings(source)
    (tmp_path / "val/dog/twin.jpg").write_bytes(twin)
    images = open_labelled_images(str(tmp_path), split="val", batch_size=1)
    assert any("in two classes (1): val/cat/twin.jpg = val/dog/twin.jpg" in line for line in images.warnings)


def test_too_many_files_of_one_size_are_not_compared_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_splits, "_COMPARED", 1)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(jpeg(1))
    assert "2 files share their size with others: they were not compared" in warnings(
        FolderSource(tmp_path, val_fraction=0)
    )


def test_class_without_an_image_for_validation_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "x", {"many": 10, "one": 1})
    assert "classes without an image for validation (1): one." in warnings(FolderSource(tmp_path / "x"))
    write_images(tmp_path / "y/train", {"cat": 2, "dog": 2})
    write_images(tmp_path / "y/val", {"cat": 1}, seed=500)
    source = FolderSource(tmp_path / "y")
    assert counts(source)["val"] == {"cat": 1, "dog": 0}
    assert "classes without an image for validation (1): dog." in warnings(source)


@pytest.mark.parametrize("out", ["x", "x/mds", ".", "link", "link/mds"])
def test_output_in_the_source_or_around_it_is_refused(tmp_path: Path, out: str) -> None:
    write_images(tmp_path / "x", {"cat": 2, "dog": 2})
    (tmp_path / "link").symlink_to("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="OUT must be a folder outside of the one that is converted"):
        convert(FolderSource(tmp_path / "x"), tmp_path / out, workers=1)
    assert sorted(tmp_path.rglob("*")) == before
    convert(FolderSource(tmp_path / "x"), tmp_path / "x-mds", workers=1)


def test_path_with_two_labels_in_a_list_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / "list.csv").write_text("cat/000.JPEG,cat\ndog/000.JPEG,dog\ncat/000.JPEG,dog\n")
    with pytest.raises(ValueError, match=r"list.csv:3: cat/000.JPEG must have one label, it has another in line 1"):
        ListSource(tmp_path / "list.csv", split="train")


def test_names_that_steer_a_terminal_are_escaped(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / "e\x1b[31m\n").mkdir()
    with pytest.raises(ValueError) as caught:
        FolderSource(tmp_path)
    assert r"(1): e\x1b[31m\n." in str(caught.value) and "\x1b" not in str(caught.value)
