"""``run.device_train_microbatch_size: auto``: what it excludes, and the clear word on a CPU."""

from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, error_of, run_train, tiny_photo_overrides
from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.schema import Run
from vitcomposer.training.execution import check_execution

DEIT = ROOT / "yamls/deit_ti.yaml"
KEY = "run.device_train_microbatch_size"


def check(*, device: str = "gpu", algorithms: tuple[str, ...] = (), **changes: object) -> None:
    run = Run(name="x", device_train_microbatch_size="auto", **changes)  # type: ignore[arg-type]
    check_execution(run, device=device, device_batch_size=16, algorithms=algorithms)


def test_auto_is_for_gpus() -> None:
    check(algorithms=("EMA", "GradientClipping"))
    with pytest.raises(ConfigError, match=f"{KEY} must be a number of images, or left out, on a CPU"):
        check(device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallelism": "fsdp2"}, "with run.parallelism=fsdp2"),
        ({"compile": True}, "with run.compile"),
        ({"algorithms": ("SAM",)}, "with algorithms.SAM"),
    ],
)
def test_what_auto_cannot_repeat_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{KEY} must be a number of images {words}.*got 'auto'"):
        check(**changes)


@pytest.mark.parametrize(("given", "read"), [("auto", "auto"), ("4", 4), ("null", None)])
def test_yaml_takes_a_number_or_auto(given: str, read: object) -> None:
    cfg = config.load(DEIT, [f"{KEY}={given}"])
    assert cfg.run.device_train_microbatch_size == read


@pytest.mark.parametrize("given", ["automatic", "0", "-1", "1.5", "true"])
def test_other_words_and_numbers_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=KEY):
        config.load(DEIT, [f"{KEY}={given}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works on a GPU")
@pytest.mark.parametrize("page", ["deit_ti", "swav_demo"])
def test_run_on_a_cpu_ends_before_the_first_batch(
    page: str, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny_photo_overrides(photo_mds, tmp_path, "auto")
    if page == "swav_demo":
        overrides = [f"data.local={photo_mds}", f"run.folder={tmp_path}", "run.name=auto"]
    assert run_train([str(ROOT / f"yamls/{page}.yaml"), *overrides, f"{KEY}=auto"]) == 2
    error = error_of(capsys.readouterr().err)
    assert f"{KEY} must be a number of images, or left out, on a CPU" in error and error.count("\n") == 1
