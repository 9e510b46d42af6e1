"""Trees on a fake CUDA device."""

from __future__ import annotations

import torch
from fake_device import CUDA, fake_cuda

from hypo_train.trees.attention import Part
from hypo_train.trees.layout import Layout
from hypo_train.trees.pack import pack, separate_rows


def test_branches_of_one_token_have_nothing_to_attend() -> None:
    """The prompts run first and every completion is one token, as of a policy that always stops at once."""
    layout = Layout((300, 200), ((0, 0), (0, 0)))
    with fake_cuda((9, 0)):
        query = torch.empty(1, 4, 0, 64, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
        key = torch.empty(1, 2, 500, 64, dtype=torch.bfloat16, device=CUDA)
        none = torch.empty(1, 2, 0, 64, dtype=torch.bfloat16, device=CUDA)
        part = Part(layout, has_prompts=False, prompt={0: (key, key)})
        out = part.attend(0, query, none, none)
        assert out.shape == (1, 0, 4, 64)
        assert out.requires_grad, "the backward pass goes through every layer"


def test_a_batch_goes_to_the_device_in_one_pinned_copy() -> None:
    for make in (
        lambda: pack([[1, 2, 3]], [(0, [4, 5]), (0, [6, 7])]),
        lambda: separate_rows([[1, 2, 3]], [(0, [4, 5]), (0, [6])], pad_token_id=0),
    ):
        tree = make()
        with fake_cuda((9, 0)) as device:
            moved = tree.to(CUDA)
        assert moved.input_ids.device == CUDA
        assert [copy.is_pinned and copy.non_blocking for copy in device.record.copies] == [True]
        if tree.attention_mask is not None:
            assert moved.attention_mask is not None
            assert moved.attention_mask.dtype == torch.bool
