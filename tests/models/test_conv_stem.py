"""The convolutional stem (``model.stem=conv``) against its equations, and in each family of networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitcomposer.cost.flops import forward_flops
from vitcomposer.models import build_model
from vitcomposer.models.layers import ConvStem
from vitcomposer.models.weights.load import load_weights

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "stem": "conv"}
FAMILIES = [
    ("vit_tiny_patch16", {"class_token": False, "pool": "avg"}),
    ("deit_tiny_distilled_patch16", {}),
    ("convit_tiny", {"local_up_to_layer": 1}),
]


def small(name: str = "vit_tiny_patch16", **options) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=5, image_size=32, **{**SMALL, **options})


def test_channels_are_those_of_the_paper() -> None:
    stem = ConvStem(16, 192)
    convs = [module for module in stem.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [24, 48, 96, 192, 192]  # arXiv:2106.14881, appendix A, 1GF
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 2, 1] and [conv.kernel_size[0] for conv in convs[3:]] == [
        3,
        1,
    ]


@pytest.mark.parametrize("training", [True, False])
def test_tokens_follow_from_convolution_norm_and_relu(training: bool) -> None:
    torch.manual_seed(0)
    stem = ConvStem(4, 8).double().train(training)
    images = torch.randn(3, 3, 8, 16, dtype=torch.float64)
    x, state = images, {key: value.clone() for key, value in stem.state_dict().items()}
    for step in ("convs.0", "convs.1"):
        x = F.conv2d(x, state[f"{step}.0.weight"], stride=2, padding=1)
        mean, var = state[f"{step}.1.running_mean"], state[f"{step}.1.running_var"]
        if training:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = (x * state[f"{step}.1.weight"][:, None, None] + state[f"{step}.1.bias"][:, None, None]).clamp(min=0)
    expected = F.conv2d(x, state["proj.weight"], state["proj.bias"]).flatten(2).mT  # (3, 8, 8)
    tokens, grid = stem(images)
    assert grid == (2, 4)
    torch.testing.assert_close(tokens, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_every_family_takes_it_at_any_size(name: str, options: dict[str, object]) -> None:
    model = small(name, **options).train()
    outputs = model(torch.randn(4, 3, 48, 24))
    (sum(outputs) if isinstance(outputs, tuple) else outputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.patch_embed.parameters())
    assert {model.layer_of(key) for key, _ in model.named_parameters() if key.startswith("patch_embed.")} == {0}
    linear = small(name, **{**options, "stem": "linear"})
    assert forward_flops(model, 32) - forward_flops(linear, 32) == 2 * (
        (16 * 16 * 27 * 8 + 8 * 8 * 72 * 16 + 4 * 4 * 144 * 32 + 4 * 4 * 32 * 32) - 4 * 4 * 192 * 32
    )
    with pytest.raises(ValueError, match=r"model\.patch_size=8, got 36 x 24; crop to 32 x 24"):
        model(torch.randn(1, 3, 36, 24))


def test_a_frozen_stem_keeps_its_statistics() -> None:
    model = small()
    model.freeze_below(1)
    model.train()
    before = {key: value.clone() for key, value in model.patch_embed.state_dict().items()}
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in model.patch_embed.state_dict().items())
    assert all(parameter.grad is None for parameter in model.patch_embed.parameters())


def test_weights_fill_it_with_their_statistics(tmp_path) -> None:
    trained, model = small().train(), small().eval()
    trained(torch.randn(8, 3, 32, 32) + 1)
    torch.save({"model": trained.state_dict()}, tmp_path / "stem.pth")
    load_weights(model, tmp_path / "stem.pth")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), trained.eval()(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "convs"}, r"model\.stem must be linear or conv, got 'convs'"),
        ({"patch_size": 12}, r"model\.patch_size must be a power of 2 for model\.stem=conv, got 12; use 8 or 16"),
        ({"patch_size": 1}, r"model\.patch_size must be a power of 2 for model\.stem=conv, got 1; use 2 or 4"),
        ({"embed_dim": 36, "patch_size": 16}, r"model\.embed_dim must be divisible by 8, half .*, got 36"),
    ],
)
def test_what_has_no_stem_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
