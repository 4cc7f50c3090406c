"""Every yaml at its real size: two steps through its recipe, the first loss against timm's network, its stated cost."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from composer import Callback, Trainer
from torch import Tensor

from recipes import RECIPES
from tests.conftest import ROOT
from tests.data.mds.test_stream import write_split
from vitcomposer import cli, config
from vitcomposer.cost import headers
from vitcomposer.cost.estimate import costs_of
from vitcomposer.cost.flops import forward_flops
from vitcomposer.models import build_model
from vitcomposer.schema.pages import read_page
from vitcomposer.shipped import RESULTS
from vitcomposer.teacher.writer import write_cache
from vitcomposer.training.fit import fit

YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
PLANNED = [p for p in YAMLS if headers.is_planned(p)]
BATCH = 2  # images a step, which batch norms and contrastive losses need at least


def overrides_of(path: Path, folder: Path) -> list[str]:
    """Two steps of a few synthetic images on a CPU, both at the peak or half of it; all else stays as in the yaml."""
    page = config.load(path)
    size = ["evaluation.global_batch_size"] if page.recipe == "knn" else ["global_train_batch_size"]
    changes = ["data.source=synthetic", "data.local=null", f"data.synthetic_samples={2 * BATCH}", "data.num_workers=0"]
    changes += ["precision=fp32", f"{size[0]}={BATCH}", "optimizer.lr_scaling=none", "schedule.cosine_from=start"]
    changes += ["max_duration=2ba", "schedule.t_warmup=0ba", f"run.folder={folder}", "run.log_interval=1ba"]
    changes += ["run.save_interval=2ba", "run.keep_checkpoints=1", "run.compile=false", "run.progress_bar=false"]
    changes += ["init.weights=null"]
    if page.recipe == "knn":
        changes = [c for c in changes if c.split(".")[0] not in ("optimizer", "schedule", "max_duration=2ba")]
        changes += [f"knn.k=[{BATCH}]"]
    if page.recipe in ("swav", "simclr", "moco", "dino"):
        changes += ["monitor=null", "sync_bn=none"]
    # What learns later than in the first epoch, which these two steps are.
    late = {"swav": "loss.freeze_prototypes_epochs=0", "dino": "loss.freeze_last_layer_epochs=0"}
    changes += [late[page.recipe]] if page.recipe in late else []
    if "Curriculum" in getattr(page, "algorithms", {}):
        # Two steps have room for two stages; at 96 pixels an image costs 0.17 to 0.18 of one at 224.
        size, patch = page.model.image_size, page.model.patch_size or 16
        first = int(0.43 * size / patch) * patch
        changes += [f"algorithms.Curriculum={{image_sizes: [{first}, {size}], compute: [0.15, 0.85]}}"]
    return changes


def with_teacher(path: Path, changes: list[str], folder: Path) -> list[str]:
    """Weights of a teacher of the real size that knows nothing, and its stored answers where the yaml reads them."""
    page = config.load(path)
    torch.save(timm.create_model(page.teacher.name, num_classes=1000).state_dict(), folder / "teacher.pth")
    changes = [*changes, f"teacher.weights={folder / 'teacher.pth'}"]
    if page.cache is None:
        return changes
    for split in ("train", "val"):
        write_split(folder / "data" / split, 2 * BATCH)
    real = [c for c in changes if not c.startswith("data.")]
    real += [f"data.local={folder / 'data'}", "data.num_workers=0", f"cache.local={folder / 'cache'}"]
    write_cache(config.load(path, real), folder / "cache", crop_sets=1, top_k=10, batch_size=BATCH)
    return real


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_yaml_takes_two_steps_at_its_real_size_and_every_parameter_learns(path: Path, tmp_path: Path) -> None:
    changes = overrides_of(path, tmp_path)
    if "recipe: distill\n" in path.read_text():
        changes = with_teacher(path, changes, tmp_path)
    cfg = config.load(path, changes)
    trainer = RECIPES[cfg.recipe].build(cfg)
    learning = {name: p for name, p in trainer.state.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learning.items()}
    fixed = {name: p for name, p in trainer.state.model.named_parameters() if not p.requires_grad}
    at_start = {name: p.detach().clone() for name, p in fixed.items()}
    assert fit(trainer, cfg) == 0
    run = tmp_path / path.stem
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True and summary["mfu"] is None
    for checkpoint in (run / "checkpoints").glob("*"):  # those of the large models are gigabytes
        checkpoint.unlink()
    if cfg.recipe == "knn":
        assert summary["steps"] == 0 and not learning
        return
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert summary["steps"] == 2 and summary["images_seen"] == 2 * BATCH and summary["train_flops"] > 0
    # The softmax of the positional scores cancels their bias, see GPSA.
    still = [name for name, p in learning.items() if torch.equal(p, before[name]) and "pos_proj.bias" not in name]
    assert still == []
    averages = ("momentum_", "teacher_")
    assert [n for n, p in fixed.items() if not n.startswith(averages) and not torch.equal(p, at_start[n])] == []


class FirstStep(Callback):
    """Images, targets and weights that the first loss comes from, and that loss."""

    def __init__(self) -> None:
        self.images = self.targets = self.loss = torch.empty(0)
        self.weights: dict[str, Tensor] = {}

    def before_forward(self, state: Any, logger: Any) -> None:
        self.images, self.targets = state.batch["image"].clone(), state.batch["target"].clone()
        self.weights = {name: value.clone() for name, value in state.model.model.state_dict().items()}

    def after_loss(self, state: Any, logger: Any) -> None:
        self.loss = state.loss.detach().clone()


TIMMS = {
    "deit_ti": ("deit_tiny_patch16_224", {}),
    "convit_ti": ("convit_tiny", {}),
    "deit3_s": ("deit3_small_patch16_224", {}),
    "vit_s": ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": False, "class_token": False}),
}


@pytest.mark.parametrize("name", TIMMS)
def test_first_loss_is_that_of_timms_network_on_the_same_images_and_weights(name: str, tmp_path: Path) -> None:
    """At the yaml's size, with its loss written out; stochastic depth aside, which draws."""
    path = ROOT / f"yamls/{name}.yaml"
    cfg = config.load(path, [*overrides_of(path, tmp_path), "max_duration=1ba", "model.drop_path_rate=0"])
    trainer: Trainer = RECIPES[cfg.recipe].build(cfg)
    network: Any = trainer.state.model.model
    torch.nn.init.normal_(network.head.weight, std=0.1)  # no loss shows a network that a head of zeros does not read
    trainer.state.callbacks.append(first := FirstStep())
    assert fit(trainer, cfg) == 0
    timms = timm.create_model(TIMMS[name][0], num_classes=1000, **TIMMS[name][1]).eval()
    missing, unexpected = timms.load_state_dict(first.weights, strict=False)
    assert set(missing) <= {"pos_embed"} and not unexpected
    if missing:
        timms.pos_embed.data.copy_(network.pos_embed)
    with torch.no_grad():
        logits = timms(first.images).double()
    if cfg.loss == "binary_cross_entropy":
        expected = F.binary_cross_entropy_with_logits(logits, (first.targets > 0).double())
        uniform = math.log(2)
    else:
        expected = -(first.targets * logits.log_softmax(1)).sum(1).mean()
        uniform = math.log(1000)
    assert first.images.shape == (BATCH, 3, cfg.model.image_size, cfg.model.image_size)
    assert float(first.loss) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(first.loss) - uniform) > 0.01 * uniform


@pytest.mark.parametrize("path", PLANNED, ids=lambda p: p.stem)
def test_yaml_header_states_the_counted_flops_and_the_planned_hours(path: Path, tmp_path: Path) -> None:
    found = costs_of(config.load(path), gpu="h200", gpus=1, images=1_281_167, results=tmp_path)
    cost = read_page(path).cost
    stated = re.match(r"([\d.]+) GFLOP an image, ([\d.]+) EFLOP[;,]", cost)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(found["train_flops_per_image"] / 1e9, rel=0.01)
    assert float(stated[2]) == pytest.approx(found["train_flops"] / 1e18, rel=0.02)
    assert cost.endswith(f"; {headers.hours_in_words(path)}."), "make yamls writes the hours"


def test_hours_of_a_header_are_those_that_the_plan_prints(tmp_path: Path) -> None:
    """With the cores and GPUs that it names, and the input that was measured."""
    words = headers.hours_in_words(ROOT / "yamls/vit_s_mild.yaml", RESULTS)
    stated = re.fullmatch(r"estimated ([\d.]+) h on 8 H200 with 192 cores \(GPUs alone ([\d.]+) h\)", words)
    assert stated is not None
    file = tmp_path / "plan.json"
    command = ["plan", "vit_s_mild", "--gpus", "8", "--gpu", "h200", "--cpus", "192"]
    assert cli.main([*command, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (stated[1], stated[2]) == (f"{found['hours']:.2f}", f"{found['gpu_bound_hours']:.2f}")
    assert found["workers"] is None


def test_hours_are_written_where_the_header_has_its_cost() -> None:
    page = "# A.  B.\n# Cost: 1.0 GFLOP an image, 2.0 EFLOP; a note; estimated 3.00 h on\n#   8 H200.\n"
    page += "# Deviates: x.\nrecipe: s\n"
    written = headers.with_hours(page, "estimated " + 30 * "long " + "h")
    assert "2.0 EFLOP; a note; estimated long" in written and max(map(len, written.splitlines())) <= 120
    assert written.startswith("# A.  B.\n# Cost: ") and written.endswith("long h.\n# Deviates: x.\nrecipe: s\n")
    assert headers.with_hours(written, "hours not measured").splitlines()[1].endswith("a note; hours not measured.")
    with pytest.raises(ValueError, match="a line Cost that ends in hours"):
        headers.with_hours("# A.  B.\n# Cost: 2 EFLOP.\n", "x")


@pytest.mark.parametrize(("name", "epochs"), [("probe_linear", 100), ("probe_knn", 1)])
def test_header_of_a_frozen_trunk_states_the_flops_of_its_forward_passes(name: str, epochs: int) -> None:
    trunk = build_model("vit_small_patch16", num_classes=0, image_size=224)
    stated = re.search(r"Cost: ([\d.]+) GFLOP an image, ([\d.]+) EFLOP", (ROOT / f"yamls/{name}.yaml").read_text())
    assert stated is not None
    assert float(stated[1]) == pytest.approx(forward_flops(trunk, 224) / 1e9, rel=0.01)
    assert float(stated[2]) == pytest.approx(epochs * 1_281_167 * forward_flops(trunk, 224) / 1e18, rel=0.02)
