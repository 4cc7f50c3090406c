"""Parameter groups, optimizers and the schedule against timm, torch and closed forms, and in a Trainer."""

import copy
import math
from dataclasses import replace

import pytest
import timm.optim
import torch
from composer import Callback, Trainer
from composer.core import Time
from composer.models import ComposerModel
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model
from vitcomposer.optim import (
    CosineWithWarmup,
    build_optimizer,
    cosine_with_warmup,
    param_groups,
)
from vitcomposer.schema import Optimizer, Schedule
from vitcomposer.schema.times import check_schedule, parse_time

ADAMW = Optimizer(name="adamw", lr=5e-4, lr_batch_size=512, lr_scaling="linear", weight_decay=0.05)
DEIT = Schedule(t_warmup="5ep", alpha_i=1e-3, alpha_f=1e-2, cosine_from="start")
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


class PlainViT(VisionTransformer):
    """timm's lists dist_token for every ViT; this one lists what it has."""

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


class DistilledViT(VisionTransformerDistilled):
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}


def tiny_vit(cls: type[nn.Module] = PlainViT) -> nn.Module:
    torch.manual_seed(0)
    return cls(**TINY)


def names_by_decay(model: nn.Module, groups: list[dict]) -> dict[bool, set[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len({p for group in groups for p in group["params"]})
    return {group["weight_decay"] > 0: {name_of[p] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("cls", [PlainViT, DistilledViT])
@pytest.mark.parametrize("options", [{}, {"init_values": 1e-4}, {"class_token": True, "no_embed_class": True}])
def test_groups_equal_timms(cls, options):
    model = cls(**TINY, **options)
    groups = param_groups(model, 0.05)
    timms = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert names_by_decay(model, groups) == names_by_decay(model, timms)
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}


@pytest.mark.parametrize("name", ["vit_small_patch16", "deit_tiny_distilled_patch16", "convit_tiny"])
def test_groups_of_our_models_equal_timms_rule(name):
    model = build_model(name, num_classes=5, image_size=32)
    listed = model.no_weight_decay()
    timms = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=listed)
    assert names_by_decay(model, param_groups(model, 0.05)) == names_by_decay(model, timms)


def test_groups_find_listed_names_under_a_wrapper():
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_vit()

        def no_weight_decay(self) -> set[str]:
            return self.model.no_weight_decay()

    without = names_by_decay(task := Task(), param_groups(task, 0.1))[False]
    assert {"model.pos_embed", "model.cls_token", "model.head.bias", "model.norm.weight"} <= without
    assert "model.head.weight" not in without


def test_groups_leave_frozen_parameters_out():
    model = tiny_vit()
    model.patch_embed.requires_grad_(False)
    grouped = {p for group in param_groups(model, 0.1) for p in group["params"]}
    assert grouped == {p for p in model.parameters() if p.requires_grad}


def test_groups_refuse_a_listed_name_that_fits_nothing():
    model = tiny_vit()
    model.no_weight_decay = lambda: {"pos_embed", "embed", "dist_token"}  # embed is no component of pos_embed
    with pytest.raises(ValueError, match=r"PlainViT.no_weight_decay\(\).*\['dist_token', 'embed'\]"):
        param_groups(model, 0.1)


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 1e-3), ("sqrt", 5e-4 * math.sqrt(2)), ("none", 5e-4)])
def test_peak_lr_follows_the_scaling_rule(scaling, expected):
    optimizer = build_optimizer(tiny_vit(), replace(ADAMW, lr_scaling=scaling), global_train_batch_size=1024)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-12)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        images, labels = torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)
        dtype = next(model.parameters()).dtype
        nn.functional.cross_entropy(model(images.to(dtype)), labels).backward()
        optimizer.step()
    return model


REFERENCES = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
    "lamb": lambda groups: timm.optim.Lamb(groups, lr=1e-3, eps=1e-8),
    "lion": lambda groups: timm.optim.Lion(groups, lr=1e-3),
    "nadamw": lambda groups: timm.optim.NAdamW(groups, lr=1e-3),
    "lambc": lambda groups: timm.optim.Lamb(groups, lr=1e-3, trust_clip=True),
    "muon": lambda groups: timm.optim.Muon(groups, lr=1e-3, momentum=0.9),
}
OPTIONS = {"adamw": {"betas": [0.9, 0.95]}, "lamb": {"eps": 1e-8}}


@pytest.mark.parametrize("name", REFERENCES)
def test_steps_equal_the_reference_optimizer(name):
    # In float64: the keys' biases have no gradient but rounding noise, which Adam and LAMB would blow up.
    model, reference = tiny_vit().double(), tiny_vit().double()
    config = replace(ADAMW, name=name, options=OPTIONS.get(name, {}))
    train(model, build_optimizer(model, config, global_train_batch_size=1024))
    groups = timm.optim.param_groups_weight_decay(
        reference,
        0.05,
        no_weight_decay_list=reference.no_weight_decay(),
        fallback_no_weight_decay=name == "muon",
    )
    train(reference, REFERENCES[name](groups))
    start = tiny_vit().double().state_dict()
    for key, value in model.state_dict().items():
        assert not torch.equal(value, start[key]), key
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["lamb", "nadamw", "muon", "adamuon", "nadamuon", "adamw_schedulefree"])
def test_one_line_of_a_yaml_chooses_an_optimizer_that_learns(name):
    model = tiny_vit()
    optimizer = build_optimizer(model, replace(ADAMW, name=name, lr=1e-2), global_train_batch_size=512)
    if name == "adamw_schedulefree":
        optimizer.train()
    images, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-5:]) < min(losses[:5]), losses


def test_weight_decay_moves_only_the_decayed_group():
    model = tiny_vit()
    optimizer = build_optimizer(model, ADAMW, global_train_batch_size=512)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrink = 1 - 5e-4 * 0.05
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name in model.no_weight_decay()
        torch.testing.assert_close(parameter.data, before[name] * (1 if exempt else shrink), rtol=1e-6, atol=0)


def test_adamw_is_fused_and_the_yaml_can_overrule_it():
    build = lambda cfg: build_optimizer(tiny_vit(), cfg, global_train_batch_size=512)  # noqa: E731
    assert build(ADAMW).defaults["fused"] is True
    assert not build(replace(ADAMW, options={"foreach": True})).defaults["fused"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"betass": [0.9, 0.99]}}, r"optimizer.options.betass .*Did you mean 'betas'\?"),
        ({"options": {"lr": 0.1}}, r"optimizer.options.lr .*beside them in optimizer"),
        ({"options": {"betas": [0.9, 2.0]}}, r"optimizer.options .*adamw accepts.*Invalid beta"),
        ({"options": {"betas": 0.9}}, r"optimizer.options .*adamw accepts"),
        ({"name": "adamww"}, r"optimizer.name .*'adamww'\. Did you mean 'adamw'\?"),
        ({"name": "qqqq"}, r"optimizer.name .*'qqqq'\. Use adamw or lamb"),
        ({"name": "adahessian"}, r"optimizer.name must be a first-order optimizer, got 'adahessian'"),
        ({"name": "sgd", "options": {"nesterov": True, "momentum": 0.0}}, r"optimizer.options .*Nesterov"),
    ],
)
def test_bad_optimizer_is_refused_with_its_key(change, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(tiny_vit(), replace(ADAMW, **change), global_train_batch_size=512)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the kernels may be installed")
@pytest.mark.parametrize("name", ["fusedlamb", "bnbadamw8bit"])
def test_optimizers_that_are_not_installed_are_refused(name):
    with pytest.raises(ConfigError, match=f"installed here, got '{name}'"):
        build_optimizer(tiny_vit(), replace(ADAMW, name=name), global_train_batch_size=512)


@pytest.mark.parametrize("cosine_from", ["start", "warmup"])
@pytest.mark.parametrize(("total", "warmup"), [(50, 7), (20, 0), (10, 10)])
def test_schedule_equals_timm_at_every_update(cosine_from, total, warmup):
    peak, first, last = 2e-3, 1e-6, 1e-5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    prefix = cosine_from == "warmup"
    reference = CosineLRScheduler(
        optimizer,
        t_initial=max(total - warmup, 1) if prefix else total,
        lr_min=last,
        warmup_t=warmup,
        warmup_lr_init=first,
        warmup_prefix=prefix,
        t_in_epochs=False,
    )
    for step in range(total + 1):
        if step:
            reference.step_update(step)
        if step == total == warmup:
            continue  # the cosine has no length: nothing to compare
        factor = cosine_with_warmup(
            step, total, warmup, alpha_i=first / peak, alpha_f=last / peak, cosine_from=cosine_from
        )
        assert factor * peak == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), step


def test_schedule_from_start_is_below_the_peak_when_the_warmup_ends():
    shape = {"alpha_i": 0.0, "alpha_f": 0.0}
    after = 0.5 * (1 + math.cos(math.pi * 5 / 300))
    assert cosine_with_warmup(5, 300, 5, **shape, cosine_from="start") == pytest.approx(after)
    assert cosine_with_warmup(5, 300, 5, **shape, cosine_from="warmup") == 1.0
    assert cosine_with_warmup(300, 300, 300, **shape, cosine_from="warmup") == 0.0


@pytest.mark.parametrize(
    ("duration", "warmup"),
    [
        ("300ep", "5ep"),
        ("300ep", "0.05dur"),
        ("300ep", "10000ba"),
        ("1000ba", "0ba"),
        ("1e5sp", "1dur"),
        ("8ep", "8ep"),
    ],
)
def test_good_durations_pass_and_mean_what_composer_reads(duration, warmup):
    check_schedule(duration, warmup)
    for text in (duration, warmup):
        value, unit = parse_time("x", text)
        time = Time.from_timestring(text)
        assert (time.value, time.unit.value) == (value, unit)


@pytest.mark.parametrize(
    ("duration", "warmup", "message"),
    [
        ("8", "1ep", r"^max_duration must be a time string in ep, ba or sp, got '8'. Write 300ep, 1000ba or 100000sp"),
        ("64tok", "1ep", r"^max_duration .*'64tok'"),
        ("10sec", "1ep", r"^max_duration .*'10sec'"),
        ("2h", "1ep", r"^max_duration .*'2h'"),
        ("0.5dur", "1ep", r"^max_duration must be above 0 in ep, ba or sp, got '0.5dur'"),
        ("0ep", "0ep", r"^max_duration must be above 0"),
        ("-1ep", "1ep", r"^max_duration .*'-1ep'"),
        ("1.5ep", "1ep", r"^max_duration must be a whole number of ep, got '1.5ep'"),
        ("many", "1ep", r"^max_duration .*'many'"),
        ("3ep", "5ep", r"^schedule.t_warmup must be at most max_duration \(3ep\), got '5ep'"),
        ("3ep", "1.5dur", r"^schedule.t_warmup must be at most"),
        ("3ep", "5", r"^schedule.t_warmup .*or 0.05dur"),
        ("3ep", "5tok", r"^schedule.t_warmup .*'5tok'"),
    ],
)
def test_bad_durations_are_refused_with_their_key(duration, warmup, message):
    with pytest.raises(ConfigError, match=message):
        check_schedule(duration, warmup)


class Classifier(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_vit()

    def forward(self, batch):
        return self.model(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])


class WatchLR(Callback):
    def __init__(self) -> None:
        self.used: list[float] = []

    def after_train_batch(self, state, logger):
        # Inside the optimizer's closure: the step that follows uses this value.
        self.used.append(state.optimizers[0].param_groups[0]["lr"])


def fit(optimizer: Optimizer, max_duration: str, schedule: CosineWithWarmup, **options) -> tuple[Trainer, list[float]]:
    """Four batches of 8 images an epoch; returns the Trainer and the learning rate of every batch and the next."""
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(32, 3, 16, 16, generator=generator), torch.arange(32) % 5
    task, watch = Classifier(), WatchLR()
    trainer = Trainer(
        model=task,
        train_dataloader=DataLoader(TensorDataset(images, labels), batch_size=8),
        max_duration=max_duration,
        optimizers=build_optimizer(task.model, optimizer, global_train_batch_size=8),
        schedulers=schedule,
        callbacks=[watch],
        device="cpu",
        progress_bar=False,
        **options,
    )
    trainer.fit()
    trainer.close()
    return trainer, [*watch.used, trainer.state.optimizers[0].param_groups[0]["lr"]]


SHAPE = {"alpha_i": 0.1, "alpha_f": 0.01}
FIXED_LR = replace(ADAMW, name="sgd", lr=2e-3, lr_scaling="none")


@pytest.mark.parametrize(
    ("max_duration", "t_warmup", "total", "warmup"),
    [
        ("3ep", "1ep", 12, 4),
        ("3ep", "5ba", 12, 5),
        ("10ba", "0.25dur", 10, 2.5),
        ("76sp", "16sp", 10, 2),
        ("2ep", "0ba", 8, 0),
    ],
)
@pytest.mark.parametrize("cosine_from", ["start", "warmup"])
def test_trainer_uses_the_schedule_without_lag(max_duration, t_warmup, total, warmup, cosine_from):
    schedule = CosineWithWarmup(t_warmup, **SHAPE, cosine_from=cosine_from, global_train_batch_size=8)
    _, used = fit(FIXED_LR, max_duration, schedule)
    expected = [2e-3 * cosine_with_warmup(t, total, warmup, **SHAPE, cosine_from=cosine_from) for t in range(total + 1)]
    assert used == pytest.approx(expected, rel=1e-12)


def test_trainer_refuses_a_warmup_longer_than_the_run():
    with pytest.raises(ConfigError, match=r"schedule.t_warmup must be at most max_duration \(8 batches\), got '9ba"):
        fit(FIXED_LR, "2ep", CosineWithWarmup("9ba", **SHAPE, cosine_from="start", global_train_batch_size=8))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_resumed_trainer_ends_bitwise_equal(name, tmp_path):
    def run(**options):
        schedule = CosineWithWarmup("2ba", **SHAPE, cosine_from="start", global_train_batch_size=8)
        return fit(replace(ADAMW, name=name, lr=1e-3, lr_scaling="none"), "7ba", schedule, **options)

    unbroken, lrs = run(save_folder=str(tmp_path), save_interval="3ba", save_filename="ba{batch}.pt")
    resumed, lrs_after = run(load_path=str(tmp_path / "ba3.pt"))
    assert lrs_after == lrs[3:]
    for key, value in unbroken.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[key]), key
