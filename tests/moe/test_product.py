"""Products of fp32 matrices on a CPU: oneDNN against torch's own, and both against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_dist.moe import product as product_module
from moe_dist.moe.activation import activation_of
from moe_dist.moe.expert_loop import Job, _Source, loop_rows, loop_tokens
from moe_dist.moe.plan import make_plan
from moe_dist.moe.product import Linear, add_product, linear, padded, product, product_into
from tests.support.tolerances import assert_close

KINDS = ["onednn", "own"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """Row counts of the products that oneDNN is given, on a machine that is made to take it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    given, original = [], product_module._product

    def counted(left, right, bias=None):
        given.append(len(left))
        return original(left, right, bias)

    monkeypatch.setattr(product_module, "has_onednn", lambda: True)
    monkeypatch.setattr(product_module, "_product", counted)
    return given


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    if request.param == "onednn":
        request.getfixturevalue("calls")
    else:
        monkeypatch.setattr(product_module, "has_onednn", lambda: False)
    return request.param


@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 16, 8), (250, 24, 40), (0, 4, 4), (4, 0, 4)])
def test_product_equals_fp64_in_every_layout(kind, shape):
    rows, inner, columns = shape
    left, right = drawn(rows, inner), drawn(inner, columns, seed=1)
    wanted = left.double() @ right.double()
    lefts, rights = (left, left.T.contiguous().T), (right, right.T.contiguous().T)
    for a in lefts:
        for b in rights:
            assert_close(product(a, b), wanted.float(), "product")
            assert product(a, b).shape == wanted.shape
            into, total = torch.full((rows, columns), 7.0), torch.ones(rows, columns)
            product_into(into, a, b)
            add_product(total, a, b)
            assert torch.equal(into, product(a, b))
            torch.testing.assert_close(total, wanted.float() + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_gradients_equal_fp64(kind, bias):
    module, exact = Linear(12, 20, bias=bias), torch.nn.Linear(12, 20, bias=bias).double()
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    for x in (drawn(3, 5, 12), drawn(12, 9).T, drawn(5, 3, 12).transpose(0, 1), drawn(12)[None]):
        mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
        out, wanted = module(mine), exact(theirs)
        slope = drawn(*out.shape, seed=3)
        found = torch.autograd.grad(out, (mine, *module.parameters()), slope)
        expected = torch.autograd.grad(wanted, (theirs, *exact.parameters()), slope.double())
        for name, one, other in zip(["y", "x", "w", "b"], (out, *found), (wanted, *expected), strict=False):
            torch.testing.assert_close(
                one, other.float(), rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_onednn_is_taken_for_plain_fp32_alone(calls):
    x, weight = drawn(4, 8), drawn(6, 8)
    linear(x, weight)
    assert calls == [4]
    linear(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight)
    linear(x.to("meta"), weight.to("meta"))
    assert calls == [4]


def test_frozen_weights_cost_no_product(calls):
    x, weight = drawn(4, 8).requires_grad_(), drawn(6, 8)
    linear(x, weight).sum().backward()
    assert calls == [4, 4], "the product and the gradient of x"
    assert torch.allclose(x.grad, weight.sum(0).expand(4, -1), atol=1e-5)


def test_padded_sizes_are_few_and_little_larger():
    for count in range(1, 5000):
        assert count <= padded(count) <= count + max(7, count / 32)
    assert len({padded(count) for count in range(200, 330)}) <= 20
    assert len({padded(count) for count in range(1, 5000)}) <= 32 * 9


COUNTS = [3, 0, 250, 71]


def of_loop(recompute, by_token):
    """Output and gradients of an expert loop over uneven counts."""
    first, down = drawn(4, 24, 16, seed=1).div_(4).requires_grad_(), drawn(4, 12, 16, seed=2).div_(4).requires_grad_()
    if by_token:
        rows = sum(COUNTS)
        expert_TK = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))[torch.randperm(rows)][:, None]
        plan = make_plan(expert_TK, torch.ones(rows, 1), None, (1, rows, 4), None)
        x, gate = drawn(rows, 16).requires_grad_(), drawn(rows, 1, seed=5).sigmoid().requires_grad_()
        out = loop_tokens(x, gate, first, down, Job(COUNTS, activation_of("swiglu"), recompute, plan))
        inputs = (x, gate, first, down)
    else:
        x = drawn(sum(COUNTS), 16).requires_grad_()
        out = loop_rows(x, first, down, Job(COUNTS, activation_of("swiglu"), recompute))
        inputs = (x, first, down)
    return [out, *torch.autograd.grad(out, inputs, drawn(*out.shape, seed=9))]


def both_ways(monkeypatch, recompute, by_token):
    torch.manual_seed(0)
    found = of_loop(recompute, by_token)
    with monkeypatch.context() as patch:
        patch.setattr(product_module, "has_onednn", lambda: False)
        torch.manual_seed(0)
        return found, of_loop(recompute, by_token)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("recompute", ["nothing", "activation", "projections"])
def test_experts_with_padded_rows_equal_those_without(calls, monkeypatch, recompute, by_token):
    found, wanted = both_ways(monkeypatch, recompute, by_token)
    assert set(calls) >= {padded(count) for count in COUNTS if count}, "sizes were rounded up"
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert_close(one, other, f"result {number}")
    again = both_ways(monkeypatch, recompute, by_token)[0]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_planted_padding_that_is_not_zero_is_caught(calls, monkeypatch):
    original = _Source.take

    def dirty(self, x, rows):
        taken = original(self, x, rows)
        taken[rows.stop - rows.start :].fill_(1)
        return taken

    monkeypatch.setattr(_Source, "take", dirty)
    found, wanted = both_ways(monkeypatch, "nothing", by_token=False)
    with pytest.raises(AssertionError, match="relative error"):
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, "result")


def test_linear_of_a_compiled_part_is_torchs_own(calls):
    seen = torch.compile(linear, backend="eager")(drawn(4, 8), drawn(6, 8))
    assert calls == []
    torch.testing.assert_close(seen, F.linear(drawn(4, 8), drawn(6, 8)))
