"""``vitcomposer weights`` against a server on this machine: broken connections, wrong files, mirrors, missing files."""

import dataclasses
import hashlib
import re
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.stores.weights_server import WeightsServer, serving
from vitcomposer import config, needed_files
from vitcomposer.cli import main
from vitcomposer.commands.start import weights as command
from vitcomposer.errors import ConfigError
from vitcomposer.folder_lock import only_writer
from vitcomposer.models import build_model, load_weights
from vitcomposer.schema import Distill
from vitcomposer.stores import http
from vitcomposer.stores import weights as published

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"tiny-{DIGEST[:8]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    """It has one small published file; pauses are short and the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITCOMPOSER_WEIGHTS", raising=False)
    monkeypatch.setattr(http, "_PAUSE", 0.01)
    with serving(CONTENT) as server:
        entry = published.Published(f"{server.url}/some/{NAME}.pth", "a test", len(CONTENT) // 4, "Apache-2.0")
        for module in (published, command):
            monkeypatch.setattr(module, "PUBLISHED", (entry,))
        yield server


def files(folder: str = "weights") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()} if Path(folder).exists() else {}


def test_a_file_comes_whole_and_a_second_call_only_looks(
    server: WeightsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", NAME]) == 0
    assert files() == {f"{NAME}.pth": CONTENT}
    assert f"wrote weights/{NAME}.pth: 0.3 MB, sha256 {DIGEST} (as published)" in capsys.readouterr().out
    assert server.asked == [(f"/some/{NAME}.pth", None)]
    assert main(["weights", f"{NAME}.pth"]) == 0
    assert "is there" in capsys.readouterr().out and len(server.asked) == 1


def test_what_comes_next_is_a_recipe_that_starts_from_the_file(
    server: WeightsServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "named_by", {f"{NAME}.pth": ["finetune_photos"]}.get)
    assert main(["weights", NAME]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "Next: vitcomposer train finetune_photos"


def test_a_broken_connection_goes_on_where_it_broke(server: WeightsServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.breaks = [100_000, 50_000]
    assert main(["weights", NAME]) == 0
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert files() == {f"{NAME}.pth": CONTENT}
    assert "the connection broke after 0.1 of 0.3 MB: going on at 0.1 MB" in capsys.readouterr().err


def test_a_later_call_goes_on_with_what_an_earlier_one_left(server: WeightsServer) -> None:
    server.breaks = [100_000] + [0] * (http.TRIES - 1)
    assert main(["weights", NAME]) == 2
    assert sorted(files()) == [f".{NAME}.pth.partial", f".{NAME}.pth.partial.tag"]
    assert len(files()[f".{NAME}.pth.partial"]) == 100_000
    server.asked.clear()
    assert main(["weights", NAME]) == 0
    assert [wanted for _, wanted in server.asked] == ["bytes=100000-"] and files() == {f"{NAME}.pth": CONTENT}


@pytest.mark.parametrize("change", ["another file", "no parts"])
def test_all_of_it_comes_again_where_the_rest_would_not_fit(server: WeightsServer, change: str) -> None:
    Path("weights").mkdir()
    Path(f"weights/.{NAME}.pth.partial").write_bytes(bytes(70_000))
    Path(f"weights/.{NAME}.pth.partial.tag").write_text('"old"' if change == "another file" else server.tag)
    server.gives_parts = change != "no parts"
    assert main(["weights", NAME]) == 0
    assert files() == {f"{NAME}.pth": CONTENT}


def test_more_than_the_file_is_not_kept(server: WeightsServer) -> None:
    Path("weights").mkdir()
    Path(f"weights/.{NAME}.pth.partial").write_bytes(CONTENT + b"x")
    Path(f"weights/.{NAME}.pth.partial.tag").write_text(server.tag)
    assert main(["weights", NAME]) == 0
    assert files() == {f"{NAME}.pth": CONTENT}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (CONTENT[::-1], f"has sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()[:16]}..., which is not the published"),
        (b"<html>log in</html>", "has 19 bytes, at least 256,000 are right"),
        (CONTENT * 21, "has 5,376,000 bytes, at most 5,120,000 are expected"),
    ],
)
def test_another_file_is_refused_and_nothing_is_left(
    server: WeightsServer, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = content
    assert main(["weights", NAME]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and said in last and "VITCOMPOSER_WEIGHTS" in last
    assert files() == {}


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, http.TRIES)])
def test_an_answer_that_stays_the_same_is_not_asked_for_again(
    server: WeightsServer, status: int, requests: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status = status
    assert main(["weights", NAME]) == 2
    assert len(server.asked) == requests and files() == {}
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: http://127.0.0.1") and (str(status) in last or "Service Unavailable" in last)


def test_no_server_is_one_error(server: WeightsServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.server_close()
    assert main(["weights", NAME]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"could not be had in {http.TRIES} tries" in last and f"put the file at weights/{NAME}.pth" in last


def test_a_mirror_is_asked_instead(
    server: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(CONTENT) as mirror:
        monkeypatch.setenv("VITCOMPOSER_WEIGHTS", f"{mirror.url}/ours/")
        assert main(["weights", NAME]) == 0
        assert mirror.asked == [(f"/ours/{NAME}.pth", None)] and server.asked == []
    shelf = tmp_path / "shelf"
    monkeypatch.setenv("VITCOMPOSER_WEIGHTS", str(shelf))
    assert main(["weights", NAME, "--to", "from_folder"]) == 2
    assert f"there is no file {shelf}/{NAME}.pth" in capsys.readouterr().err
    shelf.mkdir()
    (shelf / f"{NAME}.pth").write_bytes(CONTENT)
    assert main(["weights", NAME, "--to", "from_folder"]) == 0
    assert files("from_folder") == {f"{NAME}.pth": CONTENT}
    monkeypatch.setenv("VITCOMPOSER_WEIGHTS", "ftp://somewhere")
    assert main(["weights", NAME, "--to", "elsewhere"]) == 2
    assert "VITCOMPOSER_WEIGHTS must be a folder or http" in capsys.readouterr().err


def test_a_full_disk_is_no_broken_connection(
    server: WeightsServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    assert main(["weights", NAME]) == 2
    assert "MB of room for what is missing, it has 0. Make room" in capsys.readouterr().err and len(server.asked) == 1


def test_two_at_once_are_told_of_each_other(server: WeightsServer, capsys: pytest.CaptureFixture[str]) -> None:
    taken, done, found = threading.Event(), threading.Event(), []

    def hold() -> None:
        with only_writer(Path(f"weights/.{NAME}.pth.lock"), "x", "y"):
            taken.set()
            done.wait(30)

    import multiprocessing

    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    holder = context.Process(target=hold)
    holder.start()
    assert taken.wait(30)
    found.append(main(["weights", NAME]))
    done.set()
    holder.join()
    assert found == [2] and f"weights/{NAME}.pth is being written by pid" in capsys.readouterr().err


def test_a_damaged_file_that_is_there_is_said(server: WeightsServer, capsys: pytest.CaptureFixture[str]) -> None:
    Path("weights").mkdir()
    Path(f"weights/{NAME}.pth").write_bytes(CONTENT[:-1])
    assert main(["weights", NAME]) == 2
    assert "Delete it, call again" in capsys.readouterr().err
    assert server.asked == []


def test_the_list_names_every_file_of_our_yamls(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "--to", str(ROOT / "yamls")]) == 0
    out = capsys.readouterr().out
    for entry in published.PUBLISHED:
        assert entry.url in out and entry.short in out
    named = {
        found
        for path in ROOT.glob("yamls/*.yaml")
        for found in re.findall(r"^ +weights: (\S+)", path.read_text(), re.M)
    }
    assert len(named) == 4  # and null
    assert named - {"null"} <= {f"weights/{entry.name}" for entry in published.PUBLISHED}
    assert published.named_by("deit_3_small_224_21k.pth") == ["finetune_photos"]


def test_a_name_that_is_no_file_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "deit_3_smal_224_21k"]) == 2
    assert "Did you mean 'deit_3_small_224_21k'?" in capsys.readouterr().err


NETWORKS = {  # of the file's numbers: a network that has no more
    "deit_3_small_224_21k": ("deit3_small_patch16", 1000),
    "deit_tiny_patch16_224-a1311bcf": ("deit_tiny_patch16", 1000),
    "deit_small_patch16_224-cd65a155": ("deit_small_patch16", 1000),
    "deit_base_patch16_224-b5f2ef4d": ("deit_base_patch16", 1000),
    "convit_tiny": ("convit_tiny", 1000),
    "convit_small": ("convit_small", 1000),
    "convit_base": ("convit_base", 1000),
    "dino_deitsmall16_pretrain": ("vit_small_patch16", 0),
}


def test_sizes_are_those_of_the_networks() -> None:
    import timm
    import torch

    for entry in published.PUBLISHED:
        if entry.short in NETWORKS:
            name, classes = NETWORKS[entry.short]
            with torch.device("meta"):
                network = build_model(name, num_classes=classes or 1, image_size=224)
            count = sum(p.numel() for n, p in network.named_parameters() if classes or not n.startswith("head."))
            assert entry.parameters == count, entry.short
    with torch.device("meta"):
        teacher = timm.create_model("regnety_160", num_classes=1000)
    entry = published.find_published("regnety_160-a5fe301d")
    assert entry is not None and entry.parameters == sum(p.numel() for p in teacher.parameters())


def test_a_missing_file_names_key_command_and_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        config.load(ROOT / "yamls/finetune_photos.yaml", also=needed_files.check_needed_files)
    assert [problem.partition(" ")[0] for problem in raised.value.problems] == ["data.local", "init.weights"]
    assert "'weights/deit_3_small_224_21k.pth'" in str(raised.value)
    assert "Run `vitcomposer weights deit_3_small_224_21k` (88 MB), put the file there" in str(raised.value)
    assert "init.weights=null" in str(raised.value)


def test_a_missing_teacher_and_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = config.load(ROOT / "yamls/deit_s_distilled.yaml")
    assert isinstance(cfg, Distill)
    elsewhere = dataclasses.replace(cfg.teacher, weights="my shelf/regnety_160-a5fe301d.pth")
    with pytest.raises(ConfigError) as raised:
        needed_files.check_needed_files(dataclasses.replace(cfg, teacher=elsewhere))
    assert "Run `vitcomposer weights regnety_160-a5fe301d --to 'my shelf'` (334 MB)" in str(raised.value)
    assert "or set teacher.weights=FILE." in str(raised.value)


def test_reading_a_file_that_is_not_there_says_how_to_get_it() -> None:
    model = build_model("deit_tiny_patch16", num_classes=2, image_size=32, depth=1, embed_dim=16, num_heads=1)
    with pytest.raises(FileNotFoundError, match=r"There is no weights/convit_tiny\.pth\. Run `vitcomposer weights con"):
        load_weights(model, "weights/convit_tiny.pth")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'convit_tiny\.pth'"):
        load_weights(model, "convit_tin.pth")
