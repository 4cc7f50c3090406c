"""Every algorithm of Composer is allowed or rejected; the allowed ones have their effect on a ViT with dict batches."""

import copy

import composer.algorithms
import pytest
import torch
from composer import Callback, Evaluator, Trainer
from composer.core import Algorithm, DataSpec, Event, Precision, State
from composer.devices import DeviceCPU
from composer.models import ComposerModel
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from vitcomposer.algorithms import (
    ALLOWED,
    EMA_LABEL,
    REJECTED,
    EvaluationEMA,
    averaged_weights,
    build_algorithms,
)
from vitcomposer.schema import ConfigError

CLASSES, SIDE, BATCH, BATCHES = 5, 16, 4, 3  # images per step, steps per epoch
PLAIN = {"loss": "soft_target_cross_entropy", "precision": "fp32", "label_smoothing": 0.0}


class Images(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH * BATCHES, 3, SIDE, SIDE)
        self.images = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": torch.tensor(index % CLASSES), "sample_id": torch.tensor(index)}


def to_device_side(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    target = nn.functional.one_hot(batch["label"], CLASSES).float()
    return {**batch, "image": batch["image"].float() / 255 - 0.5, "target": target}


def data_spec() -> DataSpec:
    return DataSpec(DataLoader(Images(), batch_size=BATCH), microbatch_transforms=to_device_side)


class Task(ComposerModel):
    """A ViT of two blocks that keeps what it was given; ``steps`` is an integer buffer that counts forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = VisionTransformer(
            img_size=SIDE, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES
        )
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("positions", torch.arange(1000))
        self.images: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []

    def forward(self, batch):
        if self.training:
            self.steps += 1
            self.images.append(batch["image"].clone())
        return self.model(batch["image"])

    def loss(self, outputs, batch, *args, **kwargs):
        self.targets.append(batch["target"].clone())
        return nn.functional.cross_entropy(outputs, batch["target"])

    def get_metrics(self, is_train=False):
        return {} if is_train else {"weight": MeanMetric()}

    def update_metric(self, batch, outputs, metric):
        metric.update(self.model.head.weight.sum())


class Record(Callback):
    """Gradients before each step, and a copy of the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def after_train_batch(self, state, logger):
        self.gradients.append([p.grad.clone() for p in state.model.parameters()])

    def batch_end(self, state, logger):
        self.weights.append({name: p.detach().clone() for name, p in state.model.named_parameters()})


def build(name: str, **arguments) -> list[Algorithm]:
    return build_algorithms({name: arguments}, **PLAIN)


def adamw(task: Task, lr: float = 1e-2) -> torch.optim.AdamW:
    decayed, exempt = ([p for p in task.parameters() if (p.ndim > 1) == decay] for decay in (True, False))
    return torch.optim.AdamW([{"params": decayed}, {"params": exempt, "weight_decay": 0.0}], lr=lr)


def fit(
    algorithms: list[Algorithm], max_duration: str = "3ba", lr: float = 1e-2, **options
) -> tuple[Trainer, Task, Record]:
    task, record = Task(), Record()
    settings = {"device": "cpu", "seed": 1, "progress_bar": False, "callbacks": []} | options
    settings["callbacks"] = [record, *settings["callbacks"]]
    trainer = Trainer(
        model=task,
        train_dataloader=data_spec(),
        max_duration=max_duration,
        optimizers=adamw(task, lr),
        algorithms=algorithms,
        **settings,
    )
    trainer.fit()
    trainer.close()
    return trainer, task, record


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_every_algorithm_of_composer_is_in_exactly_one_table():
    public = {name for name in composer.algorithms.__all__ if issubclass(getattr(composer.algorithms, name), Algorithm)}
    assert ALLOWED.keys() | REJECTED.keys() == public
    assert not ALLOWED.keys() & REJECTED.keys()


@pytest.mark.parametrize("name", sorted(REJECTED))
def test_rejected_algorithm_says_why_and_what_to_do(name):
    with pytest.raises(ConfigError, match=rf"^algorithms.{name} must .* but {name} .*\. [A-Z].*\.$"):
        build(name)


@pytest.mark.parametrize(
    ("algorithms", "recipe", "message"),
    [
        ({"GradientCliping": {}}, {}, r"algorithms.GradientCliping must be one of .*Did you mean 'GradientClipping'"),
        ({"StochasticDept": {}}, {}, r"Did you mean 'StochasticDepth'"),
        ({"EMA": {"smoothng": 0.9}}, {}, r"algorithms.EMA.smoothng must .*'half_life'.*Did you mean 'smoothing'"),
        ({"EMA": {}}, {}, r"algorithms.EMA .*exactly one of half_life and smoothing"),
        ({"EMA": {"smoothing": 0.9}}, {}, r"algorithms.EMA .*smoothing needs update_interval"),
        ({"EMA": {"smoothing": 1.5, "update_interval": "1ba"}}, {}, r"algorithms.EMA .*in \(0, 1\), got 1.5"),
        ({"EMA": {"half_life": "10ba", "smoothing": 0.9}}, {}, r"algorithms.EMA .*exactly one"),
        ({"EMA": {"half_life": "10ba", "update_interval": "1ep"}}, {}, r"algorithms.EMA .*[Uu]nits"),
        ({"EMA": {"half_life": "10"}}, {}, r"algorithms.EMA .*Invalid time string: 10"),
        ({"EMA": {"half_life": 10}}, {}, r"algorithms.EMA "),
        ({"EMA": {"half_life": "0ba"}}, {}, r"algorithms.EMA .*above 0"),
        (
            {"EMA": {"half_life": "1ba", "ema_start": "5tok"}},
            {},
            r"algorithms.EMA .*ema_start must be in dur, ep or ba",
        ),
        ({"GradientClipping": {}}, {}, r"algorithms.GradientClipping .*missing 2 required"),
        (
            {"GradientClipping": {"clipping_type": "nrm", "clipping_threshold": 1.0}},
            {},
            r"algorithms.GradientClipping.clipping_type must be norm, value or adaptive, got 'nrm'",
        ),
        (
            {"GradientClipping": {"clipping_type": "norm", "clipping_threshold": "one"}},
            {},
            r"algorithms.GradientClipping ",
        ),
        ({"LabelSmoothing": {"smoothing": 1.0}}, {}, r"algorithms.LabelSmoothing.smoothing must be in \[0, 1\)"),
        ({"LabelSmoothing": {"target_key": 1}}, {}, r"algorithms.LabelSmoothing.target_key must .*\['smoothing'\]"),
        ({"LabelSmoothing": {}}, {"label_smoothing": 0.1}, r"mixing.label_smoothing must be 0 .*smoothed twice"),
        ({"LabelSmoothing": {}}, {"loss": "binary_cross_entropy"}, r"^loss must be a cross-entropy"),
        ({"LowPrecisionLayerNorm": {}}, {}, r"^precision must be mixed with algorithms.LowPrecisionLayerNorm"),
        ({"CutOut": {"length": 16}}, {}, r"algorithms.CutOut.length must be in \(0, 1\), got 16"),
        ({"SAM": {"interval": 0}}, {}, r"algorithms.SAM.interval must be 1 or more"),
    ],
)
def test_bad_algorithms_are_refused_with_their_key(algorithms, recipe, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithms(algorithms, **{**PLAIN, **recipe})


def test_algorithms_keep_the_order_of_the_yaml():
    block = {"SAM": {}, "EMA": {"half_life": "5ba"}, "LabelSmoothing": {"smoothing": 0.2}}
    built = build_algorithms(block, **PLAIN)
    assert [type(algorithm).__mro__[1].__name__ for algorithm in built] == ["SAM", "EMA", "Algorithm"]
    assert build_algorithms({}, **PLAIN) == []


def global_norm(gradients: list[torch.Tensor]) -> float:
    return torch.stack([g.norm() for g in gradients]).norm().item()


def test_gradient_clipping_bounds_the_norm_over_microbatches():
    _, _, free = fit([], device_train_microbatch_size=2)
    _, _, clipped = fit(
        build("GradientClipping", clipping_type="norm", clipping_threshold=0.1), device_train_microbatch_size=2
    )
    assert all(global_norm(g) > 0.2 for g in free.gradients)
    assert [global_norm(g) for g in clipped.gradients] == pytest.approx([0.1] * 3, rel=1e-4)
    scale = 0.1 / global_norm(free.gradients[0])
    for before, after in zip(free.gradients[0], clipped.gradients[0], strict=True):
        torch.testing.assert_close(after, before * scale, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["value", "adaptive"])
def test_other_kinds_of_gradient_clipping_bound_the_gradient(kind):
    _, task, record = fit(build("GradientClipping", clipping_type=kind, clipping_threshold=1e-3), "1ba")
    if kind == "value":
        assert max(g.abs().max().item() for g in record.gradients[0]) == pytest.approx(1e-3)
        return
    start = Task()
    for parameter, gradient in zip(start.model.parameters(), record.gradients[0], strict=True):
        if parameter.ndim == 2:
            assert (gradient.norm(dim=1) <= 1e-3 * parameter.norm(dim=1) * 1.001).all()


def test_label_smoothing_smooths_the_targets_once():
    _, task, _ = fit(build("LabelSmoothing", smoothing=0.2), device_train_microbatch_size=2)
    targets = torch.cat(task.targets)
    assert targets.shape == (3 * BATCH, CLASSES)
    torch.testing.assert_close(targets.max(1).values, torch.full((3 * BATCH,), 0.8 + 0.2 / CLASSES))
    torch.testing.assert_close(targets.min(1).values, torch.full((3 * BATCH,), 0.2 / CLASSES))


def test_cutout_blackens_one_square_of_the_batch():
    _, task, _ = fit(build("CutOut", num_holes=1, length=0.5))
    for images in task.images:
        black = (images == -0.5).all(dim=1)  # uint8 0 after the device side; the data set holds no 0
        assert 1 <= black[0].sum() <= (SIDE // 2) ** 2
        assert (black == black[0]).all()
    assert not torch.equal(task.images[0] == -0.5, task.images[1] == -0.5)


def test_low_precision_layernorm_replaces_norms_that_still_train():
    """A Trainer takes mixed precision on a GPU only, so this runs the algorithm on a State and then a step."""
    task = Task()
    optimizer = adamw(task)
    (algorithm,) = build_algorithms({"LowPrecisionLayerNorm": {}}, **{**PLAIN, "precision": "amp_bf16"})
    state = State(task, 0, "run", DeviceCPU(), precision=Precision.AMP_BF16, optimizers=optimizer)
    assert algorithm.match(Event.INIT, state)
    algorithm.apply(Event.INIT, state, None)
    norms = [module for module in task.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5 and {type(norm).__name__ for norm in norms} == {"LPLayerNorm"}
    exempt = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert all(id(norm.weight) in exempt and id(norm.bias) in exempt for norm in norms)
    batch = to_device_side(next(iter(DataLoader(Images(), batch_size=BATCH))))
    task.loss(task(batch), batch).backward()
    optimizer.step()
    assert all((norm.weight != 1).any() for norm in norms)


@pytest.mark.gpu
def test_low_precision_layernorm_gives_bfloat16_under_autocast():
    _, task, _ = fit(
        build_algorithms({"LowPrecisionLayerNorm": {}}, **{**PLAIN, "precision": "amp_bf16"}),
        device="gpu",
        precision="amp_bf16",
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert task.model.norm(torch.randn(2, 16, device="cuda")).dtype == torch.bfloat16


def test_sam_runs_twice_per_step_and_climbs_first():
    trainer, task, record = fit(build("SAM", rho=0.05), "2ba")
    assert len(task.images) == 4
    reference, images = Task(), task.images[0]
    batch = {"image": images, "target": nn.functional.one_hot(torch.arange(BATCH), CLASSES).float()}
    reference.loss(reference.model(images), batch).backward()
    first = [p.grad.clone() for p in reference.model.parameters()]
    with torch.no_grad():
        for parameter, gradient in zip(reference.model.parameters(), first, strict=True):
            parameter.add_(gradient * 0.05 / global_norm(first))
    reference.zero_grad()
    reference.loss(reference.model(images), batch).backward()
    for ours, parameter in zip(record.gradients[1], reference.model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_sam_interval_skips_steps():
    _, task, _ = fit(build("SAM", interval=2), "3ba")
    assert len(task.images) == 4  # the second of three steps is a SAM step


def test_sam_returns_to_the_very_weights_it_climbed_from():
    trainer, _, _ = fit(build("SAM", rho=0.05), "2ba", lr=0.0)
    assert_equal(weights(trainer), {name: p.detach() for name, p in Task().named_parameters()})


def checkpointed(tmp_path, every: str = "1ba") -> dict:
    return {"save_folder": str(tmp_path), "save_interval": every, "save_filename": "ba{batch}.pt"}


@pytest.mark.parametrize(
    "block",
    [
        {"EMA": {"half_life": "2ba", "update_interval": "1ba"}},
        {"EMA": {"smoothing": 0.9, "update_interval": "1ep"}},
        {"SAM": {"interval": 3}},
        {"CutOut": {}},
        {
            "GradientClipping": {"clipping_type": "norm", "clipping_threshold": 0.1},
            "LabelSmoothing": {"smoothing": 0.1},
            "EMA": {"smoothing": 0.5, "update_interval": "2ba", "ema_start": "6ba"},
        },
    ],
    ids=lambda block: "+".join(block),
)
def test_resumed_run_ends_bitwise_equal(block, tmp_path):
    unbroken, _, _ = fit(build_algorithms(block, **PLAIN), "7ba", **checkpointed(tmp_path, "4ba"))
    resumed, _, _ = fit(build_algorithms(block, **PLAIN), "7ba", load_path=str(tmp_path / "ba4.pt"))
    assert_equal(weights(unbroken), weights(resumed))
    for ours, theirs in zip(unbroken.state.algorithms, resumed.state.algorithms, strict=True):
        if isinstance(ours, EvaluationEMA):
            assert_equal(ours.ema_model.named_parameters_dict, theirs.ema_model.named_parameters_dict)
            assert_equal(ours.ema_model.named_buffers_dict, theirs.ema_model.named_buffers_dict)


def evaluators() -> list[Evaluator]:
    return [Evaluator(label=label, dataloader=data_spec(), metric_names=["weight"]) for label in ("eval", EMA_LABEL)]


class Measured(Callback):
    """What each evaluation saw: (label, batch, sum of the head's weights)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []

    def eval_end(self, state, logger):
        label = state.dataloader_label
        self.seen.append((label, int(state.timestamp.batch), float(state.eval_metrics[label]["weight"].compute())))


def head_sum(values: dict[str, torch.Tensor]) -> float:
    return values["model.head.weight"].sum().item()


def test_ema_evaluates_the_average_under_its_label_and_raw_weights_elsewhere(tmp_path):
    """Evaluation and a checkpoint after every batch: the order in which Composer's own EMA leaves weights swapped."""
    plain, _, _ = fit([], "6ba")
    measured = Measured()
    (ema,) = build("EMA", half_life="2ba", update_interval="1ba")
    trainer, _, record = fit(
        [ema],
        "6ba",
        eval_dataloader=evaluators(),
        eval_interval="1ba",
        callbacks=[measured],
        **checkpointed(tmp_path),
    )
    assert_equal(weights(plain), weights(trainer))  # training never saw the average, nor is it left in the model

    smoothing = 2**-0.5
    average = {name: value.double() for name, value in record.weights[0].items()}
    averages = [average]
    for raw in record.weights[1:]:
        average = {name: smoothing * average[name] + (1 - smoothing) * raw[name] for name in raw}
        averages.append(average)
    for name, value in ema.ema_model.named_parameters_dict.items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    expected = {"eval": record.weights, EMA_LABEL: averages}
    assert {(label, batch) for label, batch, _ in measured.seen} == {(lb, b) for lb in expected for b in range(1, 7)}
    for label, batch, value in measured.seen:
        assert value == pytest.approx(head_sum(expected[label][batch - 1]), rel=1e-4, abs=1e-6), (label, batch)

    checkpoint = torch.load(tmp_path / "ba4.pt", weights_only=False)
    raw = checkpoint["state"]["model"]
    assert all(torch.equal(raw[name], value) for name, value in record.weights[3].items())
    averaged = averaged_weights(checkpoint)
    assert averaged.keys() == raw.keys()
    for name, value in averages[3].items():
        torch.testing.assert_close(averaged[name].double(), value, rtol=1e-5, atol=1e-7)
    Task().load_state_dict(averaged)


def test_ema_copies_integer_buffers():
    """Composer's EMA averages them in floating point and cuts: at 0.9 it gets 280 of these 1000 constants wrong."""
    trainer, task, _ = fit(build("EMA", smoothing=0.9, update_interval="1ba"), "6ba")
    buffers = trainer.state.algorithms[0].ema_model.named_buffers_dict
    assert torch.equal(buffers["positions"], torch.arange(1000))
    assert buffers["steps"] == 6 == task.steps


def test_ema_updates_at_its_interval_after_its_start():
    trainer, _, record = fit(build("EMA", smoothing=0.5, update_interval="2ba", ema_start="3ba"), "6ba")
    third, fourth, sixth = (record.weights[i]["model.head.weight"] for i in (2, 3, 5))
    average = trainer.state.algorithms[0].ema_model.named_parameters_dict["model.head.weight"]
    torch.testing.assert_close(average, 0.5 * (0.5 * third + 0.5 * fourth) + 0.5 * sixth)


def test_ema_before_its_start_evaluates_raw_weights():
    measured = Measured()
    (ema,) = build("EMA", half_life="2ba", update_interval="1ba", ema_start="5ba")
    task = Task()
    trainer = Trainer(
        model=task,
        eval_dataloader=evaluators(),
        algorithms=[ema],
        callbacks=[measured],
        device="cpu",
        progress_bar=False,
    )
    trainer.eval()
    trainer.close()
    assert [value for _, _, value in measured.seen] == [task.model.head.weight.sum().item()] * 2


def test_ema_of_a_loaded_checkpoint_is_evaluated_without_training(tmp_path):
    trained, _, _ = fit(build("EMA", half_life="2ba", update_interval="1ba"), "4ba", **checkpointed(tmp_path))
    measured = Measured()
    trainer = Trainer(
        model=Task(),
        eval_dataloader=evaluators(),
        algorithms=build("EMA", half_life="2ba", update_interval="1ba"),
        callbacks=[measured],
        load_path=str(tmp_path / "ba4.pt"),
        device="cpu",
        progress_bar=False,
    )
    trainer.eval()
    trainer.close()
    raw, averaged = (value for _, _, value in measured.seen)
    average = trained.state.algorithms[0].ema_model.named_parameters_dict
    assert raw == pytest.approx(head_sum(weights(trained)), rel=1e-5)
    assert averaged == pytest.approx(head_sum(average), rel=1e-5)
    assert raw != pytest.approx(averaged, rel=1e-3)
    assert_equal(weights(trained), weights(trainer))


def test_averaged_weights_need_a_started_average(tmp_path):
    fit(build("EMA", half_life="2ba", update_interval="1ba", ema_start="5ba"), "1ba", **checkpointed(tmp_path))
    checkpoint = torch.load(tmp_path / "ba1.pt", weights_only=False)
    with pytest.raises(ValueError, match="saved before ema_start"):
        averaged_weights(checkpoint)
    without = copy.copy(checkpoint)
    without["state"] = {**checkpoint["state"], "algorithms": [("SAM", {})]}
    with pytest.raises(ValueError, match=r"holds \['SAM'\]"):
        averaged_weights(without)
