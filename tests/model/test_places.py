"""Documents in one row that do not see each other: positions, sight, and each document as if it stood alone."""

from __future__ import annotations

import pytest
import torch

from moe_dist.model.places import document_positions, places_of
from tests.support.models import plain_model, random_rows, small_config
from tests.support.tolerances import assert_close

END = 7
ROW = [3, 4, END, 5, 6, 8, END, 9]


def test_positions_worked_by_hand_begin_anew_after_end_of_text():
    tokens = torch.tensor([ROW, [END, END, 1, 2, 3, 4, 5, 6]])
    assert document_positions(tokens, END).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 3, 4, 5]]
    assert document_positions(tokens[:0], END).shape == (0, 8)


def test_places_worked_by_hand_see_their_own_document_up_to_themselves():
    positions = document_positions(torch.tensor([[3, END, 5, 6]]), END)
    places = places_of(positions, 4, small_config().model, torch.zeros(()))
    assert places.sees is not None
    assert places.sees[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    plain = places_of(None, 4, small_config().model, torch.zeros(()))
    assert plain.sees is None and torch.equal(places.cos[0, 0], plain.cos[[0, 1, 0, 1]])


@pytest.mark.parametrize("model", [{}, {"num_heads": 4, "num_kv_heads": 2, "num_dense_layers": 1}])
def test_separate_documents_have_the_hidden_states_of_each_alone(model):
    decoder, row = plain_model(small_config(model=model)), torch.tensor([ROW])
    together, _ = decoder(row, position_BS=document_positions(row, END))
    for first, last in ((0, 3), (3, 7), (7, 8)):
        alone, _ = decoder(row[:, first:last])
        assert_close(together[:, first:last], alone, f"tokens {first} to {last}")
    joined, _ = decoder(row)
    assert_close(joined[:, :3], together[:, :3], "the first document")
    assert not torch.allclose(joined[:, 3:], together[:, 3:])


def test_rows_of_one_document_are_the_same_either_way():
    decoder, rows = plain_model(small_config()), random_rows(3)
    rows = rows.where(rows != END, END + 1)
    separate, _ = decoder(rows, position_BS=document_positions(rows, END))
    assert_close(separate, decoder(rows)[0], "rows without end-of-text")
