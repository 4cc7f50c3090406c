"""Linear layers that oneDNN multiplies where PyTorch's own library for CPUs leaves AVX-512 unused.

PyTorch multiplies float32 matrices by Intel's MKL, which on processors of other makers runs kernels of half the width:
on one core of an AMD EPYC 75 to 105 GFLOP/s, where oneDNN, which PyTorch brings along for convolutions, reaches 190 to
235 on the same matrices, as exact in float32 (benchmarks/results/linear_cpu.md).
"""

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below so many multiplications oneDNN's preparation of a product costs more than it saves.
SMALLEST_PRODUCT = 1 << 21
_CPU_INFO = Path("/proc/cpuinfo")


def _onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 and is not Intel's, for which MKL has no kernels of that width."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return known and _CPU_INFO.exists() and "GenuineIntel" not in _CPU_INFO.read_text()


# A constant, which the compiler can read: it may not ask the backends.
ONEDNN_IS_FASTER = _onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by oneDNN where it is the faster; inputs (..., K) and weights (N, K) to (..., N)."""
    fits = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if fits and x.numel() * weight.shape[0] >= SMALLEST_PRODUCT and ONEDNN_IS_FASTER:
        return _Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class CPULinear(nn.Linear):
    """``nn.Linear`` whose products are those of :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def speed_up_linears(module: nn.Module) -> None:
    """Have every plain linear layer inside compute by :func:`linear`; parameters and their names stay.

    A processor on which oneDNN is not the faster leaves the module as it is.
    """
    if ONEDNN_IS_FASTER:
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = CPULinear


class _Product(torch.autograd.Function):
    """x W^T + b, and its gradients, as three products of oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _multiply(_dense(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = _dense(gradient.reshape(-1, gradient.shape[-1]))  # (M, N)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _multiply(rows, weight.t(), None).view(x.shape)  # (M, N) (N, K)
        if ctx.needs_input_grad[1]:
            of_weight = _multiply(rows.t(), _dense(x.reshape(-1, x.shape[-1])).t(), None)  # (N, M) (M, K)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0)
        return of_x, of_weight, of_bias


def _dense(x: Tensor) -> Tensor:
    """Rows one after another: with gaps between them, as a slice has, oneDNN takes a kernel a hundred times slower."""
    return x.contiguous()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return _product_in_graph(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)


# The compiler takes the operator itself for one of inference, whose weights never change.
@torch.library.custom_op("vitcomposer::product", mutates_args=())
def _product_in_graph(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)


@_product_in_graph.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
