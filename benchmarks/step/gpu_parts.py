"""Parts of a training step by themselves, for benchmarks.step.gpu: attention kernels, augmentation, optimizers."""

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step.gpu_steps import Rows, Scale, build, seconds_each
from vitcomposer import optim, schema
from vitcomposer.data.augment import programs as ops
from vitcomposer.data.augment.mixing import mix_images, soft_targets
from vitcomposer.data.augment.policies import RandAugment, fill_colour
from vitcomposer.data.augment.programs_torch import apply_programs
from vitcomposer.data.augment.transforms import Normalize, erase

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOKENS = (37, 101, 145, 197)  # 96, 160, 192 and 224 pixels with a class token
HEADS = ((64, 6), (48, 9))  # head width, heads: ViT-S and ConViT-S
OPTIMIZERS = ("adamw", "lamb", "muon")


def attention(scale: Scale) -> Iterator[Rows]:
    """Forward and backward of attention by backend; queries, keys and values lie in memory as our layers leave them."""
    for width, heads in HEADS:
        for tokens in TOKENS[:1] if scale.tiny else TOKENS:
            yield [_attention(scale, name, width, heads, tokens) for name in BACKENDS]


def _attention(scale: Scale, backend: str, width: int, heads: int, tokens: int) -> dict[str, Any]:
    shape = (3, scale.batch, tokens, heads, width)
    qkv = torch.randn(shape, device=scale.device, dtype=torch.bfloat16).transpose(2, 3)
    inputs = [part.requires_grad_() for part in qkv.unbind()]
    gradient = torch.randn_like(inputs[0])
    row = {"backend": backend, "head_width": width, "heads": heads, "tokens": tokens, "batch": scale.batch}

    def forward_backward() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, gradient)

    try:
        with sdpa_kernel(BACKENDS[backend]):
            forward_backward()
            each = seconds_each(forward_backward, scale.device, scale.seconds / 8)
    except RuntimeError as error:  # a backend that does not take this shape or this machine
        return {**row, "seconds": None, "why": str(error).partition("\n")[0]}
    flops = 4 * scale.batch * heads * tokens**2 * width * 3.5  # backward computes the scores again
    return {**row, "seconds": each, "tflops": flops / each / 1e12}


def augmentation(scale: Scale) -> Iterator[Rows]:
    """What one batch of uint8 images costs on the device before the network sees it."""
    size, batch, device = scale.image_size, scale.batch, scale.device
    mean, std = schema.IMAGENET_MEAN, schema.IMAGENET_STD
    policy = RandAugment("rand-m9-mstd0.5-inc1", image_size=size, interpolation="bicubic")
    programs = [ops.encode(policy.draw(random.Random(number)), policy.length) for number in range(batch)]
    codes, values = (np.stack(part) for part in zip(*programs, strict=True))
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    floats = torch.rand(batch, 3, size, size, device=device)
    boxes = torch.tensor([[size // 8, size // 8, size // 2, size // 2]], dtype=torch.int32).repeat(batch, 1).to(device)
    seeds, lam = torch.arange(batch, device=device), torch.full((batch,), 0.6, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    normalize = Normalize(mean, std)
    parts = {
        "RandAugment, apply_programs": lambda: apply_programs(images, codes, values, fill_colour(mean)),
        "normalise": lambda: normalize(images),
        "erase": lambda: erase(floats, boxes, seeds),
        "mix and soft targets": lambda: (mix_images(floats, lam, boxes), soft_targets(labels, 1000, 0.1, lam)),
    }
    for name, part in parts.items():
        part()
        each = seconds_each(part, device, scale.seconds / 2)
        yield [{"part": name, "batch": batch, "image_size": size, "seconds": each, "images_per_sec": batch / each}]
    yield [_against_cpu(images, codes, values)]


def _against_cpu(images: torch.Tensor, codes: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """The pixels of the same programs as the loader's workers make them, and how many images the device changes."""
    fill = fill_colour(schema.IMAGENET_MEAN)
    device = apply_programs(images, codes, values, fill).cpu().permute(0, 2, 3, 1).numpy()
    pixels = np.ascontiguousarray(images.cpu().permute(0, 2, 3, 1).numpy())
    ops.warm_up()
    began = time.perf_counter()
    for one, *program in zip(pixels, codes, values, strict=True):
        ops.apply_program(one, *program, fill)
    seconds = time.perf_counter() - began
    differ = np.abs(device.astype(np.int16) - pixels).reshape(len(pixels), -1).max(axis=1)
    row = {"part": "RandAugment on one CPU core", "batch": len(pixels), "image_size": pixels.shape[1]}
    row |= {"seconds": seconds, "images_per_sec": len(pixels) / seconds}
    return {**row, "images_unlike_the_device": int((differ > 0).sum()), "largest_difference": int(differ.max())}


def optimizers(scale: Scale) -> Iterator[Rows]:
    """One optimizer step with every gradient set, as the recipes build the optimizer."""
    for model in ("vit_s",) if scale.tiny else ("vit_s", "vit_b"):
        network = build(model, "vitcomposer", scale).to(scale.device)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        for name in OPTIMIZERS:
            block = schema.Optimizer(name=name, lr=1e-6, lr_batch_size=512, lr_scaling="none", weight_decay=0.05)
            optimizer = optim.build_optimizer(network, block, global_train_batch_size=512)
            optimizer.step()
            each = seconds_each(optimizer.step, scale.device, scale.seconds / 2)
            yield [{"model": model, "optimizer": name, "seconds": each}]
