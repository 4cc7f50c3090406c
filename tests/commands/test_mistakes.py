"""Seventy mistakes of a first hour: each ends with one error that names cause and remedy, and with exit code 2."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitcomposer import cli

MISTAKES = [  # words after vitcomposer, then what the error says of the cause and of the remedy
    ("trian demo", "no command 'trian'", "Did you mean train"),
    ("covert folder photos out", "no command 'covert'", "Did you mean convert"),
    ("demo", "no command 'demo'", "`vitcomposer --help` lists them"),
    ("train", "required: yaml", "`vitcomposer train --help`"),
    ("train dmeo", "no yaml at dmeo", "Did you mean 'demo'"),
    ("train deit-s", "no yaml at deit-s", "Did you mean 'deit_s'"),
    ("train mine.yaml", "no yaml at mine.yaml", ""),
    ("train photos", "photos must be a yaml file, it is a folder", "Name a file in it"),
    ("train notes.txt", "notes.txt must hold keys and values", "Start with recipe:"),
    ("train broken.yaml", "broken.yaml must be readable yaml, in line 2", "Mend that line"),
    ("train demo data.local=ds optimzer.lr=1", "optimzer.lr is no key", "Did you mean optimizer.lr"),
    ("train demo data.local=ds optimizer.lr=fast", "optimizer.lr must be a finite number, got 'fast'", "Write it like"),
    ("train demo data.local=ds optimizer.lr=-1", "optimizer.lr must be above 0", "DeiT uses 5e-4"),
    ("train demo data.local=ds max_duration=10", "max_duration must be a time string .*, got '10'", "Write 300ep"),
    ("train demo data.local=ds max_duration=ten", "max_duration must be a time string .*, got 'ten'", "Write 300ep"),
    (
        "train demo data.local=nowhere",
        "data.local must be a folder .*'nowhere', which does not",
        "`vitcomposer convert`",
    ),
    ("train demo data.local=photos", "data.local must be a folder .*'photos'", "`vitcomposer convert`"),
    ("train demo data.local=ds precision=fp17", "precision must be one of .*, got 'fp17'", "Choose one"),
    (
        "train demo data.local=ds model.num_classes=7",
        "model.num_classes must be 2, .* got 7",
        "Set model.num_classes=2",
    ),
    ("train demo data.local=ds model.image_size=0", "model.image_size must be 1 or more, got 0", "Use 224"),
    (
        "train demo data.local=ds run.loggers=[tensorbord]",
        r"run.loggers\[0\] must be one of",
        "Did you mean tensorboard",
    ),
    ("train demo data.local=ds algorithms.MixUp2={}", "algorithms.MixUp2 must be one of", "Did you mean 'MixUp'"),
    (
        "train demo data.local=ds algorithms.EMA={smoothing:",
        "algorithms.EMA must be a value that yaml",
        "Close its brack",
    ),
    (
        "train demo data.local=ds global_train_batch_size=0",
        "global_train_batch_size must be 1 or more",
        "DeiT uses 1024",
    ),
    ("train demo data.local=ds global_train_batch_size=64", "must be at most 14, the number of training", "=7 or less"),
    ("train demo data.local=ds global_train_batch_size", "must be of the form key=value", "Write it like"),
    ("train demo data.local=ds max_durations=3ep", "max_durations is no key", "Did you mean max_duration"),
    ("train demo data.local=ds parallelism=ddp", "parallelism is no key", "Did you mean run.parallelism"),
    ("train demo data.local=ds data.num_workers=-3", "data.num_workers must be 0 or more", "0 loads in the main"),
    ("train demo data.local=ds seed=abc", "seed must be a whole number, got 'abc'", "Write it like 8"),
    ("train demo data.local=ds --gpus 0", "--gpus must be 1 or more, got 0", "Leave it out"),
    ("train demo data.local=ds run.remote=ftp://x/y", "run.remote must be null or an address", "Write it like s3://"),
    (
        "train demo data.remote=s3://AKIA:secret@bucket/x",
        "data.remote must be an address without",
        "from the environment",
    ),
    ("train demo data.local=ds recipe=swave", "recipe", "Did you mean"),
    (
        "train finetune_photos data.local=ds",
        "init.weights must be a file .*'weights/deit_3",
        "`vitcomposer weights deit_3",
    ),
    (
        "train finetune_photos data.local=ds init.weights=no.pth",
        "init.weights must be .*'no.pth'",
        "set init.weights=null",
    ),
    ("train deit_s_distilled data.local=ds", "teacher.weights must be a file", "`vitcomposer weights regnety"),
    ("check demo data.local=ds optimzer.lr=1 model.nme=3", "4 keys cannot be used", "Did you mean model.name"),
    ("show deit_x", "no recipe 'deit_x'", "Did you mean 'deit_s'"),
    ("show", "required: name", "`vitcomposer show --help`"),
    ("copy demo there.yaml", "there.yaml is there, and is not written over", "Choose another name"),
    ("copy deit mine.yaml", "no recipe 'deit'", "Did you mean 'deit_"),
    ("list deit", "unrecognized arguments: deit", "`vitcomposer list --help`"),
    ("new nowhere", "nowhere must be a folder", "no such folder"),
    ("new empty", "empty must hold", ""),
    ("new photos --out there.yaml", "--out must be a file that is not there yet", "choose another"),
    (
        "weights deit_3_small",
        "must be one of the published weights, got 'deit_3_small'",
        "Did you mean 'deit_3_small_2",
    ),
    ("convert folder nowhere out", "nowhere must be a folder", "no such folder"),
    ("convert folder photos", "required: out", "`vitcomposer convert folder --help`"),
    ("convert folders photos out", "invalid choice: 'folders'", "Did you mean 'folder'"),
    ("convert folder photos out --part 3", "--parts must be given with --part", "Give the number of parts"),
    ("convert folder photos out --quality 300", "--quality must be a JPEG quality from 1 to 100", "95 is usual"),
    ("convert torchvision CIFAR11 out", "no data set 'CIFAR11'", "Did you mean 'CIFAR10'"),
    ("inspect nowhere", "must be an index.json in nowhere", "check the path, or convert"),
    ("inspect photos", "must be an index.json in photos", "check the path, or convert"),
    ("eval nowhere --data ds", "no nowhere", "Give a run folder"),
    ("eval empty", "required: --data", "`vitcomposer eval --help`"),
    ("predict empty", "required: INPUT\\.", "`vitcomposer predict --help`"),
    ("predict empty photos", "empty must be a run folder", "config.yaml, checkpoints"),
    ("predict empty nowhere.jpg", "no nowhere.jpg", "must be an image, a folder"),
    ("predict empty photos --format xml", "invalid choice: 'xml'", "csv"),
    ("export empty", "required: --out", "`vitcomposer export --help`"),
    ("export nowhere --out x", "no nowhere", "Give a run folder"),
    ("export empty --out x --format onxx", "invalid choice: 'onxx'", "Did you mean 'onnx'"),
    ("soup empty --out x", "must be two or more models", "Name more, or add --last"),
    ("plan deit_s --gpu h900", "--gpu must be one of .*, got 'h900'", "Did you mean 'h"),
    ("plan deit_s --gpu h100 --gpus 0", "--gpus must be 1 or more", "Use 8"),
    ("bench demo data.local=nowhere", "data.local must be a folder", "`vitcomposer convert`"),
    ("launch slrm deit_s", "invalid choice: 'slrm'", "Did you mean 'slurm'"),
    ("launch slurm deit_s --out x.sbatch", "required: --gpus-per-node", "`vitcomposer launch slurm --help`"),
    ("report nowhere", "nowhere", "Give the folder"),
    ("report photos", "photos", "Give the folder"),
    ("attention empty", r"required: IMAGE, --out\.", "`vitcomposer attention --help`"),
    ("doctor now", "unrecognized arguments: now", "`vitcomposer doctor --help`"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of two classes, their data set ``ds``, and files that are something else."""
    desk = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (desk / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(desk / "photos" / name / f"{i}.jpg")
    (desk / "empty").mkdir()
    (desk / "notes.txt").write_text("hello\n")
    (desk / "broken.yaml").write_text("recipe: [supervised\n")
    (desk / "there.yaml").write_text("recipe: supervised\n")
    assert cli.main(["convert", "folder", str(desk / "photos"), str(desk / "ds"), "--workers", "1"]) == 0
    return desk


@pytest.fixture
def say(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """What a command prints as its error, which exits with 2 and leaves no file."""

    def run(line: str) -> str:
        monkeypatch.chdir(desk)
        before = sorted(desk.rglob("*"))
        try:
            code: object = cli.main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and sorted(desk.rglob("*")) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(("line", "cause", "remedy"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_is_answered_by_its_cause_and_a_remedy(
    line: str, cause: str, remedy: str, say: Callable[[str], str]
) -> None:
    said = say(line)
    assert said.count("error: ") == 1 and "Traceback" not in said and "Errno" not in said
    error = " ".join(said[said.index("error: ") :].split())  # several keys are a table
    assert re.search(cause, error) and remedy in error
    assert "secret" not in said
