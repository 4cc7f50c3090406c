"""SwAV, SimCLR, MoCo-v3 and DINO through their recipes: resuming, two ranks, frozen parameters, averages, bad input."""

import dataclasses
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from composer import Callback
from torch._dynamo.utils import counters

from recipes import RECIPES
from tests.conftest import ROOT, run_train
from tests.training.test_compile import HAS_COMPILER
from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.schema.ranks import adjustments, check_ranks, sync_bn_ranks
from vitcomposer.training.fit import fit

METHODS = ("swav", "simclr", "moco", "dino")
STEPS = 5


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mds") / "digits"
    command = [sys.executable, "-m", "vitcomposer", "convert", "digits", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120, capture_output=True)
    return out


def page(method: str) -> str:
    return str(ROOT / ("yamls/swav_demo.yaml" if method == "swav" else f"tests/self_supervised/{method}_digits.yaml"))


def tiny(method: str, digits: Path, runs: Path, name: str) -> list[str]:
    """A few steps of a network of one block; an epoch has 89 of them."""
    overrides = [
        f"data.local={digits}",
        "data.num_workers=0",
        "global_train_batch_size=16",
        "optimizer.lr_scaling=none",
        f"max_duration={STEPS}ba",
        "schedule.t_warmup=1ba",
        "model.depth=1",
        "model.image_size=16",
        "monitor=null",
        f"run.folder={runs}",
        f"run.name={name}",
        "run.log_interval=1ba",
        "run.save_interval=3ba",
        "run.progress_bar=false",
        "sync_bn=global",
    ]
    if method == "swav":
        queue = ["loss.queue_length=32", "loss.queue_start_epoch=0", f"loss.freeze_prototypes_epochs={3 / 89}"]
        overrides += ["crops.size_crops=[16,8]", f"loss.hard_assignment_epochs={1 / 89}", *queue]
    return overrides


def logged(run: Path, name: str = "loss/train/total") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


class Stopped(Exception):
    pass


class Watch(Callback):
    """Keeps copies of what a task holds after every step, and may end the run like a kill."""

    def __init__(self, prefixes: tuple[str, ...] = (), stop_after: int | None = None) -> None:
        self.prefixes, self.stop_after = prefixes, stop_after
        self.kept: list[dict[str, torch.Tensor]] = []

    def fit_start(self, state, logger):
        self.keep(state)

    def batch_end(self, state, logger):
        self.keep(state)
        if self.stop_after is not None and state.timestamp.batch == self.stop_after:
            raise Stopped

    def keep(self, state) -> None:
        tensors = state.model.state_dict().items()
        self.kept.append({name: t.clone() for name, t in tensors if name.startswith(self.prefixes)})


def train_watched(argv: list[str], watch: Callback) -> None:
    cfg = config.load(argv[0], argv[1:])
    trainer = RECIPES[cfg.recipe].build(cfg)
    trainer.state.callbacks.append(watch)
    fit(trainer, cfg)


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of every method on one rank."""
    runs = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        assert run_train([page(method), *tiny(method, digits, runs, method)]) == 0
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_killed_run_goes_on_with_the_same_losses(method: str, reference: Path, digits: Path, tmp_path: Path) -> None:
    """Stopped after step 4, it starts again from the checkpoint of step 3: queue, center, averages and moments."""
    argv = [page(method), *tiny(method, digits, tmp_path, method)]
    with pytest.raises(Stopped):
        train_watched(argv, Watch(stop_after=4))
    assert run_train(argv) == 0
    assert len(logged(tmp_path / method)) == STEPS
    assert logged(tmp_path / method) == logged(reference / method)


@pytest.mark.parametrize("method", METHODS)
def test_average_that_nothing_measures_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="algorithms.EMA must be left out of a recipe without labels"):
        config.load(page(method), ["algorithms.EMA={smoothing: 0.99, update_interval: 1ba}"])


def test_two_ranks_have_the_losses_of_one(reference: Path, digits: Path, tmp_path: Path) -> None:
    argv = [str(tmp_path / "runs"), str(digits)]
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "-m", "tests.self_supervised.two_ranks"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more of them than cores wait for each other
    done = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=280, env=one_thread)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for method in METHODS:
        assert logged(tmp_path / "runs" / method) == pytest.approx(logged(reference / method), abs=1e-5), method
    two, one = (logged(runs / "swav", "swav/prototype_usage") for runs in (tmp_path / "runs", reference))
    assert two == pytest.approx(one, abs=1e-3), "counted over both ranks"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # both passes run as the graphs that they became
        pytest.param(  # as machine code
            "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")]
        ),
    ],
)
@pytest.mark.parametrize(("method", "graphs"), [("swav", 2), ("dino", 3)])
def test_compiled_trunks_have_a_graph_for_each_crop_size_and_the_losses_of_eager(  # noqa: PLR0913
    method: str,
    graphs: int,
    backend: str,
    reference: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DINO's teacher has one more. The monitor, whose batches have other sizes, adds none."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    # Listening to torch's trace of its own compiler takes longer than the compiler.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    counters.clear()
    overrides = [each for each in tiny(method, digits, tmp_path, "compiled") if each != "monitor=null"]
    monitor = ["monitor.interval=4ba", "monitor.train_samples=40"]
    with torch._inductor.config.patch(compile_threads=1):  # no pool, whose start takes longer
        assert run_train([page(method), *overrides, *monitor, "run.compile=true"]) == 0
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    rounding = 1e-5 if backend == "aot_eager" else 1e-4
    assert logged(tmp_path / "compiled") == pytest.approx(logged(reference / method), rel=rounding)
    torch._dynamo.reset()


class Workers(Callback):
    def __init__(self) -> None:
        self.alive: list[set[int | None]] = []

    def batch_end(self, state, logger):
        self.alive.append({child.pid for child in multiprocessing.active_children()})


def test_monitor_has_its_workers_before_the_first_step_and_ends_them(digits: Path, tmp_path: Path) -> None:
    overrides = [each for each in tiny("swav", digits, tmp_path, "workers") if each != "monitor=null"]
    monitor = ["monitor.interval=1ba", "monitor.train_samples=20", "data.num_workers=1"]
    for steps in (3, 5):  # the second goes on from the checkpoint of the first
        workers = Workers()
        train_watched([page("swav"), *overrides, *monitor, f"max_duration={steps}ba"], workers)
        assert len(workers.alive) == (3 if steps == 3 else 2)
        assert len(workers.alive[0]) == 3 and all(alive == workers.alive[0] for alive in workers.alive)
        assert not workers.alive[0] & {child.pid for child in multiprocessing.active_children()}


def test_prototypes_are_frozen_bit_for_bit_then_learn(digits: Path, tmp_path: Path) -> None:
    watch = Watch(("head.prototypes0",))
    train_watched([page("swav"), *tiny("swav", digits, tmp_path, "frozen")], watch)
    weights = [kept["head.prototypes0.weight"] for kept in watch.kept]  # before step 0, after it, ...
    assert all(torch.equal(weight, weights[0]) for weight in weights[:4]), "frozen for 3 steps"
    assert not torch.equal(weights[4], weights[3])
    torch.testing.assert_close(weights[0].norm(dim=1), torch.ones(len(weights[0])))


def test_last_layer_of_dino_is_frozen_then_learns(digits: Path, tmp_path: Path) -> None:
    watch = Watch(("head.last_layer",))
    overrides = [f"loss.freeze_last_layer_epochs={2 / 89}", "max_duration=4ba"]
    train_watched([page("dino"), *tiny("dino", digits, tmp_path, "frozen"), *overrides], watch)
    weights = [kept["head.last_layer.direction"] for kept in watch.kept]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])


@pytest.mark.parametrize(("method", "average"), [("moco", "momentum_trunk"), ("dino", "teacher_trunk")])
def test_average_follows_the_trunk_along_the_cosine(method: str, average: str, digits: Path, tmp_path: Path) -> None:
    watch = Watch(("trunk.", f"{average}."))
    train_watched([page(method), *tiny(method, digits, tmp_path, "average"), "loss.momentum=0.9"], watch)
    names = [name.removeprefix("trunk.") for name in watch.kept[0] if name.startswith("trunk.")]
    for name in names:
        expected = watch.kept[0][f"trunk.{name}"].double()
        for step, kept in enumerate(watch.kept[1:], start=1):
            momentum = 1 - 0.1 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item()) / 2
            expected = momentum * expected + (1 - momentum) * kept[f"trunk.{name}"].double()
            torch.testing.assert_close(kept[f"{average}.{name}"].double(), expected, atol=1e-6, rtol=1e-5)


def test_momentum_encoder_is_in_no_optimizer(digits: Path, tmp_path: Path) -> None:
    cfg = config.load(page("moco"), tiny("moco", digits, tmp_path, "parts"))
    trainer = RECIPES["moco"].build(cfg)
    held = {id(p) for group in trainer.state.optimizers[0].param_groups for p in group["params"]}
    parameters = dict(trainer.state.model.named_parameters())
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    assert {name for name, p in parameters.items() if id(p) not in held} == frozen
    patch = {"trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias"}
    assert {name for name in frozen if not name.startswith("momentum_")} == patch
    trainer.close()


WITHOUT_LABELS = re.compile(rf"^recipe: ({'|'.join(METHODS)})$", re.M)
YAMLS = [path for path in sorted((ROOT / "yamls").glob("*.yaml")) if WITHOUT_LABELS.search(path.read_text())]


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_yaml_header_states_the_counted_flops(path: Path) -> None:
    cfg = config.load(path)
    with torch.device("meta"):
        flops = RECIPES[cfg.recipe].build_task(cfg).train_flops_per_image(cfg.crops.sizes)
    stated = re.search(r"Cost: ([\d.]+) GFLOP an image", path.read_text())
    assert stated is not None
    assert float(stated[1]) == pytest.approx(flops / 1e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
def test_digits_are_told_apart_without_labels(method: str, digits: Path, tmp_path: Path) -> None:
    overrides = [f"data.local={digits}", f"run.folder={tmp_path}", "run.name=demo", "run.progress_bar=false"]
    assert run_train([page(method), *overrides]) == 0
    rows = [json.loads(line) for line in (tmp_path / "demo/metrics.jsonl").read_text().splitlines()]
    top1 = [row["knn/top1_k20"] for row in rows if "knn/top1_k20" in row]
    assert top1[-1] >= top1[0] + 0.15
    if method == "swav":
        assert rows[-1]["swav/prototype_usage"] > 0.8


@pytest.mark.parametrize(
    ("sync_bn", "ranks", "size", "said"),
    [
        (8, 1, 1, "of the 1 ranks that there are"),
        (8, 3, 3, "of the 3 ranks that there are"),
        (2, 5, 2, "the last 1 are a smaller group"),
        (8, 16, 8, None),
        (0, 16, 16, None),
        (-1, 16, 4, None),
        ("node", 16, 4, None),
        ("global", 16, 16, None),
        ("none", 16, 1, None),
    ],
)
def test_ranks_that_share_batch_norms_are_as_in_vissl(sync_bn: str | int, ranks: int, size: int, said: str) -> None:
    cfg = config.load(page("swav"), [f"sync_bn={sync_bn}", "global_train_batch_size=240"])
    assert cfg.sync_bn == sync_bn
    check_ranks(cfg, ranks, 4)
    assert sync_bn_ranks(cfg.sync_bn, ranks, ranks_of_node=4) == size
    lines = adjustments(cfg, ranks)
    assert lines == [] if said is None else said in lines[0]


def test_queue_keeps_whole_batches_and_says_so(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*tiny("swav", digits, tmp_path, "queue"), "loss.queue_length=47", "sync_bn=8"]
    cfg = config.load(page("swav"), given)
    assert cfg.loss.queue_length == 47 and cfg.queue_length == 32
    assert run_train([page("swav"), *given]) == 0
    printed = capsys.readouterr().out
    assert "loss.queue_length=47: the queue keeps 32, whole batches of 16." in printed
    assert "sync_bn=8: of the 1 ranks that there are, all share their batch norms." in printed


def test_moco_needs_two_images_for_each_batch_norm() -> None:
    cfg = config.load(page("moco"), ["global_train_batch_size=8", "sync_bn=none", "optimizer.lr_scaling=none"])
    check_ranks(cfg, 4, 4)
    with pytest.raises(ConfigError, match="global_train_batch_size must be two or more images"):
        check_ranks(cfg, 8, 8)
    check_ranks(dataclasses.replace(cfg, sync_bn="global"), 8, 8)


BAD = {
    "sum of crops": ("swav", ["crops.total_num_crops=5"], ["crops.total_num_crops", "6", "5"]),
    "one size short": ("swav", ["crops.size_crops=[16]"], ["crops.size_crops", "2", "1"]),
    "empty scale": ("swav", ["crops.crop_scales=[[0.4,1.0],[0.5,0.2]]"], ["crops.crop_scales", "[0.5, 0.2]"]),
    "size off the patch grid": ("swav", ["crops.size_crops=[16,10]"], ["crops.size_crops", "4", "10"]),
    "queue below a batch": ("swav", ["loss.queue_length=8"], ["loss.queue_length", "16", "8"]),
    "crop without code": ("swav", ["loss.crops_for_assign=[0,6]"], ["loss.crops_for_assign", "6"]),
    "codes of two sizes": ("swav", ["loss.crops_for_assign=[0,2]"], ["loss.crops_for_assign", "one size"]),
    "head of another width": ("swav", ["head.dims=[384,128]"], ["head.dims", "64", "384"]),
    "microbatch": ("swav", ["run.device_train_microbatch_size=8"], ["run.device_train_microbatch_size", "16", "8"]),
    "one image a step in SimCLR": ("simclr", ["global_train_batch_size=1"], ["global_train_batch_size", "2 or more"]),
    "one image a step in MoCo-v3": ("moco", ["global_train_batch_size=1"], ["global_train_batch_size", "2 or more"]),
    "group by no name": ("swav", ["sync_bn=all"], ["sync_bn", "global", "all"]),
    "neighbours of no image": ("swav", ["monitor={k: [0], temperature: 0.07}"], ["monitor.k", "1", "[0]"]),
    "classes": ("simclr", ["model.num_classes=10"], ["model.num_classes", "0", "10"]),
    "three views": ("simclr", ["crops.num_crops=[3]", "crops.total_num_crops=3"], ["crops.num_crops", "two crops"]),
    "predictor of another width": ("moco", ["head.predictor_dims=[32,64,32]"], ["head.predictor_dims", "64"]),
    "teacher's crops of two sizes": (
        "dino",
        ["crops.num_crops=[1,5]"],
        ["crops.size_crops", "[16, 8]"],
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.replace(" ", "-"))
def test_bad_input_ends_with_one_clear_error(
    case: str, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    method, overrides, words = BAD[case]
    assert run_train([page(method), *tiny(method, digits, tmp_path, "bad"), *overrides]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0], f"{word!r} is not in {errors[0]!r}"
