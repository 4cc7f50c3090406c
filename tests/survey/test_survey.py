"""What a folder of photographs is found to hold, which images are alike, and which settings the rules make of it."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, read_photo
from tests.data.conversion.conversion import write_images
from vitcomposer import config
from vitcomposer.data.conversion.sources import FolderSource, Item
from vitcomposer.schema.dino import DINO
from vitcomposer.survey import photos
from vitcomposer.survey.duplicates import counted, find_pairs, to_csv
from vitcomposer.survey.page import changed_page, quoted
from vitcomposer.survey.photos import Look, Photo, Survey, survey
from vitcomposer.survey.rules import MANY_PASSES, UNLABELLED, choose, choose_unlabelled


@pytest.fixture
def mess(tmp_path: Path) -> Path:
    """Two classes with CMYK, EXIF, 16 bits, transparency, a broken file, a text, and images that are in both."""
    folder = tmp_path / "mess"
    write_images(folder, {"ant": 8, "bee": 4})
    photo = read_photo("coffee").resize((300, 200))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "ant/turned.jpg", exif=turned)
    read_photo("china").resize((300, 200)).convert("CMYK").save(folder / "bee/cmyk.jpg")
    grey = np.random.default_rng(0).integers(0, 65536, (60, 80), dtype=np.uint16)
    Image.fromarray(grey).save(folder / "bee/deep.png")
    read_photo("rocket").convert("RGBA").resize((90, 60)).save(folder / "bee/clear.png")
    (folder / "bee/broken.jpg").write_bytes((folder / "ant/turned.jpg").read_bytes()[:2000])
    (folder / "notes.txt").write_text("none")
    (folder / "bee/copy.jpg").write_bytes((folder / "ant/000.JPEG").read_bytes())
    seen = photo.resize((600, 400)).crop((6, 4, 594, 396)).transpose(Image.Transpose.ROTATE_270)
    seen.save(folder / "bee/near.jpg", quality=50)
    return folder


def opened(folder: Path) -> tuple[FolderSource, Survey]:
    source = FolderSource(folder, find_copies=False)
    return source, survey(source, str(folder))


def test_odd_images_are_counted_and_broken_ones_named(mess: Path) -> None:
    _, found = opened(mess)
    assert (found.images, found.of_a_class, found.turned) == (19, [9, 10], 1)
    assert found.odd == {"CMYK": 1, "PNG of 16 bits": 1, "with transparency": 1}
    assert [photo.item.name for photo in found.broken] == ["bee/broken.jpg"] and found.broken_share > 0
    assert found.size == (40, 30)
    assert any("notes" in line or ".txt" in line for line in found.warnings)


def test_identical_and_nearly_identical_images_are_found_across_classes_and_splits(mess: Path, tmp_path: Path) -> None:
    source, found = opened(mess)
    pairs = find_pairs(source, found)
    assert counted(pairs) == {
        ("identical files", "different classes"): 1,
        ("nearly identical images", "different classes"): 1,
    }
    rows = list(csv.DictReader(io.StringIO(to_csv(pairs, found.class_names))))
    assert [(row["what"], row["file"], row["other_file"], row["other_class"]) for row in rows] == [
        ("identical files", "ant/000.JPEG", "bee/copy.jpg", "bee"),
        ("nearly identical images", "ant/turned.jpg", "bee/near.jpg", "bee"),
    ]
    write_images(tmp_path / "splits/train", {"ant": 3, "bee": 3}, seed=5)
    write_images(tmp_path / "splits/val", {"ant": 2, "bee": 2}, seed=50)
    (tmp_path / "splits/val/ant/same.jpg").write_bytes((tmp_path / "splits/train/ant/002.JPEG").read_bytes())
    source, found = opened(tmp_path / "splits")
    assert counted(find_pairs(source, found)) == {("identical files", "different splits"): 1}


def test_different_photographs_and_flat_images_are_not_alike(tmp_path: Path) -> None:
    names = ("astronaut", "chelsea", "china", "coffee", "flower", "rocket")
    for at, name in enumerate(names):
        (tmp_path / "ab"[at % 2]).mkdir(exist_ok=True)
        read_photo(name).resize((200, 150)).save(tmp_path / "ab"[at % 2] / f"{name}.jpg")
    for label, grey in (("a", 254), ("b", 253)):
        Image.new("L", (200, 150), grey).save(tmp_path / label / "white.png")
    source, found = opened(tmp_path)
    assert find_pairs(source, found) == []


def test_a_sample_is_the_same_for_a_seed_and_counts_stay_those_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, {"ant": 30, "bee": 10})
    monkeypatch.setattr(photos, "LOOKED_AT", 12)
    source = FolderSource(tmp_path, find_copies=False)
    first, again, other = (survey(source, "x", seed=seed) for seed in (0, 0, 1))
    names = [[photo.item.name for photo in each.photos] for each in (first, again, other)]
    assert names[0] == names[1] != names[2] and len(names[0]) == 12
    assert first.images == 40 and first.imbalance == 3


def test_folder_without_a_readable_image_is_one_error(tmp_path: Path) -> None:
    for name in ("ant/a.jpg", "ant/b.jpg", "bee/a.jpg", "bee/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"no image {name}")
    with pytest.raises(ValueError, match="must hold images that can be read, none can: ant/"):
        opened(tmp_path)


def imagined(count: int, *, side: int = 500, classes: int = 2) -> Survey:
    """A data set of that many training images, none of which is there."""
    counts = {"train": Counter({label: count // classes for label in range(classes)}), "val": Counter({0: 1})}
    photo = Photo("train", Item("a.jpg", 1, 0), Look(side + 100, side))
    return Survey("photos", [f"class{label}" for label in range(classes)], counts, [photo])


@pytest.mark.parametrize(
    ("count", "epochs", "crop", "batch", "blocks"),
    [
        (20, 30, 0.35, 4, "4"),
        (240, 30, 0.35, 16, "4"),
        (300, 30, 0.35, 16, None),
        (9_998, 30, 0.35, 64, None),
        (10_000, 15, 0.2, 64, None),
        (99_998, 15, 0.2, 64, None),
        (100_000, 8, 0.08, 64, None),
    ],
)
def test_fine_tuning_follows_the_table_of_the_documentation(
    count: int, epochs: int, crop: float, batch: int, blocks: str | None
) -> None:
    choice = choose(imagined(count), pretrained=True)
    assert (choice.page, choice.epochs, choice.batch, choice.image_size) == ("finetune_photos", epochs, batch, 224)
    assert choice.values["augment.crop_scale"][0] == f"[{crop}, 1.0]"
    assert choice.values.get("init.train_blocks", (None,))[0] == blocks
    assert "data.num_workers" not in choice.values, "it follows from the machine that trains"


@pytest.mark.parametrize(
    ("count", "side", "minutes", "epochs", "size", "batch"),
    [
        (240, 500, 10, 500, 96, 32),
        (240, 500, 2, 250, 96, 32),
        (3_000, 70, 2, 20, 64, 64),
        (50_000, 8, 1, 5, 32, 64),
        (50_000, 8, 60, 36, 32, 64),
    ],
)
def test_training_from_scratch_takes_about_the_minutes_of_a_core(  # noqa: PLR0913, PLR0917
    count: int, side: int, minutes: float, epochs: int, size: int, batch: int
) -> None:
    choice = choose(imagined(count, side=side), pretrained=False, minutes=minutes)
    assert (choice.page, choice.epochs, choice.image_size) == ("photos_scratch", epochs, size)
    assert choice.batch == batch and choice.values["max_duration"][0] == f"{epochs}ep"
    first = {96: 64, 64: 32, 32: 16}[size]
    assert f"image_sizes: [{first}, {size}]" in choice.values["algorithms.Curriculum"][0]
    assert choice.values["evaluation.image_size"][0] == str(size + 16)
    assert any("minutes of a core (--minutes)" in reason for reason in choice.reasons)
    assert choice.values.get("mixing.prob", ("",))[0] == ("0.5" if epochs >= MANY_PASSES else "")


@pytest.mark.parametrize(("most", "told", "balance"), [(30, False, None), (31, True, None), (101, True, "sqrt")])
def test_unequal_classes_are_told_and_balanced(most: int, told: bool, balance: str | None) -> None:
    found = imagined(100)
    found.counts["train"] = Counter({0: most, 1: 10})
    choice = choose(found, pretrained=True)
    assert any("imbalance" in reason for reason in choice.reasons) == told
    assert choice.values.get("data.balance", (None,))[0] == balance


@pytest.mark.parametrize(
    ("count", "side", "network", "size", "epochs"),
    [(240, 40, "vit_tiny_patch16", 48, 300), (12_000, 90, "vit_tiny_patch16", 72, 30), (100_000, 500, None, 224, 100)],
)
def test_images_without_classes_get_a_network_of_their_number(
    count: int, side: int, network: str | None, size: int, epochs: int, tmp_path: Path
) -> None:
    choice = choose_unlabelled(imagined(count, side=side))
    assert (choice.page, choice.image_size, choice.epochs) == (UNLABELLED, size, epochs)
    path = tmp_path / "page.yaml"
    path.write_text(changed_page((ROOT / f"yamls/{choice.page}.yaml").read_text(), choice.values, ["x"]))
    cfg = config.load(path)
    assert isinstance(cfg, DINO) and cfg.monitor is None
    assert cfg.model.image_size == size and cfg.model.name == (network or "vit_small_patch16")
    assert cfg.crops.size_crops[0] == size and (cfg.global_train_batch_size, cfg.max_duration) == (
        choice.batch,
        f"{choice.epochs}ep",
    )


@pytest.mark.parametrize("pretrained", [True, False])
def test_written_page_is_a_configuration_with_the_chosen_values(pretrained: bool, tmp_path: Path) -> None:
    choice = choose(imagined(240, classes=12), pretrained=pretrained)
    text = changed_page((ROOT / f"yamls/{choice.page}.yaml").read_text(), choice.values, ["a head", ""])
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/class_names.json").write_text(json.dumps([f"class{at}" for at in range(12)]))
    assert text.startswith("# a head\n#\nrecipe: supervised\n")
    cfg = config.load(tmp_path / "mine.yaml", [f"data.local={tmp_path / 'data'}"])
    assert (cfg.run.name, cfg.model.num_classes, cfg.data.num_workers) == ("mine", 12, "auto")
    assert (cfg.global_train_batch_size, cfg.max_duration) == (choice.batch, f"{choice.epochs}ep")
    ema = {"half_life": "0.07dur", "update_interval": "1ba"}  # whatever max_duration becomes
    assert cfg.algorithms.get("EMA") == (ema if pretrained else None)
    assert all(f"# {reason}" in text for _, reason in choice.values.values())


def test_a_page_without_a_block_is_a_fault_and_odd_texts_are_quoted() -> None:
    with pytest.raises(KeyError, match="augment"):
        changed_page("# x\nrecipe: supervised\n", {"augment.flip_prob": ("0", "")}, [])
    assert quoted("datasets/photos") == "datasets/photos" and quoted("a: b") == '"a: b"'
