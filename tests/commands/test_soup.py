"""Model soups (arXiv:2203.05482): the mean of weights, and members chosen on a held-out split."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.conftest import PHOTOS
from vitcomposer.cli import main
from vitcomposer.commands.use.soup import check_same, greedy, last_checkpoints, mean_of
from vitcomposer.evaluation.trained import Trained, load_trained
from vitcomposer.export.folder import write_folder
from vitcomposer.models import build_model, load_weights
from vitcomposer.schema import IMAGENET_MEAN, IMAGENET_STD, Model


def member(source: str, *, seed: int = 0, scale: float = 1.0, **options: object) -> Trained:
    given = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "drop_path_rate": 0.0, **options}
    model = Model(name="deit_tiny_patch16", num_classes=len(PHOTOS), image_size=32, **given)  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = build_model(**model.options())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * 0.1 * torch.randn(parameter.shape, generator=generator))
    facts = {"image_size": 32, "crop_ratio": 0.875, "interpolation": "bicubic", "averaged": False, "source": source}
    statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return Trained(network=network.eval(), model=model, class_names=tuple(PHOTOS), **facts, **statistics)  # type: ignore[arg-type]


def test_uniform_soup_is_the_mean_in_float64() -> None:
    members = [member(str(seed), seed=seed) for seed in range(3)]
    states = [one.network.state_dict() for one in members]
    soup = mean_of(members).network.state_dict()
    assert soup.keys() == states[0].keys()
    for name, tensor in soup.items():
        expected = torch.stack([state[name].double() for state in states]).mean(dim=0)
        assert torch.equal(tensor, expected.float()), name
    assert not mean_of(members).network.training


def test_soup_keeps_whole_numbers_and_leaves_its_members_alone() -> None:
    model = Model(name="resnet18", num_classes=3, image_size=32, drop_path_rate=0.0)
    members = []
    for count in (2, 5):
        network = build_model(**model.options())
        network.bn1.num_batches_tracked.fill_(count)
        network.bn1.running_mean.fill_(count)
        members.append(dataclasses.replace(member(str(count)), network=network, model=model))
    soup = mean_of(members).network
    assert soup.bn1.num_batches_tracked.item() == 2 and soup.bn1.running_mean[0].item() == 3.5
    assert members[1].network.bn1.running_mean[0].item() == 5.0


def test_greedy_soup_on_real_images_is_never_below_the_best_model(
    photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitcomposer.evaluation.accuracy import measure, open_labelled

    trained = member("start", scale=0.0)
    data = open_labelled(str(photo_folder), trained, batch_size=48, workers=0)
    batch = next(iter(data.loader))
    images, labels = data.normalize({"image": batch["image"]})["image"], batch["label"].long()
    # Members are trained on the very split they are chosen by: what counts here is only that they differ and are good.
    folders = []
    for seed, steps in ((1, 25), (2, 25), (3, 1)):
        one = member(str(seed), scale=0.0)
        one.network.train()
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(one.network.parameters(), lr=3e-3)
        for _ in range(steps):
            some = torch.randperm(len(images))[:32]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(one.network(images[some]), labels[some]).backward()
            optimizer.step()
        one.network.eval()
        write_folder(one, tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    singles = measure({folder: load_trained(folder).network for folder in folders}, data)
    best = max(scores.top1 for scores in singles.values())
    assert best > min(scores.top1 for scores in singles.values())
    del data, batch

    out = str(tmp_path / "soup")
    command = ["soup", *folders, "--out", out, "--method", "greedy", "--data", str(photo_folder), "--split", "val"]
    assert main([*command, "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "the best alone" in printed and printed.count("% alone)") == 2
    soup = load_trained(out)
    score = measure({"soup": soup.network}, open_labelled(str(photo_folder), soup, batch_size=48, workers=0))["soup"]
    assert score.top1 >= best
    assert "arXiv:2203.05482" in (Path(out) / "README.md").read_text()
    report = load_weights(build_model(**soup.model.options()), Path(out) / "model.safetensors", min_matched=1.0)
    assert not report.missing and not report.replaced_heads


def test_greedy_soup_takes_who_helps_from_the_best_on() -> None:
    members = []
    for source, weight in (("far", 5.0), ("above", 2.2), ("below", 1.9)):
        one = member(source, scale=0.0)
        one.network.norm.weight.data[0] = weight
        members.append(one)

    def nearness_to_two(models: Mapping[str, Trained]) -> dict[str, float]:
        return {name: 1 - abs(one.network.norm.weight[0].item() - 2) for name, one in models.items()}

    assert [one.source for one in greedy(members, nearness_to_two)] == ["below", "above"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 2}, r"b must be the same network on the same input as a: model.depth is 2 there, 1 here"),
        ({"pool": "avg"}, r"model.pool is 'avg' there, 'token' here"),
        ({"qkv_bias": False}, r"model.qkv_bias is False there, True here"),
    ],
)
def test_soup_names_the_first_difference(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_same(member("a"), member("b", **change))  # type: ignore[arg-type]


def test_soup_of_other_classes_or_another_input_is_refused() -> None:
    first = member("a")
    check_same(first, member("b", drop_path_rate=0.2))
    check_same(first, dataclasses.replace(first, class_names=None))
    with pytest.raises(ValueError, match="class names"):
        check_same(first, dataclasses.replace(first, class_names=tuple(reversed(PHOTOS))))
    with pytest.raises(ValueError, match=r"augment.mean is \(0.5, 0.5, 0.5\) there"):
        check_same(first, dataclasses.replace(first, mean=(0.5, 0.5, 0.5)))


def test_last_checkpoints_of_a_run_are_those_of_the_last_steps(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("ep9-ba90", "ep10-ba100", "ep1-ba10", "latest"):
        (folder / f"{name}-rank0.pt").touch()
    names = [Path(path).name for path in last_checkpoints(str(tmp_path), 2)]
    assert names == ["ep9-ba90-rank0.pt", "ep10-ba100-rank0.pt"]
    assert last_checkpoints(str(tmp_path), None) == [str(tmp_path)]
    with pytest.raises(ValueError, match="--last must be at most the 3 checkpoints"):
        last_checkpoints(str(tmp_path), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--method", "greedy", "--data", "d"], "--split must be given for --method greedy"),
        (["a", "b", "--split", "val"], "--data must be given together with --split"),
        (["."], "CHECKPOINT must be two or more models"),
        (["a"], "There is no a. Give run folders"),
        (["a", "--last", "0"], "--last must be 1 or more"),
    ],
)
def test_soup_command_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["soup", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
