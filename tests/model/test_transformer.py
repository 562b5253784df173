"""The plain decoder: causality, position, counts, and initial weights that depend on names only."""

from __future__ import annotations

import pytest
import torch

from moe_dist.model import Transformer
from moe_dist.model.flops import count_parameters, training_flops_per_token
from moe_dist.model.init import initial_value, initialise
from moe_dist.model.naming import global_tensors
from moe_dist.model.places import Places
from moe_dist.model.rope import rope_table, rotate
from moe_dist.moe.experts import Experts
from tests.support.attention import ATTENTION
from tests.support.feed_forward import FEED_FORWARD
from tests.support.models import plain_model, random_rows, small_config
from tests.support.tolerances import assert_close


def test_transformer_future_tokens_do_not_change_the_past():
    model = plain_model(small_config())
    rows = random_rows(2)
    changed = rows.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 300
    with torch.no_grad():
        first, second = model(rows)[0], model(changed)[0]
    assert_close(second[:, :7], first[:, :7], "past")
    assert not torch.allclose(first[:, 7:], second[:, 7:])


def test_rope_scores_depend_on_distance_only():
    table = rope_table(torch.arange(32), small_config().model, torch.zeros((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(8, generator=generator, dtype=torch.float64).expand(1, 1, 32, 8) for _ in range(2))
    scores = (rotate(query, table) @ rotate(key, table).transpose(-1, -2))[0, 0]
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-12)


def test_attention_key_value_heads_serve_neighbouring_query_heads():
    config = small_config(model={"num_heads": 4, "num_kv_heads": 2, "head_width": 4})
    attention = plain_model(config).blocks[0].attention
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    table = rope_table(torch.arange(5), config.model, x)
    q = rotate(attention.query(x).view(1, 5, 4, 4).transpose(1, 2), table)
    k = rotate(attention.key(x).view(1, 5, 2, 4).transpose(1, 2), table).repeat_interleave(2, dim=1)
    v = attention.value(x).view(1, 5, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1)
    scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = attention.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x, Places(*table)), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "moe"),
    [
        ({}, {}),
        ({"tie_embeddings": False}, {}),
        ({"num_dense_layers": 1}, {}),
        ({"num_layers": 3, "num_heads": 4, "num_kv_heads": 4}, {}),
        ({}, {"latent_width": 6, "activation": "relu", "shared_expert_gate": True}),
        ({}, {"activation": "gelu", "router": "noisy_topk"}),
        *((model, {}) for model in ATTENTION.values()),
        *((case["model"], case.get("moe", {})) for case in FEED_FORWARD.values()),
    ],
)
def test_parameter_count_from_the_config_equals_the_model(model, moe):
    config = small_config(moe, model=model)
    whole = plain_model(config)
    counts = count_parameters(config.model)
    assert counts.total == sum(p.numel() for p in whole.parameters())
    idle = sum(p.numel() for n, p in whole.named_parameters() if ".experts." in n) * (1 - 2 / 8)
    assert counts.active == counts.total - idle


def test_flops_per_token_of_a_model_counted_by_hand():
    config = small_config({"shared_expert_width": 0}, model={"num_layers": 1})
    width, length = 16, 12
    attention = width * 8 * (2 + 1 + 1 + 2)  # query, key, value, output
    experts = 2 * 3 * width * 12 + width * 8  # two experts of three matrices, router
    output = 300 * width
    scores = 2 * 8 * length  # heads x head width x length: two products over half the square
    assert training_flops_per_token(config.model, length) == 6 * (attention + experts + output) + 6 * scores


def test_initial_weights_depend_on_seed_and_name_only():
    config = small_config()
    whole, again, other = plain_model(config, 0), plain_model(config, 0), plain_model(config, 1)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert "norm" in name or not torch.equal(parameter, other.get_parameter(name))
    deeper = plain_model(small_config({"num_experts": 16}, model={"num_layers": 2}), 0)
    name = "blocks.1.feed_forward.experts.gate_up"
    assert torch.equal(deeper.get_parameter(name)[:8], whole.get_parameter(name))


def test_initial_experts_are_all_different():
    model = plain_model(small_config())
    seen = set()
    for piece in global_tensors(model):
        if piece.index is not None:
            tensor = piece.of(model.get_parameter(piece.parameter).detach())
            seen.add((tuple(tensor.shape), tensor.flatten()[:4].numpy().tobytes()))
    assert len(seen) == 2 * 2 * 8


def test_initial_experts_of_a_part_are_those_of_the_whole():
    config = small_config()
    whole, part = plain_model(config), Transformer(config.model)
    for _, layer in part.moe_layers():
        layer.experts = Experts(config.model.width, config.model.moe, range(3, 6))
    initialise(part, 0, torch.device("cpu"), torch.float64)
    for (_, mine), (_, theirs) in zip(part.moe_layers(), whole.moe_layers(), strict=True):
        assert torch.equal(mine.experts.gate_up, theirs.experts.gate_up[3:6])
        assert torch.equal(mine.experts.down, theirs.experts.down[3:6])


def test_initial_residual_outputs_are_scaled_by_depth():
    config = small_config(model={"num_layers": 8, "init_std": 0.1}).model
    wide = initial_value("blocks.0.attention.query.weight", torch.Size((400, 400)), config, 0)
    scaled = initial_value("blocks.0.feed_forward.experts.down#3", torch.Size((400, 400)), config, 0)
    assert wide.std().item() == pytest.approx(0.1, rel=0.02)
    assert scaled.std().item() == pytest.approx(0.1 / 4, rel=0.02)


def test_dense_leading_layers_make_no_records():
    model = plain_model(small_config(model={"num_layers": 3, "num_dense_layers": 2}))
    _, records = model(random_rows(1)[:, :-1])
    assert len(records) == 1
    assert [name for name, _ in model.moe_layers()] == ["blocks.2.feed_forward"]
    assert isinstance(model, Transformer)
