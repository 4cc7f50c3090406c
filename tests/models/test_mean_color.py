import pytest
import torch

from vitcomposer.models import build_model


def test_mean_color_learns_from_the_mean_alone() -> None:
    model = build_model("mean_color", num_classes=2, image_size=224, drop_path_rate=0.0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 2
    images = torch.rand(16, 3, 64, 64, generator=generator) + labels.view(-1, 1, 1, 1) - 1
    shifted = images.roll((16, 32), (2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = last = float("nan")
    for step in range(50):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        first, last = (loss.item() if step == 0 else first), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(0.6931, abs=1e-3)
    assert last < 0.5 * first
    torch.testing.assert_close(model(images), model(shifted))


def test_mean_color_refuses_an_option_it_would_ignore() -> None:
    with pytest.raises(ValueError, match=r"model\.depth must be left out or 0 for mean_color, got 12"):
        build_model("mean_color", num_classes=2, image_size=224, depth=12)
