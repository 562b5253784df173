"""The expert back ends against each other and against one product an expert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_dist.config import MoEConfig
from moe_dist.moe.expert_loop import _keeps_busy
from moe_dist.moe.experts import Experts, choose_backend
from tests.support.tolerances import assert_close

COUNTS = [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [2, 2, 2, 2]]


def experts_of(backend, dtype):
    config = MoEConfig(num_experts=4, expert_width=16, backend=backend)
    module = Experts(8, config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def obvious(module, rows, counts):
    outputs = []
    for expert, part in enumerate(rows.split(counts)):
        gate, up = (part @ module.gate_up[expert].T).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ module.down[expert])
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("loop", torch.float64), ("loop", torch.float32), ("grouped", torch.float32)]
)
def test_experts_any_counts_equal_one_product_an_expert(backend, dtype, counts):
    module = experts_of(backend, dtype)
    rows = torch.randn(sum(counts), 8, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)
    inputs = [rows, *module.parameters()]
    found, wanted = module(rows, counts), obvious(module, rows, counts)
    assert_close(found, wanted, "output")
    # `sum` gives an expanded, stride-0 gradient: the trap of grouped products.
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
    ):
        assert_close(mine, theirs, "gradient")


@pytest.mark.parametrize("backend", ["loop", "grouped", "reference"])
def test_experts_refuse_rows_that_belong_to_no_expert(backend):
    """A grouped product leaves them uninitialised, and so their gradients."""
    module = experts_of(backend, torch.float32)
    with pytest.raises(AssertionError, match="9 rows for counts of 8"):
        module(torch.randn(9, 8), [3, 0, 5, 0])


def test_experts_loop_gradients_agree_with_finite_differences():
    module = experts_of("loop", torch.float64)
    rows = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def function(rows, gate_up, down):
        return torch.func.functional_call(module, {"gate_up": gate_up, "down": down}, (rows, [2, 0, 3, 0]))

    assert torch.autograd.gradcheck(function, (rows, *weights))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "clamped_swiglu", "gelu", "relu", "squared_relu"])
@pytest.mark.parametrize("recompute", ["nothing", "activation", "projections"])
def test_experts_loop_gives_the_same_gradients_twice_where_the_graph_is_kept(recompute, activation):
    """The backward writes over what the forward kept, but not while somebody may still ask for it."""
    config = MoEConfig(num_experts=4, expert_width=16, activation=activation, recompute_experts=recompute)
    module = Experts(8, config).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    inputs = [rows, *module.parameters()]
    out = module(rows, [3, 0, 5, 1]).square().sum()
    first, second = (torch.autograd.grad(out, inputs, retain_graph=True) for _ in range(2))
    last = torch.autograd.grad(out, inputs)
    for once, twice, thrice in zip(first, second, last, strict=True):
        assert torch.equal(once, twice) and torch.equal(once, thrice)


def test_experts_auto_backend_follows_device_and_type():
    class Weight:
        """Stands for a weight on a device that this machine need not have."""

        def __init__(self, device: str, dtype: torch.dtype, width: int) -> None:
            self.device, self.dtype, self.shape = torch.device(device), dtype, (4, 8, width)

        def element_size(self) -> int:
            return torch.empty(0, dtype=self.dtype).element_size()

    def chosen(asked, device, dtype, width=16):
        return choose_backend(asked, Weight(device, dtype, width), Weight(device, dtype, width))

    assert chosen("auto", "cpu", torch.float32) == "loop"
    assert chosen("auto", "cuda", torch.bfloat16) == "grouped"
    assert chosen("auto", "cuda", torch.float64) == "loop"
    assert chosen("auto", "cuda", torch.bfloat16, width=12) == "loop"
    assert chosen("loop", "cuda", torch.bfloat16) == "loop"


@pytest.mark.parametrize(
    "rows, threads, busy",
    [([4, 4, 4, 4], 2, True), ([4, 4, 4], 2, False), ([9], 2, False), ([6, 3, 3], 2, True), ([], 2, True)],
)
def test_whole_experts_are_taken_only_where_threads_end_together(rows, threads, busy):
    assert _keeps_busy(rows, threads) is busy
