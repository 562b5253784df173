"""Sampling: greedy is the argmax, seeds repeat, top-k bounds, the end token ends."""

from __future__ import annotations

import torch

from moe_dist.generate.sampling import Sampling, _choose, continue_prompts
from tests.support.models import plain_model, small_config


def continued(temperature=1.0, top_k=0, seed=0, prompts=((5, 6, 7), (9,)), end=299, tokens=12):
    model = plain_model(small_config()).eval()
    sampling = Sampling(max_new_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    return continue_prompts(model, [list(p) for p in prompts], sampling, window=8, end_token=end)


def test_sampling_greedy_takes_the_most_probable_token_each_time():
    model = plain_model(small_config()).eval()
    tokens = [5, 6, 7]
    with torch.no_grad():
        for _ in range(4):
            tokens.append(int(model.logits(model(torch.tensor([tokens[-8:]]))[0][0, -1]).argmax()))
    assert continued(temperature=0.0, prompts=((5, 6, 7),), tokens=4) == [tokens[3:]]
    assert continued(top_k=1, prompts=((5, 6, 7),), tokens=4) == [tokens[3:]]


def test_sampling_separate_documents_do_not_see_what_ended_before():
    asked = Sampling(max_new_tokens=5, temperature=0.0, top_k=0, seed=0, separate=True)
    model = plain_model(small_config()).eval()
    alone, behind = continue_prompts(model, [[5, 6, 7], [9, 8, 1, 5, 6, 7]], asked, window=16, end_token=1)
    assert alone == behind == continued(temperature=0.0, prompts=((5, 6, 7),), end=1, tokens=5)[0]


def test_sampling_same_seed_same_text_other_seed_other_text():
    assert continued(seed=3) == continued(seed=3)
    assert continued(seed=3) != continued(seed=4)
    assert continued(seed=3, prompts=((5, 6, 7),))[0] == continued(seed=3)[0]


def test_sampling_stops_at_the_end_token_and_leaves_it_out():
    first = continued(temperature=0.0, prompts=((5, 6, 7),), tokens=6)[0]
    end = first[2]
    assert continued(temperature=0.0, prompts=((5, 6, 7),), tokens=6, end=end) == [first[: first.index(end)]]


def test_sampling_top_k_never_takes_a_less_probable_token():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(1, 5.0, 2, 0)
    taken = {_choose(logits, sampling, generator) for _ in range(200)}
    assert taken == {1, 3}
