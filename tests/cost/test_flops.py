import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from vitcomposer.cost.flops import forward_flops, head_flops, multi_crop_flops, train_flops
from vitcomposer.cost.gpus import GPUS, peak_flops
from vitcomposer.cost.roofline import forward_work
from vitcomposer.models import DINOHead, SwAVHead, build_model


def build(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, num_classes=1000, image_size=224, **options)


# GFLOP of one image of 224 pixels; timm's ConViT has the explicit attention map of the paper, ours counts as much.
@pytest.mark.parametrize(
    "name, gigaflops",
    [
        ("deit_tiny_patch16", 2.51),
        ("deit_small_patch16", 9.20),
        ("deit_small_distilled_patch16", 9.25),
        ("deit_base_patch16", 35.1),
        ("vit_large_patch16", 123.0),
        ("convit_tiny", 2.50),
        ("convit_small", 11.49),
        ("convit_base", 35.0),
    ],
)
def test_flops_agree_with_published_counts(name: str, gigaflops: float) -> None:
    assert forward_flops(build(name), 224) == pytest.approx(gigaflops * 1e9, rel=0.01)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_224", "convit_tiny"])
def test_flops_are_those_of_timm(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert forward_flops(build(name.removesuffix("_224")), 224) == pytest.approx(forward_flops(theirs, 224), rel=0.01)


@pytest.mark.parametrize(
    "name, factors",
    [
        ("deit_small_patch16", {96: 0.176, 128: 0.313, 160: 0.493, 192: 0.721}),
        ("deit_base_patch16", {96: 0.182, 192: 0.728}),
    ],
)
def test_smaller_images_cost_the_published_share(name: str, factors: dict[int, float]) -> None:
    model = build(name)
    full = forward_flops(model, 224)
    found = {size: forward_flops(model, size) / full for size in factors}
    assert found == pytest.approx(factors, rel=0.01)


def test_dropped_patches_cost_nothing() -> None:
    model = build("deit_small_patch16", drop_path_rate=0.5, drop_rate=0.1)
    full = forward_flops(model, 224)
    found = [forward_flops(model, 224, patch_keep_rate=rate) / full for rate in (0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0.249, 0.489, 0.740, 1.0], rel=0.01)
    assert getattr(model, "num_patches_kept", None) is None and model.training


def test_convit_cannot_drop_patches() -> None:
    with pytest.raises(ValueError, match="patch dropout needs a ViT or DeiT, got ConViT"):
        forward_flops(build("convit_tiny"), 224, patch_keep_rate=0.5)


def test_multi_crop_is_the_sum_of_its_crops() -> None:
    model = build("vit_tiny_patch16", depth=2)
    sizes = {size: forward_flops(model, size) for size in (224, 96)}
    assert multi_crop_flops(model, [224] * 2 + [96] * 6) == 2 * sizes[224] + 6 * sizes[96]


def test_heads_cost_one_product_with_each_of_their_matrices() -> None:
    swav, dino = SwAVHead((8, 16, 4), True, (3, 5)), DINOHead(8, 10, norm_last_layer=False)
    assert head_flops(swav) == 2 * (8 * 16 + 16 * 4 + 4 * 3 + 4 * 5)
    assert head_flops(dino) == 2 * (8 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 10)
    trunk = build("vit_tiny_patch16", depth=1)
    assert multi_crop_flops(trunk, [32, 32], [swav]) == 2 * (forward_flops(trunk, 32) + head_flops(swav))


def test_training_step_costs_a_backward_pass_through_the_blocks_that_learn() -> None:
    model = build("vit_tiny_patch16", depth=4)
    factors = [train_flops(model, 32, train_blocks=blocks) / forward_flops(model, 32) for blocks in (None, 4, 2, 0)]
    assert factors == [3, 3, 2, 1]


def test_work_counts_tokens_and_layers() -> None:
    work, tokens = forward_work(build("deit_small_patch16"), 224), 197
    assert work is not None and work.width == 384
    assert work.attention_flops == 12 * 4 * tokens**2 * 384
    assert work.elementwise_bytes == 48 * 384 * tokens * 12
    kept = forward_work(build("deit_small_patch16"), 224, patch_keep_rate=0.5)
    assert kept is not None and kept.attention_flops == 12 * 4 * 99**2 * 384
    convit = forward_work(build("convit_small"), 224)
    assert convit is not None and convit.attention_flops == 4 * (10 * 196**2 + 2 * 197**2) * 432
    assert forward_work(nn.Linear(2, 2), 224) is None


def test_peaks_are_those_of_composer() -> None:
    from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS as theirs

    names = {"h200": "h200-sxm", "h100": "h100-sxm", "v100": "v100-sxm", "v100s": "v100s-pcie"}
    for name, gpu in GPUS.items():
        row = theirs.get(names.get(name, name), {})
        for precision in ("bf16", "fp16", "tf32", "fp32"):
            if precision in row and precision in gpu.peaks:
                assert gpu.peaks[precision] == pytest.approx(row[precision], rel=1e-3), (name, precision)
    assert sum(names.get(name, name) in theirs for name in GPUS) == 9


def test_attention_counts_on_a_cpu() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, embed_dim=64, num_heads=2)
    tokens, width = 197, 64
    patches = 196 * (16 * 16 * 3) * width
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    assert forward_flops(model, 224) == 2 * (patches + block)


def test_model_stays_as_it_was() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, drop_rate=0.5).train()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert forward_flops(model, 32) > 0
    assert all(module.training for module in model.modules())
    assert all(p.device.type == "cpu" and p.requires_grad == n.startswith("head") for n, p in model.named_parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_cached_tensors_of_a_used_model_do_not_mix_devices() -> None:
    # After a forward pass timm's ConViT keeps relative positions in a plain attribute.
    model = timm.create_model("convit_tiny", img_size=64, depth=2, local_up_to_layer=1).eval()
    before = forward_flops(model, 64)
    model(torch.zeros(1, 3, 64, 64))
    assert forward_flops(model, 64) == before > 0


@pytest.mark.parametrize(
    "name, precision, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", "amp_bf16", 989.5),
        ("NVIDIA H100 PCIe", "amp_bf16", 756.5),
        ("NVIDIA H100 NVL", "amp_bf16", 835),
        ("NVIDIA H200", "amp_bf16", 989.5),
        ("NVIDIA GH200 480GB", "amp_fp16", 989.5),
        ("NVIDIA H200", "fp32", 494.5),
        ("NVIDIA B200", "amp_bf16", 2250),
        ("NVIDIA GB200", "amp_bf16", 2500),
        ("NVIDIA A100-SXM4-80GB", "amp_bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 156),
        ("NVIDIA A10", "amp_bf16", 125),
        ("NVIDIA L4", "amp_bf16", 121),
        ("NVIDIA L40", "amp_bf16", 181.05),
        ("NVIDIA L40S", "amp_bf16", 362.05),
        ("Tesla V100-SXM2-16GB", "amp_fp16", 125),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla T4", "amp_fp16", 65),
        ("NVIDIA RTX A6000", "amp_bf16", 154.8),
        ("NVIDIA GeForce RTX 4090", "amp_bf16", 165.2),
        ("Tesla T4", "amp_bf16", None),
        ("NVIDIA A10G", "amp_bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "amp_bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "amp_bf16", None),
        ("NVIDIA H20", "amp_bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_is_the_dense_one_of_that_device(name: str, precision: str, teraflops: float | None) -> None:
    peak = peak_flops(name, precision)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))
