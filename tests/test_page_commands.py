"""Every command in a block of README.md and docs/*.md is run, or is in a list that says why not.

Quick commands run in this process; a slow test types those of a whole page as they stand and in their order, with small
sizes behind what trains (``SMALLER``).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from vitcomposer import cli

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
CLASSES = ("cat", "dog", *(f"kind{i}" for i in range(10)))  # 12, as docs/faq.md says
IMAGES = 10  # of each class

# Commands that no test runs as they stand: the beginning of the command, and why not.
NOT_RUN = {
    r"make (setup|audit)|python3 -m venv|\.venv/bin/python -m pip|pip install|docker build": "downloads packages",
    r"source \.venv": "the tests run in an environment already",
    r"make test": "runs this test",
    r"docker run": "needs Docker",
    r"vitcomposer weights": "downloads 88 MB; tests/stores/test_weights.py runs it against a server",
    r"vitcomposer (convert torchvision CIFAR10|train cifar10_convit)": "downloads 170 MB, and takes 25 minutes",
    r"kubectl|sky jobs|sbatch|scancel|id=\$\(sbatch": "needs a cluster",
    r"vitcomposer convert folder /shared/photos .*--engine ray": "needs Ray; `make integrations` tests it",
    r"vitcomposer convert (folder /shared/photos|merge) s3:": "needs a bucket; tests/faults/test_s3.py has one",
    r"(composer|torchrun) .*(-n|--nproc-per-node) 8": "needs 8 GPUs, and ImageNet",
    r"make deit_s NGPU=8|vitcomposer train deit_[sb] ": "needs GPUs, and ImageNet",
}
FAST = r"vitcomposer (doctor$|new |convert folder photos |launch |plan )"

# Behind what trains: sizes for a test; everything else is as it stands.
SMALLER = {
    r"vitcomposer (check|train) photos\.yaml": "max_duration=2ep model.depth=2 "
    "model.local_up_to_layer=1 data.num_workers=1 run.eval_interval=1ep",
    r"vitcomposer train finetune_photos": "max_duration=1ep schedule.t_warmup=1ba global_train_batch_size=16 "
    "model.image_size=64",
    r"vitcomposer train my_images\.yaml": "max_duration=1ep model.depth=1 data.num_workers=1",
    r"make demo": "max_duration=2ep schedule.t_warmup=1ep run.save_interval=1ep",
    r"vitcomposer bench": "--seconds 1",
}


def blocks_of(page: Path, *languages: str) -> list[str]:
    """The text of a page's blocks of these languages, indented ones too."""
    found = re.finditer(rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^ *```$", page.read_text(), re.M | re.S)
    return [re.sub(rf"^{block[1]}", "", block[2], flags=re.M) for block in found]


def commands_of(page: Path) -> list[str]:
    """The lines that a shell would run, without comments; a line that a backslash ends goes on in the next."""
    text = "\n".join(blocks_of(page, "bash", "console", "sh", "shell")).replace("\\\n", " ")
    lines = (re.sub(r"\s+# .*|^#.*", "", line).removeprefix("$ ").strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


COMMANDS = {page: commands_of(page) for page in PAGES}
RUN = {
    page: [line for line in lines if not any(re.match(rule, line) for rule in NOT_RUN)]
    for page, lines in COMMANDS.items()
}


def test_every_command_is_run_or_has_a_reason() -> None:
    """And no reason is left of a command that is gone."""
    ours = [line for lines in RUN.values() for line in lines]
    assert len(ours) > 30
    assert [line for line in ours if not re.match(r"(vitcomposer|make [a-z_]+\b)", line)] == []
    every = [line for lines in COMMANDS.values() for line in lines]
    assert [rule for rule in NOT_RUN if not any(re.match(rule, line) for line in every)] == []
    assert [rule for rule in SMALLER if not any(re.match(rule, line) for line in ours)] == []


def make_photos(folder: Path) -> None:
    """Noise around a colour for each class."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        colour = rng.integers(40, 215, 3)
        for i in range(IMAGES):
            pixels = colour + rng.normal(0, 40, (80, 100, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typed") / "photos"
    make_photos(folder)
    return folder


def typed(page: Path) -> str:
    return "\n".join(RUN[page])


def prepare(folder: Path, photos: Path) -> None:
    """The checkout and the photographs, in a folder that a test may write to."""
    for name in ("Makefile", "train.py", "yamls", "recipes", "vitcomposer", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("photos", "my_photos", "new_photos"):
        shutil.copytree(photos, folder / name)
    (folder / "my_images").mkdir()
    for path in photos.rglob("*.jpg"):
        shutil.copy(path, folder / "my_images" / f"{path.parent.name}_{path.name}")
    shutil.copy(photos / "cat/1.jpg", folder / "cat.jpg")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if re.search(FAST, typed(page), re.M)], ids=lambda page: page.stem
)
def test_quick_commands_of_a_page_run(
    page: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, photos)
    monkeypatch.chdir(tmp_path)
    for line in RUN[page]:
        if re.match(FAST, line):
            words = shlex.split(line)[1:]
            # doctor tells of this machine, which may have something to do
            assert cli.main(words) in ((0, 1) if words == ["doctor"] else (0,)), line


def run(line: str, folder: Path) -> None:
    """Type a command as it stands, with smaller sizes behind it."""
    more = [words for rule, words in SMALLER.items() if re.match(rule, line)]
    tools = Path(sys.executable).parent
    line = " ".join([re.sub(r"^make ", f"make -o .venv/installed BIN={shlex.quote(str(tools))} ", line), *more])
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    good = (0, 1) if line == "vitcomposer doctor" else (0,)
    assert done.returncode in good and "Traceback" not in done.stderr, f"$ {line}\n{done.stdout}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def after_readme(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's commands were typed: shards and runs of digits and of photographs."""
    folder = tmp_path_factory.mktemp("readme")
    prepare(folder, photos)
    for line in RUN[ROOT / "README.md"]:
        run(line, folder)
    return folder


# What a page begins with where it does not make it itself: the command that makes it, and what there is then.
MADE = {
    "make demo": ("datasets/digits", "runs/demo"),
    "vitcomposer new photos": ("photos.yaml", "datasets/photos", "runs/photos"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if RUN[page]], ids=lambda page: page.stem)
def test_all_commands_of_a_page_run(page: Path, photos: Path, after_readme: Path, tmp_path: Path) -> None:
    prepare(tmp_path, photos)
    for command, names in MADE.items():
        for name in names if command not in RUN[page] else ():
            copy(after_readme / name, tmp_path / name)
    if page.stem == "report":
        for name in ("my_photos", "my_photos_lr"):
            copy(after_readme / "runs/photos", tmp_path / "runs" / name)
    if "finetune_photos" in typed(page):
        save_weights(tmp_path / "weights/deit_3_small_224_21k.pth")
    for line in RUN[page]:
        run(line, tmp_path)
    for text in blocks_of(page, "python"):
        if "vitcomposer.load" in text:
            code = f"from PIL import Image\nimage = Image.open('cat.jpg')\n{text}"
            run(f"python -c {shlex.quote(code)}", tmp_path)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy(source, target)


def save_weights(path: Path) -> None:
    """A file as the published one is, of a network that nobody trained."""
    import timm
    import torch

    path.parent.mkdir()
    model = timm.create_model("deit3_small_patch16_224", num_classes=8)
    torch.save({"model": model.state_dict()}, path)
