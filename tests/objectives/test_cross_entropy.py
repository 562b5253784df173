"""Cross-entropy over chunks equals torch's over all scores at once: value, both gradients, tied weights, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.model import Transformer
from moe_dist.model.vocabulary import WholeVocabulary
from moe_dist.objectives import cross_entropy
from moe_dist.objectives.cross_entropy import nats_of_tokens, score, summed_nats
from moe_dist.objectives.language_modelling import language_modelling_sums, token_nats
from moe_dist.objectives.micro_batch import MicroBatch
from tests.support.models import VOCAB, plain_model, random_rows, small_config
from tests.support.planted import failure_with
from tests.support.tolerances import RELATIVE, assert_close, relative_error

WIDTH, TOKENS = 6, 11
CHUNKS = (1, 4, TOKENS, 100, None)  # 4 does not divide the tokens
WHOLE = WholeVocabulary()
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs_of(tokens: int = TOKENS, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Inputs:
    """Hidden states, weights and targets, of which the first and the last id are two."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) * spread
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    target_T = torch.randint(0, VOCAB, (tokens,), generator=generator)
    target_T[:2] = torch.tensor([0, VOCAB - 1])[:tokens]
    return hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), target_T


def plain_nats(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """All scores at once, as torch does it."""
    logits_TV = F.linear(hidden_TD, weight_VD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, target_T, reduction="none")


def gradients_of(loss: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
    hidden_grad, weight_grad = torch.autograd.grad(loss, given[:2])
    return hidden_grad, weight_grad


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_chunks_give_the_value_and_both_gradients_of_all_scores_at_once(tokens, chunk):
    given = inputs_of(tokens)
    expected, found = plain_nats(*given), summed_nats(*given, WHOLE, chunk)
    assert found.shape == () and found.dtype == torch.float64
    assert_close(found, expected.sum(), "sum")
    factor = -0.37  # of what comes after the sum
    wanted = gradients_of(factor * expected.sum(), given)
    for name, one, other in zip(("hidden", "weight"), gradients_of(factor * found, given), wanted, strict=True):
        assert_close(one, other, name)
    alone = nats_of_tokens(*given, WHOLE, chunk)
    assert alone.shape == (tokens,) and not alone.requires_grad
    assert_close(alone, expected.detach(), "single tokens")
    with torch.no_grad():
        without = summed_nats(*given, WHOLE, chunk)
    assert torch.equal(without, found.detach()) and not without.requires_grad


def test_chunks_agree_with_finite_differences():
    hidden_TD, weight_VD, target_T = inputs_of(5)
    few = (weight_VD[:9].detach().requires_grad_(), target_T % 9)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return summed_nats(hidden, weight, few[1], WHOLE, 2).sin()

    assert torch.autograd.gradcheck(loss, (hidden_TD, few[0]), atol=1e-8)


def test_chunks_give_the_same_gradients_twice_where_the_graph_is_kept():
    given = inputs_of()
    loss = 0.5 * summed_nats(*given, WHOLE, 4)
    first = [grad.clone() for grad in torch.autograd.grad(loss, given[:2], retain_graph=True)]
    again = torch.autograd.grad(loss, given[:2])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("spread", [1e3, 1e5])
def test_scores_far_apart_stay_finite_and_exact(spread):
    for dtype in (torch.float32, torch.float64):
        given = inputs_of(dtype=dtype, spread=spread)
        expected = plain_nats(*given).sum()
        found = summed_nats(*given, WHOLE, 4)
        assert_close(found, expected, "sum")
        for one, other in zip(gradients_of(found, given), gradients_of(expected, given), strict=True):
            assert_close(one, other, "gradient")


def test_statistics_of_bf16_scores_are_fp32():
    given = inputs_of(tokens=300, dtype=torch.float32)
    exact = plain_nats(*given).sum()
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = plain_nats(*given).sum(), summed_nats(*given, WHOLE, 128)
        alone = nats_of_tokens(*given, WHOLE, 128)
    assert found.dtype == alone.dtype == torch.float32
    assert_close(found, plain, "sum: the scores are the same bf16 numbers")
    assert relative_error(found, exact) < RELATIVE[torch.bfloat16]
    for one, other, true in zip(*(gradients_of(loss, given) for loss in (found, plain, exact)), strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other) < RELATIVE[torch.bfloat16]
        assert relative_error(one, true) < RELATIVE[torch.bfloat16]


def plain_sums(model: Transformer, rows: Tensor) -> Tensor:
    hidden_BSD, _ = model(rows[:, :-1])
    return plain_nats(hidden_BSD.flatten(0, 1), model.output_weight, rows[:, 1:].flatten()).sum()


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_of_a_model_give_every_parameter_the_gradient_of_both_uses(tied):
    """Trap 21."""
    config = small_config(model={"tie_embeddings": tied})
    model, rows = plain_model(config), random_rows(3)
    plain_sums(model, rows).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for chunk in (5, None):
        model.zero_grad(set_to_none=True)
        language_modelling_sums(model, MicroBatch.of(rows), chunk_tokens=chunk).cross_entropy.backward()
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name], name)
    hidden_BSD, _ = model(rows[:, :-1])
    wanted = plain_nats(hidden_BSD.flatten(0, 1), model.output_weight, rows[:, 1:].flatten())
    found, target_T = token_nats(model, MicroBatch.of(rows), 5)
    assert_close(found, wanted.detach(), "evaluation")
    assert torch.equal(target_T, rows[:, 1:].flatten())


class Largest(TorchDispatchMode):
    """Notes the most values that any tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        out = function(*given, **(named or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.values = max([self.values, *(tensor.numel() for tensor in made if isinstance(tensor, Tensor))])
        return out


@pytest.mark.parametrize("training", [True, False])
def test_scores_of_more_than_a_chunk_never_exist(training):
    given = inputs_of(tokens=64)
    with Largest() as largest, torch.set_grad_enabled(training):
        loss = summed_nats(*given, WHOLE, 8)
        if training:
            loss.backward()
    assert largest.values == 8 * VOCAB


def kept_as_it_is(ctx: Any, *grads: Tensor) -> Any:
    grad_TD, grad_VD = ctx.saved_tensors
    return grad_TD, grad_VD, None, None, None


def scaled_in_place(ctx: Any, *grads: Tensor) -> Any:
    grad_TD, grad_VD = (tensor.detach() for tensor in ctx.saved_tensors)
    grad_TD.data.mul_(grads[0])
    grad_VD.data.mul_(grads[0])
    return grad_TD, grad_VD, None, None, None


def probabilities_alone(logits_CV: Tensor, target_C: Tensor, vocabulary: Any) -> tuple[Tensor, Tensor]:
    nats_C, slope_CV = score(logits_CV, target_C, vocabulary)
    return nats_C, slope_CV.scatter_add_(1, target_C[:, None], torch.ones_like(slope_CV[:, :1]))


def last_chunk_left_out(count: int, size: int | None) -> Any:
    return original_chunks(count - (count % (size or 1)), size)


original_chunks = cross_entropy._chunks
FUNCTION = cross_entropy._SummedNats


def value_and_gradients() -> None:
    test_chunks_give_the_value_and_both_gradients_of_all_scores_at_once(TOKENS, 4)


PLANTED = {
    "gradient not scaled by what comes after": (FUNCTION, "backward", staticmethod(kept_as_it_is), value_and_gradients),
    "kept gradient scaled where it lies": (
        *(FUNCTION, "backward", staticmethod(scaled_in_place)),
        test_chunks_give_the_same_gradients_twice_where_the_graph_is_kept,
    ),
    "target left out of the slope": (cross_entropy, "score", probabilities_alone, value_and_gradients),
    "rest of the tokens left out": (cross_entropy, "_chunks", last_chunk_left_out, value_and_gradients),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistake_is_caught(mistake):
    assert failure_with(PLANTED[mistake]) is not None
