"""Fixtures of the tests of conversion."""

from pathlib import Path

import pytest

from tests.data.conversion.conversion import jpeg, write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    write_images(root / "train", {"cat": 12, "dog": 9, "emu": 5})
    write_images(root / "val", {"cat": 3, "dog": 2, "emu": 2}, seed=500)
    (root / "train" / "cat" / "deeper").mkdir()
    (root / "train" / "cat" / "deeper" / "x.png").write_bytes(jpeg(7, kind="PNG"))
    (root / "train" / "dog" / "y.webp").write_bytes(jpeg(8, kind="WEBP"))
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    return root
