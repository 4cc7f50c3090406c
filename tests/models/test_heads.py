"""Projection heads: layers, unit lengths, prototypes and starts."""

import copy

import pytest
import torch
from torch import nn

from vitcomposer.models import DINOHead, MLPHead, SwAVHead

FEATURES = 24


def features(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(0))


def layers(head: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in head]


def test_mlp_without_batch_norm_is_linear_layers_with_biases():
    head = MLPHead([FEATURES, 16, 12, 4], batch_norm=False)
    assert layers(head) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    x = features()
    for index in (0, 2):
        x = (x @ head[index].weight.T + head[index].bias).clamp(min=0)
    torch.testing.assert_close(head(features()), x @ head[4].weight.T + head[4].bias)


def test_mlp_with_batch_norm_has_no_bias_before_it():
    head = MLPHead([FEATURES, 16, 4], batch_norm=True, activation="gelu")
    assert layers(head) == ["Linear", "BatchNorm1d", "GELU", "Linear"]
    assert head[0].bias is None and head[1].affine and head[3].bias is not None


def test_last_batch_norm_has_no_parameters_and_normalises_the_output():
    head = MLPHead([FEATURES, 16, 16, 4], batch_norm=True, last_batch_norm=True)  # MoCo-v3's projector
    assert layers(head)[-2:] == ["Linear", "BatchNorm1d"]
    assert not head[-1].affine and head[-2].bias is None
    output = head(features(64))
    torch.testing.assert_close(output.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.std(dim=0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_swav_head_gives_unit_embeddings_and_their_cosines():
    head = SwAVHead([FEATURES, 16, 6], True, [5, 7])
    embeddings, scores = head(features())
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(8))
    assert [s.shape for s in scores] == [(8, 5), (8, 7)]
    for found, weight in zip(scores, head.prototypes, strict=True):
        torch.testing.assert_close(found, embeddings @ weight.T)
        assert found.abs().max() <= 1 + 1e-6


def test_prototypes_have_unit_length_from_the_start_and_after_normalising():
    head = SwAVHead([FEATURES, 6], False, [5, 7])
    names = [name for name, _ in head.named_parameters() if name.startswith("prototypes")]
    assert names == ["prototypes0.weight", "prototypes1.weight"]
    before = head.prototypes
    for weight in before:
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))
    directions = [weight.detach().clone() for weight in before]
    with torch.no_grad():
        for weight in before:
            weight.mul_(torch.rand(len(weight), 1) + 0.5)
    head.normalize_prototypes()
    assert all(new is old for new, old in zip(head.prototypes, before, strict=True)), "an optimizer holds them"
    for weight, direction in zip(head.prototypes, directions, strict=True):
        torch.testing.assert_close(weight.detach(), direction)


def test_swav_scores_are_float32_under_autocast():
    head = SwAVHead([FEATURES, 16, 6], True, [5]).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, (scores,) = head(features())
    assert embeddings.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(scores, embeddings @ head.prototypes[0].T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_dino_head_is_cosines_with_the_directions_times_lengths(norm_last_layer):
    head = DINOHead(FEATURES, 10, norm_last_layer=norm_last_layer)
    unit = nn.functional.normalize
    expected = unit(head.projection(features()), dim=1) @ unit(head.last_layer.direction, dim=1).T
    torch.testing.assert_close(head(features()), expected)
    names = {name for name, _ in head.named_parameters() if name.startswith("last_layer.")}
    assert names == {"last_layer.direction"} | (set() if norm_last_layer else {"last_layer.length"})
    if not norm_last_layer:
        with torch.no_grad():
            head.last_layer.length.mul_(3)
        torch.testing.assert_close(head(features()), 3 * expected)


def test_dino_head_equals_torchs_weight_norm():
    head = DINOHead(FEATURES, 10, norm_last_layer=False)
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(256, 10, bias=False))
    with torch.no_grad():
        head.last_layer.length.uniform_(0.5, 2)
        linear.parametrizations.weight.original0.copy_(head.last_layer.length)
        linear.parametrizations.weight.original1.copy_(head.last_layer.direction)
    x = torch.randn(4, 256)
    torch.testing.assert_close(head.last_layer(x), linear(x))


def test_dino_head_has_the_papers_layers_and_start():
    head = DINOHead(384, 64)
    shapes = [tuple(layer.weight.shape) for layer in head.projection if isinstance(layer, nn.Linear)]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]
    assert layers(head.projection) == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    for layer in (head.projection[0], head.projection[2], head.projection[4]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert (layer.bias == 0).all()


@pytest.mark.parametrize(
    "head",
    [
        lambda: MLPHead([FEATURES, 16, 4], batch_norm=True, last_batch_norm=True),
        lambda: SwAVHead([FEATURES, 16, 6], True, [5, 7]),
        lambda: DINOHead(FEATURES, 10, norm_last_layer=False),
    ],
)
def test_head_compiles_to_one_graph_copies_and_gives_every_parameter_a_gradient(head):
    built = head()
    copied = copy.deepcopy(built)
    output = torch.compile(built, backend="eager", fullgraph=True)(features())
    expected = copied(features())
    torch.testing.assert_close(output, expected)
    outputs = [output] if isinstance(output, torch.Tensor) else output[1]
    sum(part.square().sum() for part in outputs).backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLPHead([8], batch_norm=False), r"dims must be two or more widths.*got \[8\]"),
        (lambda: MLPHead([8, 0], batch_norm=False), r"dims must be two or more widths.*got \[8, 0\]"),
        (lambda: MLPHead([8, 4], batch_norm=False, activation="tanh"), "activation must be relu or gelu, got 'tanh'"),  # type: ignore[arg-type]
        (lambda: SwAVHead([8, 4], True, []), r"num_clusters must be one or more numbers of prototypes, got \[\]"),
        (lambda: SwAVHead([8, 4], True, [3000, 0]), r"num_clusters must be .* got \[3000, 0\]"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
