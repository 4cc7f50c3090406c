"""Learning rates by layer: a table by hand, timm's, and what has no layers."""

from dataclasses import replace

import pytest
import timm.optim
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.test_optim import ADAMW
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model
from vitcomposer.optim import build_optimizer, layer_lrs, param_groups

NO_DECAY = {"pos_embed", "cls_token"}


def table(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return {name_of[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


# depth 2, lr 1, decay 0.5: embedding, two blocks, norm and head
BY_HAND = {"patch_embed": 0.125, "cls_token": 0.125, "dist_token": 0.125, "pos_embed": 0.125, "blocks.0": 0.25}
BY_HAND |= {"blocks.1": 0.5, "norm": 1.0, "head": 1.0, "head_dist": 1.0}
WITH_LAYERS = ["deit_tiny_patch16", "deit_tiny_distilled_patch16", "convit_tiny"]


@pytest.mark.parametrize("name", WITH_LAYERS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "adamw_schedulefree", "muon"])
def test_layers_learn_at_the_rates_of_a_table_by_hand(name, optimizer):
    size = {"depth": 2, "embed_dim": 16, "num_heads": 4} | ({"local_up_to_layer": 1} if name == "convit_tiny" else {})
    model = build_model(name, num_classes=5, image_size=32, **size)
    config = replace(ADAMW, name=optimizer, lr=1.0, lr_scaling="none", layer_decay=0.5)
    groups = build_optimizer(model, config, global_train_batch_size=512).param_groups
    name_of = {parameter: full for full, parameter in model.named_parameters()}
    rates = {name_of[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == set(name_of.values())
    for full, rate in rates.items():
        assert rate == pytest.approx(next(v for k, v in BY_HAND.items() if full == k or full.startswith(f"{k}."))), full
    # Weight decay is as without layers, and the first group has the rate that logs call the peak.
    assert groups[0]["lr"] == 1.0
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {p: group["weight_decay"] for group in param_groups(model, 0.05) for p in group["params"]}
    if optimizer == "muon":
        assert all(group["use_fallback"] == any(p.ndim < 2 for p in group["params"]) for group in groups)


def test_rates_equal_timms_but_for_the_norm():
    size = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    reference = VisionTransformer(img_size=16, **size)
    model = build_model("vit_tiny_patch16", image_size=16, **size)
    timms = timm.optim.param_groups_layer_decay(reference, 0.05, no_weight_decay_list=NO_DECAY, layer_decay=0.7)
    expected = table(reference, [{**group, "lr": group["lr_scale"]} for group in timms])
    found = table(model, param_groups(model, 0.05, layer_lrs=layer_lrs(model, 1.0, 0.7)))
    assert found.keys() == expected.keys()
    for name, pair in found.items():
        # timm counts the norm to the last block; BEiT and MAE, and so this, to the head.
        assert pair == pytest.approx(expected[name] if not name.startswith("norm.") else (1.0, 0.0)), name


def test_layer_decay_is_refused_without_layers():
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay must be 1 for ResNet, .* got 0\.75"):
        resnet = build_model("resnet18", num_classes=5, image_size=32)
        build_optimizer(resnet, replace(ADAMW, layer_decay=0.75), global_train_batch_size=512)
