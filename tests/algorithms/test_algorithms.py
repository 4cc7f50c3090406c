"""Every algorithm of Composer is allowed or rejected; the allowed ones have their effect on a ViT with dict batches."""

import inspect

import composer.algorithms
import pytest
import torch
from composer.core import Algorithm, Event, Precision, State
from composer.devices import DeviceCPU
from torch import nn
from torch.utils.data import DataLoader

from tests.algorithms.algorithm_runs import (
    BATCH,
    CLASSES,
    PLAIN,
    SIDE,
    Images,
    Task,
    adamw,
    assert_equal,
    build,
    checkpointed,
    fit,
    to_device_side,
    weights,
)
from vitcomposer import curriculum
from vitcomposer.algorithms import (
    ALLOWED,
    EvaluationEMA,
    build_algorithms,
)
from vitcomposer.errors import ConfigError
from vitcomposer.schema.algorithms import ARGUMENTS, REJECTED, STAGED


def test_every_algorithm_of_composer_is_in_exactly_one_table():
    public = {name for name in composer.algorithms.__all__ if issubclass(getattr(composer.algorithms, name), Algorithm)}
    assert ALLOWED.keys() | REJECTED.keys() == public
    assert not ALLOWED.keys() & REJECTED.keys()
    assert ARGUMENTS.keys() == ALLOWED.keys() | set(STAGED)


def test_arguments_of_the_table_are_those_of_the_classes():
    ours = {name: (cls, given) for name, (cls, given) in ALLOWED.items()}
    classes = {**ours, "Curriculum": (curriculum.Curriculum, {}), "PatchDropout": (curriculum.PatchDropout, {})}
    for name, (cls, given) in classes.items():
        known = [argument for argument in inspect.signature(cls).parameters if argument not in given]
        assert list(ARGUMENTS[name]) == known, name


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
        ({"EMA": {"smoothing": 0.9}}, {}, r"algorithms.EMA .*with update_interval, the time between two"),
        (
            {"EMA": {"smoothing": 1.5, "update_interval": "1ba"}},
            {},
            r"algorithms.EMA.smoothing must be in \(0, 1\), got 1.5",
        ),
        ({"EMA": {"half_life": "10ba", "smoothing": 0.9}}, {}, r"algorithms.EMA .*exactly one"),
        ({"EMA": {"half_life": "0.07dur"}}, {}, r"algorithms.EMA .*given with update_interval"),
        ({"EMA": {"half_life": "10ba", "update_interval": "1ep"}}, {}, r"algorithms.EMA .*[Uu]nits"),
        (
            {"EMA": {"half_life": "10"}},
            {},
            r"algorithms.EMA.half_life must be a time above 0 in ep, ba or dur, got '10'",
        ),
        ({"EMA": {"half_life": 10}}, {}, r"algorithms.EMA.half_life "),
        ({"EMA": {"half_life": "0ba"}}, {}, r"algorithms.EMA.half_life .*above 0"),
        (
            {"EMA": {"half_life": "1ba", "ema_start": "5tok"}},
            {},
            r"algorithms.EMA.ema_start must be a time in dur, ep or ba",
        ),
        ({"GradientClipping": {}}, {}, r"GradientClipping.clipping_type +is required and missing"),
        (
            {"GradientClipping": {"clipping_type": "nrm", "clipping_threshold": 1.0}},
            {},
            r"algorithms.GradientClipping.clipping_type must be one of norm, norm_per_parameter, value, adaptive, got",
        ),
        (
            {"GradientClipping": {"clipping_type": "norm", "clipping_threshold": "one"}},
            {},
            r"algorithms.GradientClipping.clipping_threshold must be above 0, got 'one'",
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


def test_gradient_clipping_per_parameter_bounds_the_norm_of_each_over_microbatches():
    """The rule of DINO's code: g * min(1, 0.05 / (|g| + 1e-6)), each by itself."""
    _, _, free = fit([], "1ba", device_train_microbatch_size=2)
    algorithm = build("GradientClipping", clipping_type="norm_per_parameter", clipping_threshold=0.05)
    _, _, clipped = fit(algorithm, "1ba", device_train_microbatch_size=2)
    norms = [g.norm().item() for g in free.gradients[0]]
    assert min(norms) < 0.04 and max(norms) > 0.1, "some are clipped and some are not"
    for before, after in zip(free.gradients[0], clipped.gradients[0], strict=True):
        expected = before * min(1.0, 0.05 / (before.norm().item() + 1e-6))
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-9)


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
