"""Batch norm over ranks: three gloo ranks against one process with the joint batch of each group."""

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.gloo_ranks import on_ranks
from vitcomposer.models import build_model, convert_sync_bn
from vitcomposer.models.batch_norm import SyncBatchNorm

RANKS, WIDTH = 3, 4
SIZES = (2, 3, 4)  # images of each rank
GROUPS: dict[Any, list[list[int]]] = {
    "none": [[0], [1], [2]],
    1: [[0], [1], [2]],
    2: [[0, 1], [2]],
    "node": [[0, 1], [2]],  # LOCAL_WORLD_SIZE is 2
    3: [[0, 1, 2]],
    8: [[0, 1, 2]],
    "global": [[0, 1, 2]],
}


def new_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.extend([nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, affine=False)])
    nn.init.uniform_(model[1].weight)
    nn.init.uniform_(model[1].bias)
    return model.to(dtype)


def images(rank: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(SIZES[rank], 3, 6, 6, dtype=torch.float64, generator=generator) + rank + offset


def two_steps(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Output, gradients and running statistics after two training steps, and the output in evaluation."""
    inputs = inputs.clone().requires_grad_()
    output = model(inputs)
    output = model(inputs)
    (output * output.detach().cos()).sum().backward()
    result = {"output": output.detach(), "input_gradient": inputs.grad}
    result["gradients"] = {name: parameter.grad for name, parameter in model.named_parameters()}
    result["buffers"] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result["evaluated"] = model.eval()(inputs.detach()).detach()
    return result


def converted_resnet() -> dict[str, Any]:
    model = build_model("resnet18", num_classes=0, image_size=32)
    parameters, names = dict(model.named_parameters()), list(model.state_dict())
    model.layer1.eval()
    assert convert_sync_bn(model, "global") is model
    return {
        "layers": sum(isinstance(module, SyncBatchNorm) for module in model.modules()),
        "parameters": all(parameters[name] is parameter for name, parameter in model.named_parameters()),
        "names": list(model.state_dict()) == names,
        "mode": not model.layer1[0].bn1.training and model.layer2[0].bn1.training,
    }


def results_of_rank() -> dict[Any, Any]:
    rank = dist.get_rank()
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    results: dict[Any, Any] = {g: two_steps(convert_sync_bn(new_model(), g), images(rank)) for g in GROUPS}

    model = convert_sync_bn(new_model(), 2)
    copied = copy.deepcopy(model)
    results["copied"] = two_steps(copied, images(rank))
    results["copy is its own"] = all(a is not b for a, b in zip(model.parameters(), copied.parameters(), strict=True))

    # DDP refuses torch's own class on CPUs.
    wrapped = nn.parallel.DistributedDataParallel(convert_sync_bn(new_model(), "global"))
    results["wrapped"] = wrapped(images(rank)).detach()
    results["converted"] = converted_resnet()
    far = convert_sync_bn(nn.BatchNorm2d(3), "global")
    results["far from zero"] = far(images(rank, offset=1000.0).float()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results["half"] = convert_sync_bn(nn.BatchNorm2d(3), "global")(images(rank).bfloat16()).detach()
    os.environ["WORLD_SIZE"] = "6"
    try:
        convert_sync_bn(new_model(), "global")
    except RuntimeError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return on_ranks(results_of_rank, RANKS, tmp_path_factory.mktemp("ranks"))


def assert_equals_joint_batch(results: list[dict[str, Any]], chunk: list[int]) -> None:
    """``results`` of the ranks of ``chunk`` against plain batch norm on all their images."""
    joint = two_steps(new_model(), torch.cat([images(rank) for rank in chunk]))
    for key in ("output", "input_gradient", "evaluated"):
        torch.testing.assert_close(torch.cat([result[key] for result in results]), joint[key])
    for name, expected in joint["gradients"].items():
        torch.testing.assert_close(sum(result["gradients"][name] for result in results), expected)
    for result in results:
        assert list(result["buffers"]) == list(joint["buffers"])
        for name, expected in joint["buffers"].items():
            torch.testing.assert_close(result["buffers"][name], expected)


@pytest.mark.parametrize("group", GROUPS)
def test_group_equals_one_process_with_its_joint_batch(ranks: list[dict[Any, Any]], group: Any) -> None:
    for chunk in GROUPS[group]:
        assert_equals_joint_batch([ranks[rank][group] for rank in chunk], chunk)


def test_groups_differ_by_their_statistics(ranks: list[dict[Any, Any]]) -> None:
    means = {group: [rank[group]["buffers"]["1.running_mean"] for rank in ranks] for group in (1, 2, 3)}
    assert torch.equal(means[3][0], means[3][1]) and torch.equal(means[3][1], means[3][2])
    assert torch.equal(means[2][0], means[2][1]) and not torch.allclose(means[2][1], means[2][2])
    assert not torch.allclose(means[1][0], means[1][1])


def test_layers_work_under_ddp(ranks: list[dict[Any, Any]]) -> None:
    joint = new_model()(torch.cat([images(rank) for rank in range(RANKS)])).detach()
    torch.testing.assert_close(torch.cat([rank["wrapped"] for rank in ranks]), joint)


def test_copy_keeps_the_group(ranks: list[dict[Any, Any]]) -> None:
    assert_equals_joint_batch([rank["copied"] for rank in ranks[:2]], [0, 1])
    assert all(rank["copy is its own"] for rank in ranks)


def test_small_variance_beside_a_large_mean_keeps_its_digits(ranks: list[dict[Any, Any]]) -> None:
    joint = torch.cat([images(rank, offset=1000.0) for rank in range(RANKS)])
    found = torch.cat([rank["far from zero"] for rank in ranks]).double()
    expected = nn.BatchNorm2d(3).double()(joint).detach()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_half_precision_stays_half_with_statistics_in_float32(ranks: list[dict[Any, Any]]) -> None:
    joint = torch.cat([images(rank).bfloat16() for rank in range(RANKS)]).float()
    found = torch.cat([rank["half"] for rank in ranks])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, nn.BatchNorm2d(3)(joint).bfloat16().detach(), atol=0.02, rtol=0.01)


def test_fewer_ranks_than_launched_is_an_error(ranks: list[dict[Any, Any]]) -> None:
    assert all("needs torch.distributed's process group" in rank["error"] for rank in ranks)


@pytest.mark.parametrize("group", ["none", "global", "node", 1, 8, 0, -1])
def test_one_rank_changes_nothing(group: Any) -> None:
    model = new_model()
    assert convert_sync_bn(model, group) is model
    assert not any(isinstance(module, SyncBatchNorm) for module in model.modules())


@pytest.mark.parametrize("group", ["all", -2, True, False, 1.5])
def test_other_groups_are_refused(group: Any) -> None:
    with pytest.raises(ValueError, match="sync_bn must be none, global, node or a number of ranks, got"):
        convert_sync_bn(new_model(), group)


def test_conversion_keeps_parameters_names_and_mode(ranks: list[dict[Any, Any]]) -> None:
    assert all(rank["converted"] == {"layers": 20, "parameters": True, "names": True, "mode": True} for rank in ranks)
