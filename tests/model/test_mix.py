"""Feed-forwards that see the tokens before: by torch's convolution, causal, document by document, nothing at first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_dist.config import Config
from moe_dist.errors import ConfigError, LayoutError
from moe_dist.model import Transformer
from moe_dist.model.feed_forward import FeedForward
from moe_dist.model.flops import count_parameters, training_flops_per_token
from moe_dist.model.mix import CausalMix
from moe_dist.model.places import document_positions, places_of
from moe_dist.parallel.layout import layout_of
from moe_dist.verify.shrink import shrunk
from tests.support.feed_forward import MIX
from tests.support.models import plain_model, random_rows, small_config
from tests.support.tolerances import RELATIVE, assert_close, relative_error

END = 7


def config_of(name: str, **sections: dict[str, object]) -> Config:
    return small_config(MIX[name]["moe"], model=MIX[name]["model"], **sections)


def two_documents() -> torch.Tensor:
    tokens_BS = random_rows(2)[:, :12]
    tokens_BS[:, 5] = END
    return tokens_BS


def drawn_model(config: Config) -> Transformer:
    """With no weight that is 0 or 1 by definition."""
    model = plain_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    return model


@pytest.mark.parametrize("ends", [[], [2, 3, 8]])
def test_mix_is_torchs_depthwise_convolution_of_each_document_and_a_sum(ends: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    mix, x = CausalMix(6, 4, "mix").double(), torch.randn(2, 12, 6, generator=draw, dtype=torch.float64)
    tokens = torch.ones(2, 12, dtype=torch.int64)
    tokens[0, ends] = END
    torch.nn.init.normal_(mix.weight, generator=draw)
    position_BS = document_positions(tokens, END) if ends else None
    found = mix(x, places_of(position_BS, 12, small_config().model, x))
    for row, first_places in enumerate(([0, *(end + 1 for end in ends)], [0])):
        for first, last in zip(first_places, [*first_places[1:], 12], strict=True):
            document = x[row, first:last].T[None]
            mixed = F.conv1d(F.pad(document, (3, 0)), mix.weight.flip(1)[:, None], groups=6)
            assert_close(found[row, first:last], (document + mixed)[0].T, f"row {row}, tokens {first} to {last}")


@pytest.mark.parametrize("name", MIX)
def test_future_tokens_and_other_documents_change_nothing_and_tokens_before_do(name: str) -> None:
    # Without attention's view of them: what a token still knows of others came through the mix.
    model, rows = drawn_model(config_of(name)), random_rows(2)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.output.weight)
    rows[:, 4] = END
    with torch.no_grad():
        expected, _ = model(rows, position_BS=document_positions(rows, END))
        for place in (2, 4, 8):
            changed = rows.clone()
            changed[:, place] = (changed[:, place] + 1) % 300 if place != 4 else END + 1
            found, _ = model(changed, position_BS=document_positions(rows, END))
            assert_close(found[:, :place], expected[:, :place], f"tokens before {place}")
            assert not torch.allclose(found[:, place], expected[:, place])
            apart = place == 4  # the last token of its document
            behind = [torch.allclose(found[row, place + 1], expected[row, place + 1]) for row in range(2)]
            assert behind == [apart, apart]
            if place < 8:
                assert_close(found[:, 5:], expected[:, 5:], f"the document behind the one of token {place}")


@pytest.mark.parametrize("name", MIX)
def test_first_weights_make_the_model_without_it_and_learn(name: str) -> None:
    config, rows = config_of(name), random_rows(2)
    plain = small_config(MIX[name]["moe"], model={**MIX[name]["model"], "mix": {"kind": "none"}})
    model = plain_model(config)
    hidden = model(rows)[0]
    assert torch.equal(hidden, plain_model(plain)(rows)[0])
    hidden.square().sum().backward()
    first = {"conv": "mix.weight", "adapter": "mix.wide.weight"}[config.model.mix.kind]
    seen = [p for name, p in model.named_parameters() if name.endswith(first)]
    assert len(seen) == 3 and all(p.grad is not None and p.grad.any() for p in seen)


@pytest.mark.parametrize("name", MIX)
def test_counts_take_the_mix_in(name: str) -> None:
    config, asked = config_of(name), MIX[name]["model"]["mix"]
    plain = small_config(MIX[name]["moe"], model={**MIX[name]["model"], "mix": {"kind": "none"}})
    # gate and up projection of 20 channels in one block, of 8 in two; or 4 channels that 16 are brought to and back
    each = {"conv": 4 * 2 * (20 + 8 + 8), "adapter": 3 * (4 * 2 * 16 + 4 * 3)}[asked["kind"]]
    assert count_parameters(config.model).total - count_parameters(plain.model).total == each
    more = training_flops_per_token(config.model, 12) - training_flops_per_token(plain.model, 12)
    assert more == pytest.approx(6 * each)


@pytest.mark.parametrize("name", MIX)
def test_mix_in_bf16_stays_near_fp32(name: str) -> None:
    config = config_of(name, train={"precision": "fp32"})
    feed_forward = drawn_model(config).blocks[0].feed_forward
    assert isinstance(feed_forward, FeedForward)
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    places = places_of(document_positions(two_documents(), END), 12, config.model, x)
    with torch.no_grad():
        expected = feed_forward(x, places)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = feed_forward(x, places)
        assert narrow.dtype == torch.bfloat16
        assert 0 < relative_error(narrow.float(), expected) <= RELATIVE[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIX)
def test_compiled_mix_has_the_output_and_the_gradients_of_the_plain_one(name: str) -> None:
    config = config_of(name)
    feed_forward = drawn_model(config).blocks[0].feed_forward
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = places_of(document_positions(two_documents(), END), 12, config.model, x)
    slope = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    steps = []
    for forward in (feed_forward.forward, torch.compile(feed_forward.forward)):
        out = forward(x, places)
        steps.append([out, *torch.autograd.grad((out * slope).sum(), list(feed_forward.parameters()))])
    for place, (plain, compiled) in enumerate(zip(*steps, strict=True)):
        assert_close(compiled, plain, f"output or gradient {place}")


def test_mix_is_refused_where_only_routed_experts_are() -> None:
    with pytest.raises(ConfigError, match="does not see a token's neighbours"):
        small_config({"shared_expert_width": 0}, model={"mix": {"kind": "conv"}})


def test_an_adapter_whose_rank_cannot_be_cut_is_refused_and_a_shrunk_one_can() -> None:
    model = {"num_dense_layers": 1, "num_kv_heads": 2, "mix": {"kind": "adapter", "rank": 5}}
    with pytest.raises(LayoutError, match=r"model\.mix\.rank \(5\)"):
        layout_of(small_config(model=model, parallel={"tensor": 2}), 2)
    assert shrunk(small_config(model={**model, "mix": {"kind": "adapter"}}))[0].model.mix.rank == 4
