"""ResNet by timm behind our interface: same function, same names, every size."""

import pytest
import timm
import torch
from torch import nn

from vitcomposer.models import build_model, load_weights, model_names
from vitcomposer.models.resnet import VARIANTS

# arXiv:1512.03385's networks with 1000 classes, as torchvision counts them.
PARAMETERS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def perturb(model: nn.Module) -> None:
    """Gammas of one and heads of zero would hide differences."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * max(0.1, parameter.std(correction=0).item()))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters_and_names_are_timms(name):
    with torch.device("meta"):
        model, reference = build_model(name, num_classes=1000, image_size=224), timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    assert name in model_names()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [False, True])
def test_forward_with_timms_weights_equals_timm(name, training):
    reference = timm.create_model(name, num_classes=7)
    perturb(reference)
    model = build_model(name, num_classes=7, image_size=64)
    model.load_state_dict(reference.state_dict())
    model.train(training), reference.train(training)
    assert torch.equal(model(images()), reference(images()))


def test_without_classes_the_output_is_the_mean_of_the_features():
    model = build_model("resnet18", num_classes=0, image_size=64).eval()
    features = model.forward_features(images())
    assert features.shape == (2, 512, 2, 2) and model.num_features == 512 and model.num_prefix_tokens == 0
    torch.testing.assert_close(model(images()), features.mean(dim=(2, 3)))
    assert torch.equal(model.forward_head(features, pre_logits=True), model(images()))
    assert not any(name.startswith("fc") for name, _ in model.named_parameters())


@pytest.mark.parametrize("size", [32, 96, 112])
def test_every_size_is_accepted(size):
    assert build_model("resnet18", num_classes=0, image_size=224).eval()(images(size)).shape == (2, 512)


def test_gammas_start_at_one_and_a_new_head_has_its_classes():
    model = build_model("resnet50", num_classes=5, image_size=64)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    last_gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("bn3.weight")]
    assert len(last_gammas) == 16 and all((gamma == 1).all() for gamma in last_gammas)
    assert model.no_weight_decay() == set()


def test_timms_weights_load_into_a_trunk():
    reference = timm.create_model("resnet18")
    trunk = build_model("resnet18", num_classes=0, image_size=64).eval()
    report = load_weights(trunk, reference.state_dict())
    assert report.missing == () and set(report.unexpected) == {"fc.weight", "fc.bias"}
    torch.testing.assert_close(
        trunk(images()), reference.eval().forward_head(reference.forward_features(images()), True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path_rate": 0.1}, "model.drop_path_rate must be left out or 0 for resnet50, got 0.1"),
        ({"patch_size": 16}, "model.patch_size must be left out or 0 for resnet50, got 16"),
        ({"image_size": 16}, "model.image_size must be at least 32 for resnet50, got 16; use 32"),
    ],
)
def test_what_a_resnet_does_not_have_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_model("resnet50", **{"num_classes": 0, "image_size": 224, **options})
    model = {"drop_path_rate": 0.0, "drop_rate": 0.0, "pool": None}
    build_model("resnet18", num_classes=0, image_size=224, **model)
