"""What a transformer adds for fine-tuning: layers, frozen blocks, qkv biases, combined heads."""

import copy

import pytest
import timm
import torch
from torch import nn

from vitcomposer.models import build_model, load_weights

OPTIONS = {"depth": 3, "embed_dim": 32, "num_heads": 4}
NAMES = ["deit_tiny_patch16", "deit_tiny_distilled_patch16", "deit3_small_patch16", "convit_tiny"]


def small(name: str = "deit_tiny_patch16", *, seed: int = 0, **options):
    torch.manual_seed(seed)
    local = {"local_up_to_layer": 2} if name.startswith("convit") else {}
    model = build_model(name, num_classes=5, image_size=32, **{**OPTIONS, **local, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_its_layer(name: str) -> None:
    model = small(name)
    layers = {key: model.layer_of(key) for key, _ in model.named_parameters()}
    assert {key for key, layer in layers.items() if layer == 0} == {
        key for key in layers if key.startswith(("cls_token", "dist_token", "pos_embed", "patch_embed."))
    }
    for index in range(3):
        inside = {key for key, layer in layers.items() if layer == index + 1}
        assert inside == {key for key in layers if key.startswith(f"blocks.{index}.")} and inside
    assert {key.split(".")[0] for key, layer in layers.items() if layer == 4} <= {"norm", "head", "head_dist"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_blocks", [0, 1, 3])
def test_backward_pass_stops_below_what_learns(name: str, train_blocks: int) -> None:
    model = small(name, drop_path_rate=0.5, drop_rate=0.3).train()
    model.freeze_below(train_blocks)
    asked_for_gradient: dict[int, bool] = {}
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _m, _i, out, index=index: asked_for_gradient.update({index: out.requires_grad})
        )
    outputs = model(torch.randn(2, 3, 32, 32))
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(head.square().sum() for head in heads).backward()
    # No graph is recorded for a frozen block, so none of its activations is kept and nothing goes back through it.
    assert asked_for_gradient == {index: index >= 3 - train_blocks for index in range(3)}
    learning = {key.split(".")[0] for key, p in model.named_parameters() if p.grad is not None}
    assert learning - {"blocks"} == {
        "head",
        *(["norm"] if train_blocks else []),
        *(["head_dist"] if len(heads) == 2 else []),
    }
    blocks = {
        key.split(".")[1] for key, p in model.named_parameters() if key.startswith("blocks.") and p.grad is not None
    }
    assert blocks == {str(index) for index in range(3 - train_blocks, 3)}


def test_frozen_blocks_do_not_drop() -> None:
    model = small(drop_path_rate=0.5, drop_path_mode="constant", drop_rate=0.3)
    model.freeze_below(1)
    features: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda _m, _i, out: features.append(out))
    model.blocks[2].register_forward_hook(lambda _m, _i, out: features.append(out))
    images = torch.randn(4, 3, 32, 32)
    for mode in (True, False, True):
        model.train(mode)(images)
    assert torch.equal(features[0], features[2]) and torch.equal(features[0], features[4])
    assert not torch.equal(features[1], features[5]), "what learns is still regularised"
    assert copy.deepcopy(model).train().blocks[0].training is False


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="init.train_blocks must be at most the 3 blocks of the model, got 4"):
        small().freeze_below(4)


def test_probabilities_of_both_heads_are_averaged() -> None:
    model = small("deit_tiny_distilled_patch16", combine_heads="probabilities").double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    first, second = model.train()(images)
    expected = ((first.softmax(dim=1) + second.softmax(dim=1)) / 2).log()
    torch.testing.assert_close(model.eval()(images), expected, rtol=0, atol=1e-12)
    plain = small("deit_tiny_distilled_patch16").double().eval()
    torch.testing.assert_close(plain(images), (first + second) / 2, rtol=0, atol=1e-12)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("name", ["deit_tiny_patch16", "convit_tiny", "resnet18"])
@pytest.mark.parametrize("value", ["logits", "probabilities"])
def test_combined_heads_are_refused_with_one_head(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"model\.combine_heads"):
        build_model(name, num_classes=5, image_size=32, combine_heads=value)


def test_unknown_way_to_combine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.combine_heads must be logits or probabilities, got 'mean'"):
        build_model("deit_tiny_distilled_patch16", num_classes=5, image_size=32, combine_heads="mean")


@pytest.mark.parametrize(
    ("name", "timms"), [("vit_tiny_patch16", "vit_tiny_patch16_224"), ("convit_tiny", "convit_tiny")]
)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_networks_with_and_without_qkv_bias_equal_timms(name: str, timms: str, qkv_bias: bool) -> None:
    convit = name.startswith("convit")
    size = {**OPTIONS, "embed_dim": 8, "local_up_to_layer": 2} if convit else OPTIONS  # timm's ConViT counts per head
    reference = timm.create_model(timms, num_classes=5, img_size=32, qkv_bias=qkv_bias, **size).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = small(name, seed=1, qkv_bias=qkv_bias).eval()
    assert load_weights(model, reference.state_dict()).matched == 1.0
    assert ("blocks.0.attn.qk.bias" if convit else "blocks.0.attn.qkv.bias") in model.state_dict() or not qkv_bias
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=1e-5)


def test_names_keep_their_published_biases() -> None:
    def has_bias(model: nn.Module) -> bool:
        return any(".attn.q" in key and key.endswith("bias") for key in model.state_dict())

    assert has_bias(small("deit3_small_patch16")) and not has_bias(small("convit_tiny"))
