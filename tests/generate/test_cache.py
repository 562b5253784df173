"""Text from a cache: the logits and tokens of a model that reads everything anew, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.generate.sampling import Sampling, continue_prompts
from moe_dist.model import Transformer
from moe_dist.model.cache import Cache
from moe_dist.model.places import document_positions
from tests.support.attention import ATTENTION
from tests.support.feed_forward import MIX
from tests.support.models import plain_model, random_rows, small_config
from tests.support.routers import ROUTERS
from tests.support.tolerances import assert_close

END, LENGTHS, STEPS = 7, (5, 9, 1), 8
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "hash": (ROUTERS["hash"], {}),
    "sigmoid, groups, bias": (ROUTERS["sigmoid, groups, bias"], {}),
    **{name: ({}, {"num_layers": 3, "num_dense_layers": 1, **model}) for name, model in ATTENTION.items()},
    **{name: (case["moe"], case["model"]) for name, case in MIX.items()},
}


def model_of(name: str, precision: str = "fp64") -> Transformer:
    """With no weight that is 0 or 1 by definition."""
    moe, model = MODELS[name]
    made = plain_model(small_config(moe, model=model, train={"precision": precision})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return made


def read_bit_by_bit(model: Transformer, rows: Tensor, cache: Cache, separate: bool) -> list[list[Tensor]]:
    """Final hidden states of every row: of its prompt, then of one token after the other."""
    positions = document_positions(rows, END)
    found: list[list[Tensor]] = [[] for _ in rows]
    for step in range(STEPS + 1):
        first = [0] * len(rows) if step == 0 else [length + step - 1 for length in LENGTHS]
        lengths = LENGTHS if step == 0 else (1,) * len(rows)
        place = torch.tensor(first)[:, None] + torch.arange(max(lengths))
        given, told = rows.gather(1, place), positions.gather(1, place) if separate else None
        hidden = model.continued(given, lengths, cache, told)
        for row, length in enumerate(lengths):
            found[row].append(hidden[row, :length])
    return found


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_behind_a_cache_are_those_of_reading_anew(name, precision, separate):
    model, rows = model_of(name, precision), random_rows(3, length=20)
    rows[:, [4, 6, 11]] = END
    with torch.no_grad():
        found = read_bit_by_bit(model, rows, Cache(3, 18, torch.device("cpu")), separate)
        expected, _ = model(rows, position_BS=document_positions(rows, END) if separate else None)
        for row, length in enumerate(LENGTHS):
            logits = model.logits(torch.cat(found[row]))
            assert_close(logits, model.logits(expected[row, : length + STEPS]), f"row {row}")


# Numbers a token of one layer: keys and values of two heads of 8; of a latent of 12 and 4 turned channels.
KEPT = {
    "norms of the whole, biases, sinks, windows, yarn": [(32, 4), (32, 18), (32, 4)],
    "norms of heads, interleaved pairs, a larger base, windows everywhere": [(32, 5)] * 3,
    "latent, compressed queries, temperatures": [(16, 18)] * 3,
    "latent, plain queries, sinks, windows, divided positions": [(16, 4), (16, 18), (16, 4)],
}


@pytest.mark.parametrize("name", KEPT)
def test_a_cache_keeps_latents_and_windows_alone_and_does_not_grow(name):
    model, rows, cache = model_of(name), random_rows(3, length=20), Cache(3, 18, torch.device("cpu"))
    expected = 3 * 8 * sum(numbers * tokens for numbers, tokens in KEPT[name])
    with torch.no_grad():
        read_bit_by_bit(model, rows, cache, separate=False)
    assert cache.nbytes == expected
    cache.select([2, 0])
    assert cache.nbytes == expected // 3 * 2 and cache.seen == [1 + STEPS, 5 + STEPS]


def test_tails_worked_by_hand_hold_the_last_tokens_of_each_row():
    cache = Cache(2, 8, torch.device("cpu"))
    cache.begin([3, 1])
    before = cache.tail("conv", torch.tensor([[1.0, 2, 3], [9, 0, 0]])[..., None], 2)  # the second row is padded
    assert not before.any()
    cache.end()
    for new, expected in (([4.0, 8], [[2, 3], [0, 9]]), ([5.0, 7], [[3, 4], [9, 8]])):
        cache.begin([1, 1])
        assert cache.tail("conv", torch.tensor(new)[:, None, None], 2)[..., 0].tolist() == expected
        cache.end()
    cache.select([1])
    cache.begin([1])
    assert cache.tail("conv", torch.tensor([[[6.0]]]), 2)[..., 0].tolist() == [[8, 7]]


def test_a_full_cache_takes_no_more():
    model, cache = model_of("plain"), Cache(1, 3, torch.device("cpu"))
    model.continued(torch.tensor([[1, 2, 3]]), [3], cache, None)
    with pytest.raises(AssertionError, match="a cache of 3 tokens cannot take 4"):
        model.continued(torch.tensor([[4]]), [1], cache, None)


@torch.no_grad()
def read_anew(model: Transformer, prompt: list[int], tokens: int, window: int, separate: bool) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + tokens:
        recent = torch.tensor([text[-window:]])
        positions = document_positions(recent, END) if separate else None
        text.append(int(model.logits(model(recent, position_BS=positions)[0][0, -1]).argmax()))
        if text[-1] == END:
            return text[len(prompt) : -1]
    return text[len(prompt) :]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", [*ATTENTION, *MIX, "plain"])
def test_prompts_continued_together_are_those_read_anew_one_by_one(name, separate):
    """Texts of all lengths, some of which outgrow the window; and more of them than are read at once."""
    model = model_of(name)
    prompts = [[int(token) for token in row[: 1 + n % 11]] for n, row in enumerate(random_rows(18))]
    prompts[3][1], prompts[4][-1], prompts[7][2] = END, END, END
    asked = Sampling(max_new_tokens=7, temperature=0.0, top_k=0, seed=0, separate=separate)
    expected = [read_anew(model, prompt, 7, 10, separate) for prompt in prompts]
    assert continue_prompts(model, prompts, asked, window=10, end_token=END) == expected


def test_a_text_that_ends_leaves_the_others_as_they_are():
    model, asked = model_of("plain"), Sampling(max_new_tokens=6, temperature=0.0, top_k=0, seed=0)
    first, second, third = continue_prompts(model, [[5, 6], [9], [4, 4, 8]], asked, window=16, end_token=299)
    end = first[2]
    shorter = [text[: text.index(end)] if end in text else text for text in (first, second, third)]
    assert continue_prompts(model, [[5, 6], [9], [4, 4, 8]], asked, window=16, end_token=end) == shorter
    assert len(shorter[0]) == 2 and max(map(len, shorter)) == 6


def test_experts_with_a_capacity_read_a_text_anew_for_every_token():
    config = small_config({"capacity_factor_eval": 0.75})
    model, asked = plain_model(config).eval(), Sampling(max_new_tokens=5, temperature=0.0, top_k=0, seed=0)
    assert continue_prompts(model, [[5, 6, 8]], asked, 16, END) == [read_anew(model, [5, 6, 8], 5, 16, False)]
