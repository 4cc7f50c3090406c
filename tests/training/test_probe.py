"""Features by name, linear heads on a frozen trunk, k-NN and low-shot splits, through the real Trainer."""

import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from composer import Trainer
from composer.models import ComposerModel
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import PHOTOS, ROOT, TRAIN_PER_CLASS, run_train
from vitcomposer import optim
from vitcomposer.callbacks import StepSeed
from vitcomposer.data.conversion.subset import write_subset
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model, load_weights
from vitcomposer.models.features import FrozenFeatures
from vitcomposer.tasks import Head, LinearProbeTask

SMALL: dict[str, Any] = {"depth": 5, "embed_dim": 32, "num_heads": 4}
NAMES = ["lastCLS", "concatCLS4", "concatCLS2", "mean", "pooled"]


def trunk(name: str = "deit_tiny_patch16", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(name, num_classes=0, image_size=32, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_features_are_those_of_timm() -> None:
    reference: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=5, embed_dim=32, num_heads=4
    ).eval()
    model = build_model("vit_tiny_patch16", num_classes=0, image_size=32, **SMALL)
    load_weights(model, reference.state_dict())
    images = torch.randn(3, 3, 32, 32)
    layers: Any = reference.forward_intermediates(
        images, indices=4, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    tokens = [prefix[:, 0] for _, prefix in layers]
    found = FrozenFeatures(model, NAMES)(images)
    torch.testing.assert_close(found["lastCLS"], tokens[-1])
    torch.testing.assert_close(found["concatCLS4"], torch.cat(tokens, dim=1))
    torch.testing.assert_close(found["concatCLS2"], torch.cat(tokens[-2:], dim=1))
    torch.testing.assert_close(found["mean"], layers[-1][0].mean(dim=1))
    torch.testing.assert_close(found["pooled"], reference(images))


def test_convit_has_class_tokens_in_its_last_blocks_only() -> None:
    model = trunk("convit_tiny", local_up_to_layer=3)
    images = torch.randn(2, 3, 32, 32)
    found = FrozenFeatures(model, ["concatCLS2", "mean", "pooled"])(images)
    assert found["concatCLS2"].shape == (2, 64)
    torch.testing.assert_close(found["concatCLS2"][:, 32:], found["pooled"])
    with pytest.raises(ConfigError, match="at most the 2 blocks .* got 'concatCLS4'. Use concatCLS2"):
        FrozenFeatures(model, ["concatCLS4"])


@pytest.mark.parametrize(
    ("name", "error"),
    [("lastClS", "got 'lastClS'"), ("concatCLS9", "at most the 5"), ("concatCLS0", "must be lastCLS")],
)
def test_unknown_features_are_refused(name: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        FrozenFeatures(trunk(), [name])


def test_resnet_has_its_pooled_feature() -> None:
    model = build_model("resnet18", num_classes=0, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    features = FrozenFeatures(model, ["pooled"])
    assert torch.equal(features(images)["pooled"], model(images)) and features.widths == {"pooled": 512}
    with pytest.raises(ConfigError, match="must be pooled for a ResNet, got 'mean'"):
        FrozenFeatures(model, ["mean"])


def train(heads: list[Head], steps: int = 6) -> LinearProbeTask:
    task = LinearProbeTask(trunk(drop_path_rate=0.5), heads, num_classes=4).train()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    task.apply_lr_factors(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = {
            "image": torch.randn(8, 3, 32, 32, generator=generator),
            "label": torch.randint(4, (8,), generator=generator),
        }
        optimizer.zero_grad()
        task.loss(task(batch), batch).backward()
        optimizer.step()
    return task


HEADS = [
    Head("lastCLS", 1.0, False),
    Head("concatCLS4", 0.1, True),
    Head("mean", 10.0, False),
    Head("lastCLS", 3.0, True),
]


def test_heads_together_learn_what_each_learns_alone() -> None:
    together = train(HEADS)
    for index, head in enumerate(HEADS):
        alone = train([head]).classifiers[0].state_dict()
        found = together.classifiers[index].state_dict()
        assert all(torch.equal(alone[key], found[key]) for key in alone), head.name
        assert found[f"{1 if head.batch_norm else 0}.weight"].abs().max() > 0, "it learned"


def test_trunk_stays_as_it_was_in_evaluation_mode() -> None:
    before = trunk(drop_path_rate=0.5).state_dict()
    task = train(HEADS)
    assert all(torch.equal(before[key], value) for key, value in task.trunk.state_dict().items())
    assert task.classifiers.training and not any(module.training for module in task.trunk.modules())
    assert not any(parameter.requires_grad for parameter in task.trunk.parameters())


def test_accuracies_name_every_head_and_the_best() -> None:
    task = LinearProbeTask(trunk(), HEADS[:2], num_classes=4)
    labels = torch.tensor([0, 1, 2, -100])
    right, wrong = torch.eye(4), torch.eye(4).roll(1, 0)
    wrong[0] = right[0]
    metrics = task.get_metrics()
    for metric in metrics.values():
        task.update_metric({"label": labels}, [wrong, right], metric)  # pyright: ignore[reportArgumentType]
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found == {"top1_lastCLS_lr1": pytest.approx(1 / 3), "top1_concatCLS4_bn_lr0.1": 1.0, "top1": 1.0}


def overrides(mds: Path, runs: Path, name: str) -> list[str]:
    model = ["model.image_size=32", "model.patch_size=8", "model.embed_dim=48", "model.depth=4", "model.num_heads=3"]
    return [
        f"data.local={mds}",
        "data.num_workers=0",
        f"run.folder={runs}",
        f"run.name={name}",
        "precision=fp32",
        *model,
    ]


LINEAR = [str(ROOT / "yamls/probe_linear.yaml")]
SHORT = [
    "max_duration=3ep",
    "global_train_batch_size=16",
    "run.eval_interval=1ep",
    f"model.num_classes={len(PHOTOS)}",
    "optimizer.lr=0.01",
    "heads.lr_factors=[1,10]",
]


def test_linear_probe_reports_each_head_and_the_best(photo_mds: Path, tmp_path: Path) -> None:
    assert run_train([*LINEAR, *overrides(photo_mds, tmp_path, "linear"), *SHORT]) == 0
    rows = [json.loads(line) for line in (tmp_path / "linear/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "metrics/eval/top1" in row][-1]
    heads = {key: value for key, value in last.items() if key.startswith("metrics/eval/top1_")}
    assert len(heads) == 3 * 2 * 2 and "metrics/eval/top1_concatCLS4_bn_lr10" in heads
    summary = json.loads((tmp_path / "linear/summary.json").read_text())
    assert summary["recipe"] == "probe" and summary["top1"] == max(heads.values()) > 2 / len(PHOTOS)


def test_compiled_probe_is_one_graph_with_the_same_accuracies(
    photo_mds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    found = {}
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        torch._dynamo.reset()
        counters.clear()
        page = [*LINEAR, *overrides(photo_mds, tmp_path, name), *SHORT, "max_duration=1ep"]
        assert run_train([*page, f"run.compile={compiled}"]) == 0
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["top1"]
    assert counters["stats"]["unique_graphs"] == 2, "training and evaluation"
    assert found["compiled"] == found["eager"]
    torch._dynamo.reset()


def knn_of(photos: Path, tmp_path: Path, name: str, *more: str) -> dict[str, Any]:
    page = str(ROOT / "yamls/probe_knn.yaml")
    size = ["evaluation.global_batch_size=16", "knn.k=[1,5]"]
    assert run_train([page, *overrides(photos, tmp_path, name), *size, *more]) == 0
    return json.loads((tmp_path / name / "summary.json").read_text())


def test_knn_recipe_writes_the_accuracy_of_each_k(photo_mds: Path, tmp_path: Path) -> None:
    summary = knn_of(photo_mds, tmp_path, "knn")
    assert summary["recipe"] == "knn" and summary["steps"] == 0 and summary["finished"]
    found = summary["knn"]
    assert found.keys() == {"top1", "top1_k1", "top5_k1", "top1_k5", "top5_k5"}
    assert found["top1"] == max(found["top1_k1"], found["top1_k5"]) > 2 / len(PHOTOS)
    assert knn_of(photo_mds, tmp_path, "knn")["knn"] == found, "again in the same folder"
    with_fewer = knn_of(photo_mds, tmp_path, "fewer", "knn.train_samples=40")
    assert with_fewer["knn"] != found


def test_more_neighbours_than_images_are_refused(photo_mds: Path, tmp_path: Path, capsys: Any) -> None:
    page = str(ROOT / "yamls/probe_knn.yaml")
    assert run_train([page, *overrides(photo_mds, tmp_path, "many"), "evaluation.global_batch_size=16"]) == 2
    assert f"knn.k must be at most {len(PHOTOS) * TRAIN_PER_CLASS}" in capsys.readouterr().err


class _Pretraining(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = build_model(
            "vit_small_patch16",
            num_classes=0,
            image_size=32,
            patch_size=8,
            embed_dim=48,
            depth=4,
            num_heads=3,
        )
        self.head = torch.nn.Linear(48, 3)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(self.trunk(batch[0]))

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, batch[1])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that Composer wrote of a pre-training run."""
    torch.manual_seed(7)
    folder, task = tmp_path_factory.mktemp("pretrained"), _Pretraining()
    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    trainer = Trainer(
        model=task,
        train_dataloader=DataLoader(images, batch_size=4),
        optimizers=torch.optim.AdamW(task.parameters(), lr=1e-3),
        schedulers=optim.CosineWithWarmup("0ba", alpha_i=1, alpha_f=0, cosine_from="start", global_train_batch_size=4),
        callbacks=[StepSeed(0)],
        max_duration="1ep",
        save_folder=str(folder),
        save_latest_filename="latest-rank{rank}.pt",
        device="cpu",
        seed=0,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return folder / "latest-rank0.pt"


def trunk_in(path: Path, prefix: str) -> dict[str, Tensor]:
    # Our own checkpoints, just written by this test.
    state = torch.load(path, map_location="cpu", weights_only=False)["state"]["model"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def test_checkpoint_of_a_run_goes_into_each_recipe_with_one_override(
    pretrained: Path, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = f"init.weights={pretrained}"
    new = knn_of(photo_mds, tmp_path, "new")["knn"]
    assert knn_of(photo_mds, tmp_path, "knn", weights)["knn"] != new
    assert "54 tensors loaded, 100.0% of the model without its head" in capsys.readouterr().out
    assert run_train([*LINEAR, *overrides(photo_mds, tmp_path, "linear"), *SHORT, "max_duration=1ba", weights]) == 0
    assert "in the source but not in the model: head.bias, head.weight" in capsys.readouterr().out
    source = trunk_in(pretrained, "trunk.")
    probed = trunk_in(tmp_path / "linear/checkpoints/latest-rank0.pt", "frozen.trunk.")
    assert source.keys() == probed.keys() and all(torch.equal(source[key], probed[key]) for key in source)
    deit = [str(ROOT / "yamls/deit_s.yaml"), *overrides(photo_mds, tmp_path, "deit"), weights]
    tiny = ["max_duration=1ba", "schedule.t_warmup=0ba", "global_train_batch_size=16", "optimizer.lr=1e-9"]
    assert run_train([*deit, *tiny, f"model.num_classes={len(PHOTOS)}"]) == 0
    assert "left as initialised, not in the source: head.weight, head.bias" in capsys.readouterr().out
    tuned = trunk_in(tmp_path / "deit/checkpoints/latest-rank0.pt", "model.")
    for key in source:
        torch.testing.assert_close(tuned[key], source[key], rtol=1e-4, atol=1e-6)


def test_weights_of_another_model_are_refused(
    pretrained: Path, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = [*LINEAR, *overrides(photo_mds, tmp_path, "other"), *SHORT]
    assert run_train([*page, f"init.weights={pretrained}", "model.depth=6"]) == 2
    assert "latest-rank0.pt fills" in capsys.readouterr().err
    assert run_train([*page, "init.weights=runs/absent.pt"]) == 2
    assert "absent.pt" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(photo_mds: Path, tmp_path: Path) -> None:
    size = ["evaluation.global_batch_size=16", "knn.k=[1,5]", "knn.train_samples=101"]
    composer = [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py"]
    command = [*composer, str(ROOT / "yamls/probe_knn.yaml"), *overrides(photo_mds, tmp_path, "two"), *size]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more of them than cores wait for each other
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False, env=one_thread)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    two = json.loads((tmp_path / "two/summary.json").read_text())
    assert two["world_size"] == 2
    assert two["knn"] == pytest.approx(knn_of(photo_mds, tmp_path, "one", "knn.train_samples=101")["knn"])


def test_any_recipe_trains_on_a_low_shot_split(photo_mds: Path, tmp_path: Path) -> None:
    shutil.copytree(photo_mds, tmp_path / "mds")
    write_subset(tmp_path / "mds", "train_10pct", fraction=0.1, seed=3)
    part = [*overrides(tmp_path / "mds", tmp_path, "part"), *SHORT, "data.train_split=train_10pct", "max_duration=2ep"]
    assert run_train([*LINEAR, *part]) == 0
    assert json.loads((tmp_path / "part/summary.json").read_text())["images_seen"] == 2 * 16
