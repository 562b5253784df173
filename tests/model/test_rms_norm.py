"""The norm with its own backward against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_dist.model.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 16), (0, 8), (1, 0, 8)])
def test_rms_norm_equals_torch_forward_and_backward(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    weight_D = torch.rand(shape[-1], generator=draw, dtype=torch.float64)
    results = []
    for norm in (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)):
        given = x.clone().requires_grad_(), weight_D.clone().requires_grad_()
        out = norm(*given)
        out.backward(grad)
        results.append((out, given[0].grad, given[1].grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_rms_norm_of_a_view_and_of_zeros_is_right() -> None:
    wide = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = wide.transpose(1, 2).requires_grad_()  # what lies apart in memory
    weight_D = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight_D))
    zeros = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    out = rms_norm(zeros, weight_D, 1e-5)
    out.sum().backward()
    assert not out.any()
    assert zeros.grad is not None
    torch.testing.assert_close(zeros.grad, torch.full_like(zeros, 0.5 * 1e-5**-0.5))
