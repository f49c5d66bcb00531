"""Rows are filled up with ids that they have not."""

import torch

from mmsae.kernels.ids import distinct


def test_what_is_not_used_becomes_an_id_that_the_row_has_not():
    filled = distinct(torch.tensor([[5, 0, 5], [2, 7, 1]]), torch.tensor([[True, False, False], [False, True, False]]))
    assert filled.tolist() == [[5, 0, 1], [0, 7, 1]]
