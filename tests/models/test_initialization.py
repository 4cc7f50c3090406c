"""How weights start: each tensor's distribution against timm's freshly built network and the papers' code."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.models.test_vit import timm_name
from vitcomposer.models import build_model
from vitcomposer.models.positions import sincos_positions

WIDTH = 384
SMALL = {"depth": 2, "embed_dim": WIDTH, "num_heads": 6}
PIXELS = 3 * 16 * 16


def new(name: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, num_classes=1000, image_size=224, **{**SMALL, **options})


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions, by sqrt(n m / (n + m))."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    points = torch.cat((a, b))
    below = [torch.searchsorted(values, points, right=True).double() / len(values) for values in (a, b)]
    return float((below[0] - below[1]).abs().max() * math.sqrt(len(a) * len(b) / (len(a) + len(b))))


def check_alike(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Beyond 2.2 are two samples of one distribution once in eight thousand times, and the seeds are fixed."""
    assert ours.shape == theirs.shape, name
    if theirs.min() == theirs.max():
        assert torch.equal(ours, theirs), name
        return
    assert distance(ours, theirs) < 2.2, name
    n = ours.numel()
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=6 * theirs.std().item() / math.sqrt(n)), name
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=6 / math.sqrt(n)), name
    if n > 10_000:  # of fewer values the largest varies more
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.35), name


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("vit_small_patch16", {"cls_token"}),
        ("deit_small_patch16", {"cls_token"}),
        ("deit_small_distilled_patch16", {"cls_token"}),
        ("deit3_small_patch16", {"cls_token"}),
        ("convit_small", set()),
    ],
)
def test_every_tensor_starts_as_in_timms_new_network(name: str, own: set[str]) -> None:
    """The class token is that of the papers' code, N(0, 0.02^2): timm gave it another start later."""
    sizes: dict[str, Any] = SMALL
    if name == "convit_small":
        sizes = {"depth": 2, "local_up_to_layer": 1, "embed_dim": 432, "num_heads": 9}
    theirs_alone = {"convit_small": {"embed_dim": 48}, "deit3_small_patch16": {"init_values": 1e-4}}  # timm's 1e-6
    torch.manual_seed(1)
    theirs = timm.create_model(timm_name(name), **{**sizes, **theirs_alone.get(name, {})})
    ours = new(name, **sizes).state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        if key not in own:
            check_alike(ours[key], value, key)
    check_alike(ours["cls_token"], 0.02 * torch.randn(ours["cls_token"].shape), "cls_token")


def test_big_vision_starts_as_its_code_says() -> None:
    state = new("vit_small_patch16", weight_init="big_vision").state_dict()
    torch.manual_seed(1)
    theirs = timm.create_model("vit_small_patch16_224", weight_init="jax", **SMALL).state_dict()
    for key, value in theirs.items():
        # timm takes the Xavier bound of q, k and v in one, has 0.02 for positions and 1e-6 for the class token.
        if not key.endswith("qkv.weight") and key not in ("cls_token", "pos_embed"):
            check_alike(state[key], value, key)
    check_alike(state["blocks.1.attn.qkv.weight"], uniform((3 * WIDTH, WIDTH), math.sqrt(6 / (2 * WIDTH))), "qkv")
    check_alike(state["pos_embed"][:, 1:], torch.randn(1, 196, WIDTH) * WIDTH**-0.5, "pos_embed")
    assert not state["cls_token"].any() and not state["pos_embed"][:, 0].any()
    assert not state["head.weight"].any() and not state["head.bias"].any()


def test_moco3_starts_as_its_code_says() -> None:
    state = new("vit_small_patch16", weight_init="moco3", position_embedding="sincos_moco3").state_dict()
    torch.manual_seed(1)
    theirs = timm.create_model("vit_small_patch16_224", weight_init="moco", **SMALL).state_dict()
    assert theirs.keys() - state.keys() == {"pos_embed"}
    for key in state.keys() - {"patch_embed.proj.weight", "patch_embed.proj.bias"}:
        check_alike(state[key], theirs[key], key)
    expected = uniform((WIDTH, 3, 16, 16), math.sqrt(6 / (PIXELS + WIDTH)))
    check_alike(state["patch_embed.proj.weight"], expected, "patch_embed.proj.weight")
    assert not state["patch_embed.proj.bias"].any()


def uniform(shape: tuple[int, ...], bound: float) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound)


def test_no_weight_lies_beyond_what_a_normal_gives() -> None:
    """torch's trunc_normal_ with bounds of 100 standard deviations gives -2 once in 2^24 times."""
    torch.manual_seed(0)
    weights = torch.cat([new("deit_small_patch16", seed).state_dict()["head.weight"].flatten() for seed in range(3)])
    assert weights.abs().max() < 0.02 * 6.5


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "deit3_small_patch16", "convit_tiny", "resnet18"])
def test_replaced_head_starts_anew_as_the_first_did(name: str) -> None:
    options = {} if name == "resnet18" else {"depth": 1, **({"local_up_to_layer": 0} if "convit" in name else {})}
    model = build_model(name, num_classes=1000, image_size=32, **options)
    head = "fc" if name == "resnet18" else "head"
    first = model.state_dict()[f"{head}.weight"]
    model.reset_classifier(1000)
    second = model.state_dict()[f"{head}.weight"]
    assert first.std() > 0.01 and not torch.equal(first, second)
    check_alike(second, first, head)


def test_first_loss_is_exactly_the_uniform_one_with_big_visions_zero_head() -> None:
    model = new("vit_small_patch16", weight_init="big_vision")
    loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 224, 224)), torch.arange(2))
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_positions_of_moco3_follow_its_code() -> None:
    """Frequencies 10000^(-i / (D / 4)), the row of a patch first, nothing for the class token."""
    positions = sincos_positions((3, 5), 16, "sincos_moco3")
    for row in range(3):
        for column in range(5):
            omega = [10000 ** (-index / 4) for index in range(4)]
            expected = [f(axis * w) for axis in (row, column) for f in (math.sin, math.cos) for w in omega]
            torch.testing.assert_close(positions[0, 5 * row + column], torch.tensor(expected), atol=1e-6, rtol=0)


def test_convit_has_one_start() -> None:
    with pytest.raises(ValueError, match=r"model\.weight_init must be deit for a ConViT, got 'moco3'"):
        build_model("convit_tiny", num_classes=2, image_size=32, weight_init="moco3")
    with pytest.raises(ValueError, match=r"model\.weight_init must be deit or big_vision or moco3, got 'xavier'"):
        build_model("vit_tiny_patch16", num_classes=2, image_size=32, weight_init="xavier")
