"""``vitcomposer.load``: the same answers for a file, a Pillow image, an array and a tensor of the same pixels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import vitcomposer
from tests.conftest import PHOTOS, read_photo


def test_all_forms_of_an_image_are_answered_alike(trained_run: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    read_photo("coffee").resize((120, 80)).save(path, exif=exif)
    opened = Image.open(path)
    pixels = np.asarray(ImageOps.exif_transpose(opened))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    model = vitcomposer.load(trained_run, device="cpu")
    answers = model.predict([path, str(path), opened, pixels, tensor, tensor / 255], batch_size=4)
    assert len(answers) == 6 and len(set(answers)) == 1
    (best, *_) = answers
    assert len(best.classes) == 5 and set(best.classes) <= set(PHOTOS) == set(model.class_names)
    assert list(best.probabilities) == sorted(best.probabilities, reverse=True)
    assert model.predict(path, top_k=8)[0].classes[:5] == best.classes
    assert sum(model.predict(path, top_k=8)[0].probabilities) == pytest.approx(1)
    assert len(model.predict(np.stack([pixels] * 3))) == len(model.predict(torch.stack([tensor] * 3))) == 3
    grey = np.asarray(opened.convert("L"))
    assert model.predict(grey) == model.predict(np.repeat(grey[..., None], 3, axis=2))
    assert model.predict([]) == []
    (tmp_path / "broken.jpg").write_bytes(path.read_bytes()[:900])
    for given, message in (
        ([path, tmp_path / "broken.jpg"], r"broken\.jpg cannot be read"),
        ([path, tmp_path / "nowhere.jpg"], r"nowhere\.jpg cannot be read: No such file"),
        (tensor * 2.0, "image 0 cannot be read: a tensor of floats must lie in"),
        ([pixels, pixels.astype(np.float32)], r"image 1 cannot be read: it must be a path.* got ndarray float32"),
        ([tensor[:1]], "image 0 cannot be read: it must be a path"),
        (np.zeros((4, 4, 4), np.uint8), "three channels"),
        ([None], "got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k must be from 1 to 8"):
        model.predict(path, top_k=9)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import vitcomposer, sys; print(sorted({'torch', 'numpy', 'composer', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vitcomposer.lode  # type: ignore[attr-defined]
