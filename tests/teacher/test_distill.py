"""Recipe ``distill`` with a live teacher: what the teacher sees, that it stays as it is, and runs of train.py."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.conftest import PHOTOS, ROOT, error_of, run_train, tiny_photo_overrides
from tests.training.test_train import losses, weights
from vitcomposer import config
from vitcomposer.cost.flops import forward_flops
from vitcomposer.data.augment.mixing import draw_mixing
from vitcomposer.data.augment.transforms import TrainTransform
from vitcomposer.data.batch import split_batch
from vitcomposer.losses import DistillationLoss, soft_target_cross_entropy
from vitcomposer.models import build_model
from vitcomposer.tasks import DistillationTask
from vitcomposer.teacher.frozen import FrozenTeacher
from vitcomposer.teacher.network import build_teacher, build_teacher_network

YAML = str(ROOT / "yamls/deit_ti_distilled.yaml")
CLASSES = len(PHOTOS)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SOFT = {"distillation.kind": "soft", "distillation.temperature": 2.0, "model.drop_path_rate": 0}
OURS = {"patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2}
TEACHERS = {"ours": "deit_tiny_patch16", "timm": "test_resnet"}


def new_network(kind: str, num_classes: int = CLASSES) -> nn.Module:
    """With a head and statistics of batch norms that are not those of a new network."""
    torch.manual_seed(1)
    options = OURS if kind == "ours" else {}
    network = build_teacher_network(TEACHERS[kind], num_classes=num_classes, image_size=32, **options)
    for name, tensor in network.state_dict().items():
        if name.split(".")[0] in ("head", "fc") or "running_mean" in name:
            tensor.normal_(std=0.5)
    return network


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In DeiT's layout."""
    folder = tmp_path_factory.mktemp("teachers")
    for kind in TEACHERS:
        torch.save({"model": new_network(kind).state_dict()}, folder / f"{kind}.pth")
    torch.save({"model": new_network("timm", 5).state_dict()}, folder / "five.pth")
    return {path.stem: path for path in folder.iterdir()}


def teaching(file: Path, kind: str = "timm", **changes: Any) -> list[str]:
    given = {"teacher.name": TEACHERS[kind], "teacher.weights": file, "max_duration": "2ba", **changes}
    if kind == "ours":
        given["teacher.options"] = "{" + ", ".join(f"{key}: {value}" for key, value in OURS.items()) + "}"
    return [f"{key}={value}" for key, value in given.items()]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("timm", {}), ("ours", {**SOFT, "distillation.teacher_sees": "unmixed", "run.device_train_microbatch_size": 8})],
)
def test_run_with_a_teacher_trains_the_student_alone(kind, changes, teacher_files, photo_mds, tmp_path) -> None:
    overrides = tiny_photo_overrides(photo_mds, tmp_path, kind)
    assert run_train([YAML, *overrides, *teaching(teacher_files[kind], kind, **changes)]) == 0
    curve, summary = losses(tmp_path / kind), json.loads((tmp_path / kind / "summary.json").read_text())
    assert all(math.isfinite(loss) for loss in curve) and summary["finished"]
    # Heads start with small weights: a student that knows nothing is this far from labels and a teacher's best class.
    assert kind == "ours" or curve[0] == pytest.approx(math.log(CLASSES), abs=0.3)
    student = build_model("deit_tiny_distilled_patch16", num_classes=CLASSES, image_size=32, patch_size=8, depth=2)
    assert {name.removeprefix("model.") for name in weights(tmp_path / kind)} == set(student.state_dict())
    flops = 3 * forward_flops(student, 32) + forward_flops(new_network(kind), 32)
    assert summary["train_flops"] == pytest.approx(2 * 16 * flops)


def test_teacher_keeps_its_size_in_a_curriculum_and_both_networks_compile_whole(
    teacher_files, photo_mds, tmp_path, monkeypatch
) -> None:
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real_compile(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    counters.clear()
    more = ["model.depth=1", "algorithms.Curriculum={image_sizes: [16, 32], compute: [0.3, 0.7]}"]
    more += teaching(teacher_files["timm"], max_duration="3ba")
    for name in ("eager", "compiled"):
        chosen = f"run.compile={name == 'compiled'}"
        assert run_train([YAML, *tiny_photo_overrides(photo_mds, tmp_path, name), *more, chosen]) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    # The student: two sizes in training, one in evaluation. The teacher: one.
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_two_ranks_end_with_the_losses_of_one(teacher_files, photo_mds, tmp_path) -> None:
    from tests.launch.test_launch import BIN, launch

    alike = ["mixing.prob=0", "augment.repeated_augmentation=1", *teaching(teacher_files["timm"], **SOFT)]
    alike += ["max_duration=4ba", "schedule.t_warmup=0ba"]
    two = [YAML, *tiny_photo_overrides(photo_mds, tmp_path, "two"), *alike]
    launch([str(BIN / "composer"), "-n", "2"], ["train.py", *two])
    assert run_train([YAML, *tiny_photo_overrides(photo_mds, tmp_path, "one"), *alike]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.weights": "nowhere.pth"}, "teacher.weights must be a file, got 'nowhere.pth'"),
        ({"teacher.weights": "five"}, "teacher.weights must have the 8 classes of model.num_classes, but "),
        ({"teacher.name": "resnet18"}, "teacher.weights must hold the weights of resnet18. "),
        ({"teacher.name": "regnety_16"}, "teacher.name must be one of our models or of timm's, got 'regnety_16'."),
        ({"teacher.options": "{depths: 3}"}, "teacher.options must be arguments of timm.create_model('test_resnet')"),
        ({"distillation.alpha": 0}, "distillation.alpha must be above 0"),
        ({"distillation.alpha": 1}, "distillation.alpha must be below 1 with a distilled model"),
        ({"distillation.temperature": 3}, "distillation.temperature must be 1 with kind: hard"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_teacher_that_does_not_fit_is_refused_before_the_first_batch(
    changes, message, teacher_files, photo_mds, tmp_path, capsys
) -> None:
    changes = {key: teacher_files.get(value, value) for key, value in changes.items()}
    overrides = tiny_photo_overrides(photo_mds, tmp_path, "refused")
    assert (
        run_train([YAML, *overrides, *teaching(teacher_files["timm"]), *(f"{k}={v}" for k, v in changes.items())]) == 2
    )
    error = error_of(capsys.readouterr().err)
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "refused").exists()


def frozen(network: nn.Module, **changes: Any) -> FrozenTeacher:
    own = {"image_size": 32, "precision": "fp32", **IMAGENET}
    own |= {"student_mean": IMAGENET["mean"], "student_std": IMAGENET["std"]}
    return FrozenTeacher(network, **{**own, **changes})


def task_with(teacher: FrozenTeacher | None, **changes: Any) -> DistillationTask:
    torch.manual_seed(0)
    student: Any = build_model("deit_tiny_distilled_patch16", num_classes=CLASSES, image_size=32, **OURS)
    for head in (student.head, student.head_dist):
        nn.init.normal_(head.weight, std=0.1)
    loss = DistillationLoss(soft_target_cross_entropy, kind="soft", alpha=0.3, temperature=2.0, kl="batch")
    return DistillationTask(
        student, loss=loss, num_classes=CLASSES, teacher=teacher, **{"sees_unmixed": False, **changes}
    )


def new_batch(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(count, 3, 32, 32, generator=generator)
    return {"image": image, "target": torch.randn(count, CLASSES, generator=generator).softmax(dim=1)}


def gradients(task: DistillationTask, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    task.zero_grad()
    task.train()
    task.loss(task(batch), batch).backward()
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def test_teacher_is_no_part_of_the_task_and_stays_bitwise_as_it_is() -> None:
    network = new_network("timm")
    before = copy.deepcopy(network.state_dict())
    task = task_with(frozen(network))
    gradients(task, new_batch())
    task.double().float()
    assert sum(p.numel() for p in task.parameters()) == sum(p.numel() for p in task.model.parameters())
    assert all(name.startswith("model.") for name in task.state_dict())
    assert not any(module is network for module in task.modules()) and not network.training
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_class_head_learns_from_the_labels_and_the_other_from_the_teacher() -> None:
    batch, task = new_batch(), task_with(frozen(new_network("timm")))
    first = gradients(task, batch)
    task.teacher = frozen(new_network("ours"))
    other_teacher = gradients(task, batch)
    other_labels = gradients(task, {**batch, "target": batch["target"].flip(0)})
    for heads, same in ((("head.weight", "head.bias"), True), (("head_dist.weight", "head_dist.bias"), False)):
        for name in heads:
            assert torch.equal(first[name], other_teacher[name]) == same
            assert torch.equal(other_teacher[name], other_labels[name]) == (not same)


def test_answers_in_the_batch_give_the_loss_of_the_live_teacher() -> None:
    batch = {**new_batch(), "unmixed": torch.randn(4, 3, 32, 32), "mix_lam": torch.tensor([0.2, 0.6, 0.6, 0.2])}
    live = task_with(frozen(new_network("timm")), sees_unmixed=True)
    answers = live.answers(batch)
    cached = task_with(None, sees_unmixed=True)
    stored = {f"teacher_{name}": tensor for name, tensor in answers._asdict().items()}
    found, expected = gradients(cached, {**batch, **stored}), gradients(live, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        expected = new_network("timm").eval()(batch["unmixed"])
    assert torch.equal(answers.logits, expected.half())


@pytest.mark.parametrize("sees", ["mixed", "unmixed"])
def test_microbatches_have_the_gradients_of_the_whole_batch(sees: str) -> None:
    generator = torch.Generator().manual_seed(5)
    lam, boxes = draw_mixing(
        np.random.RandomState(0), 8, 32, mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="elem"
    )
    whole = {
        "image": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "label": torch.arange(8) % CLASSES,
        "mix_lam": torch.from_numpy(lam),
        "mix_box": torch.from_numpy(boxes),
    }
    cfg = config.load(YAML, ["augment.random_erasing=0"])
    transform = TrainTransform(cfg.augment, cfg.mixing, num_classes=CLASSES, keep_unmixed=sees == "unmixed")
    task = task_with(frozen(new_network("timm")), sees_unmixed=sees == "unmixed")
    expected = gradients(task, transform(whole))
    parts = [gradients(task, transform(part)) for part in split_batch(whole, 4)]
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / len(parts), gradient, rtol=1e-4, atol=1e-6)


def test_teacher_sees_its_own_normalisation_and_size() -> None:
    pixels = torch.rand(2, 3, 24, 24, dtype=torch.float64)
    student = {"student_mean": (0.5, 0.4, 0.3), "student_std": (0.2, 0.3, 0.4)}
    seen: list[Tensor] = []
    network = nn.Identity()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.forward = lambda images: images.mean(dim=(2, 3))  # pyright: ignore[reportAttributeAccessIssue]

    def normalised(mean: tuple, std: tuple) -> Tensor:
        return (pixels - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)

    images = normalised(student["student_mean"], student["student_std"]).float()
    frozen(network, image_size=24, **student)(images)
    torch.testing.assert_close(seen[0].double(), normalised(**IMAGENET), rtol=1e-5, atol=1e-5)
    frozen(network, image_size=48, **student)(images)
    larger = nn.functional.interpolate(normalised(**IMAGENET), (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[1].double(), larger, rtol=1e-4, atol=1e-4)
    same = torch.randn(2, 3, 24, 24)
    frozen(network, image_size=24)(same)
    assert seen[2] is same, "nothing to do"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("amp_bf16", torch.bfloat16)])
def test_teacher_has_a_precision_of_its_own(precision, dtype) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 4))
    seen: list[torch.dtype] = []
    linear[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    teacher = frozen(linear, image_size=4, precision=precision)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "fp32"):
        answers = teacher(torch.randn(2, 3, 4, 4))
    assert seen == [dtype] and answers.logits.dtype == torch.float16


def test_timms_transformer_takes_another_size_and_one_it_cannot_take_is_named(tmp_path) -> None:
    torch.manual_seed(0)
    network: Any = timm.create_model("test_vit", num_classes=CLASSES)  # 160 pixels, patches of 16
    torch.save(network.state_dict(), tmp_path / "vit.pt")
    build: Callable[[int], nn.Module] = lambda size: build_teacher(  # noqa: E731
        "test_vit", tmp_path / "vit.pt", num_classes=CLASSES, image_size=size
    )
    network.set_input_size((96, 96))
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(build(96)(images), network.eval()(images))
    with pytest.raises(ValueError, match="teacher.image_size must be one that test_vit takes, got 40"):
        build(40)


def test_names_of_deits_teacher_are_those_of_timm_today() -> None:
    """timm itself reads regnety_160-a5fe301d.pth by ``["model"]`` alone; the tensors of its 84 M parameters."""
    with torch.device("meta"):
        network = build_teacher_network("regnety_160", num_classes=1000, image_size=224)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(math.prod(s) for n, s in shapes.items() if "running" not in n and "num_batches" not in n) == 83_590_140
    assert shapes["stem.conv.weight"] == (32, 3, 3, 3) and shapes["s1.b1.downsample.conv.weight"] == (224, 32, 1, 1)
    assert shapes["s3.b11.se.fc1.weight"] == (308, 1232, 1, 1) and shapes["head.fc.weight"] == (1000, 3024)
