"""Options of attention: causality, windows and documents, sinks, what is counted, what is decayed."""

from __future__ import annotations

import math

import pytest
import torch

from moe_dist.model.attention import attend, window_of
from moe_dist.model.flops import training_flops_per_token
from moe_dist.model.places import document_positions, places_of
from moe_dist.optim import build_adamw
from tests.support.attention import ATTENTION
from tests.support.models import plain_model, random_rows, small_config
from tests.support.tolerances import RELATIVE, assert_close, relative_error

END = 7


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("separate", [False, True])
def test_future_tokens_change_no_earlier_logit(name, separate):
    model, rows = plain_model(small_config(model={"num_layers": 3, **ATTENTION[name]})), random_rows(2)
    rows[:, [3, 8]] = END
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        for first in (1, 5, 11):
            changed = rows.clone()
            changed[:, first:] = (changed[:, first:] + 1) % 300
            hidden = [
                model(r, position_BS=document_positions(r, END) if separate else None)[0] for r in (rows, changed)
            ]
            assert_close(hidden[1][:, :first], hidden[0][:, :first], f"tokens before {first}")
            assert not torch.allclose(hidden[1][:, first:], hidden[0][:, first:])


@pytest.mark.parametrize("name", ATTENTION)
def test_separate_documents_have_the_hidden_states_of_each_alone(name):
    model = plain_model(small_config(model={"num_layers": 3, **ATTENTION[name]}))
    row = torch.tensor([[3, 4, 5, 6, 1, END, 5, 6, 8, 2, 2, 9, 3]])
    together, _ = model(row, position_BS=document_positions(row, END))
    for first, last in ((0, 6), (6, 13)):
        assert_close(together[:, first:last], model(row[:, first:last])[0], f"tokens {first} to {last}")


def test_windows_worked_by_hand_end_at_the_document():
    config = small_config(model={"attention": {"window_tokens": 2, "full_every_layers": 2}, "num_layers": 3}).model
    assert [window_of(config, number) for number in range(3)] == [2, None, 2]
    places = places_of(document_positions(torch.tensor([[3, 4, 5, END, 6]]), END), 5, config, torch.zeros(()))
    assert places.near is not None and places.sees is not None
    assert places.near[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert places.sees[0, 0, 3].int().tolist() == [1, 1, 1, 1, 0]


def test_sinks_take_part_in_the_softmax_of_their_head_and_carry_no_value():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 3, 4, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    sinks, scale = torch.tensor([-1.0, 0.0, 2.0, 30.0], dtype=torch.float64), 0.3
    sees = torch.ones(3, 3).tril().bool()[None, None]
    found = attend((query, key, value), sees, scale, sinks)
    for head in range(4):
        scores = (scale * query[:, head] @ key[:, head // 2].mT).masked_fill(~sees[0], -math.inf).exp()
        weights = scores / (scores.sum(-1, keepdim=True) + sinks[head].exp())
        assert_close(found[:, head], weights @ value[:, head // 2], f"head {head}")


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_in_bf16_stays_near_fp32(name):
    config = small_config(
        model={"num_layers": 1, "num_dense_layers": 1, **ATTENTION[name]}, train={"precision": "fp32"}
    )
    model, rows = plain_model(config), random_rows(2)
    with torch.no_grad():
        expected, _ = model(rows)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = model(rows)
    assert 0 < relative_error(found.float(), expected) <= RELATIVE[torch.bfloat16]


def test_flops_of_latent_attention_counted_by_hand():
    latent = {"query_rank": 10, "kv_rank": 12, "rope_width": 4, "value_width": 6}
    asked = {"num_kv_heads": 2, "attention": {"kind": "latent", "latent": latent}}
    plain = training_flops_per_token(small_config().model, 12)
    found = training_flops_per_token(small_config(model=asked).model, 12)
    grouped = 16 * 8 * (2 + 1 + 1 + 2)
    products = 16 * 10 + 10 * 2 * (8 + 4) + 16 * (12 + 4) + 12 * 2 * (8 + 6) + 2 * 6 * 16
    scores = 2 * (8 + 4) * 12 / 2 + 2 * 6 * 12 / 2  # keys and values of two heads over half of 12 tokens
    assert found - plain == pytest.approx(2 * 6 * (products - grouped + scores - 2 * 8 * 12))


def test_flops_of_windows_and_biases_counted_by_hand():
    attention = {"window_tokens": 3, "full_every_layers": 2, "qkv_bias": True, "sinks": True, "qk_norm": "head"}
    plain = training_flops_per_token(small_config().model, 12)
    asked = training_flops_per_token(small_config(model={"attention": attention}).model, 12)
    heads = 2 * 8
    # One of two layers sees 3 tokens at most: an area of 12 * 3 - 3 * 3 / 2 in place of 12 * 12 / 2.
    assert plain - asked == pytest.approx(12 * heads * (72 - 31.5) / 12)


def test_vectors_of_attention_are_not_decayed():
    model = plain_model(small_config(model=next(iter(ATTENTION.values()))))
    decayed, spared = build_adamw(model, small_config().optimizer).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(p)] for p in spared["params"]}
    vectors = ("query_norm.weight", "key_norm.weight", "sinks", "query.bias", "output.bias")
    assert {f"blocks.0.attention.{name}" for name in vectors} <= kept
    assert all(p.ndim > 1 for p in decayed["params"]) and decayed["weight_decay"] > 0 == spared["weight_decay"]


def test_first_weights_of_vectors_have_no_effect():
    model = plain_model(small_config(model=next(iter(ATTENTION.values()))))
    attention = model.blocks[0].attention
    assert not attention.query.bias.any() and not attention.output.bias.any() and not attention.sinks.any()
    assert (attention.query_norm.weight == 1).all() and attention.key_norm.weight.shape == (16,)
