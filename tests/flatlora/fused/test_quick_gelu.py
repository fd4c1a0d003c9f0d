"""The kernels of QuickGELU against transformers' operations; on a GPU, or in Triton's interpreter."""

import pytest
import torch
from torch import nn
from transformers.activations import QuickGELUActivation

from flatlora.fused.quick_gelu import fuse_quick_gelu, quick_gelu, quick_gelu_reference
from flatlora.noise import triton_kernels

INTERPRETED = triton_kernels.HAS_TRITON and triton_kernels.available("cpu")
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or (torch.cuda.is_available() and triton_kernels.available("cuda"))),
    reason="needs a CUDA GPU and Triton",
)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_transformers(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(7, 613, generator=generator).to(DEVICE, dtype) for _ in range(2))
    x = (4 * x).requires_grad_()
    model = nn.Sequential(QuickGELUActivation())
    assert fuse_quick_gelu(model) == 1
    y, expected = model(x), QuickGELUActivation()(x.double())
    assert "QuickGELU" in type(y.grad_fn).__name__
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    found, wanted = (torch.autograd.grad(out, x, grad.to(out.dtype))[0] for out in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=2 * tolerance, atol=2 * tolerance)
    transposed = x.detach()[:, :500].t()
    assert torch.equal(quick_gelu(transposed), y.detach()[:, :500].t())


def test_elsewhere_the_operations_are_transformers_own():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    assert torch.equal(quick_gelu(x), QuickGELUActivation()(x))
    assert torch.equal(quick_gelu_reference(x), QuickGELUActivation()(x))
