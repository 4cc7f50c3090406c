import copy

import pytest
import timm
import torch

from vitcomposer.flops import forward_flops, peak_flops


@pytest.mark.parametrize(
    "name, gigaflops",
    [("vit_small_patch16_224", 9.20), ("vit_base_patch16_224", 35.1), ("vit_large_patch16_224", 123.0)],
)
def test_flops_agree_with_published_counts(name: str, gigaflops: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert forward_flops(model, 224) == pytest.approx(gigaflops * 1e9, rel=0.01)


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
