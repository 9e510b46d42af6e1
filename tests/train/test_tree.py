from itertools import pairwise

import pytest
import tiny
import torch
from torch.testing import assert_close

from hypo_train.tree import pack

VOCAB, PAD = 61, 0


# GPT-2's learned positions are wrong at once when a branch does not restart them.
@pytest.fixture(params=["llama", "gpt_neox", "qwen2", "qwen3", "gpt2"])
def model(request):
    return tiny.new_model(request.param, vocab_size=VOCAB)


def random_tokens(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def ragged_batch():
    """Five prompts of 1..9 tokens; pairs of three, then two samples of two, some empty or of one token."""
    prompts = random_tokens(4, 1, 9, 6, 3)
    owners = [0, 1, 2, 0, 1, 2, 3, 3, 4, 4]
    completions = random_tokens(5, 2, 7, 3, 1, 11, 0, 4, 8, 6, seed=1)
    return prompts, list(zip(owners, completions, strict=True))


def tree_hidden(model, tree):
    """(T, D) the hidden states that predict the counted tokens."""
    hidden = model.get_decoder()(
        input_ids=tree.input_ids,
        attention_mask=tree.attention_mask,
        position_ids=tree.position_ids,
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1)[tree.rows]


def separate_hidden(model, prompts, sequences):
    """The same from one plain row a sequence, without padding or mask."""
    parts = []
    for prompt, completion in sequences:
        row = torch.tensor([prompts[prompt] + completion])
        hidden = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state[0]
        start = len(prompts[prompt]) - 1
        parts.append(hidden[start : start + len(completion)])
    return torch.cat(parts)


def gradients(model, hidden):
    """Of a loss that weighs every hidden state differently, so that swapped rows cannot cancel."""
    model.zero_grad()
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (hidden * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("budget", [None, 20, 64], ids=["longest tree", "below the longest", "one row"])
def test_hidden_states_and_gradients_equal_those_of_separate_rows(model, budget):
    prompts, sequences = ragged_batch()
    tree = pack(prompts, sequences, pad_token_id=PAD, max_tokens_per_row=budget)
    packed = tree_hidden(model, tree)
    separate = separate_hidden(model, prompts, sequences)
    assert_close(packed, separate, atol=1e-5, rtol=1e-5)
    packed_gradients, separate_gradients = gradients(model, packed), gradients(model, separate)
    assert packed_gradients.keys() == separate_gradients.keys()
    for name, expected in separate_gradients.items():
        scale = max(1.0, expected.abs().max().item())
        assert_close(packed_gradients[name], expected, atol=1e-5 * scale, rtol=0, msg=name)


def test_every_index_of_a_hand_written_batch():
    prompts = [[11, 12, 13], [21], [31, 32]]
    sequences = [
        (0, [14, 15, 16]),  # chosen of prompt 0
        (1, [22]),  # chosen of prompt 1: one token, so its branch is empty
        (0, [17, 18]),  # rejected of prompt 0
        (1, []),  # rejected of prompt 1: nothing to count
        (2, [33, 34, 35]),
    ]
    tree = pack(prompts, sequences, pad_token_id=PAD)
    # Prompt 0's tree is 3 + 2 + 1 = 6 tokens, prompt 2's 2 + 2 = 4, prompt 1's 1: they fill two rows of 6.
    assert tree.input_ids.tolist() == [[11, 12, 13, 14, 15, 17], [31, 32, 33, 34, 21, PAD]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 0, 0]]
    #                              s0       s1  s2    s4
    assert tree.rows.tolist() == [2, 3, 4, 10, 2, 5, 7, 8, 9]
    assert tree.targets.tolist() == [14, 15, 16, 22, 17, 18, 33, 34, 35]
    assert tree.cu_seqlens.tolist() == [0, 3, 4, 6, 6, 9]
    mask = ["".join(".x"[seen] for seen in query) for query in tree.attention_mask[:, 0].flatten(0, 1)]
    assert mask == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "xxxxx.",
        "xxx..x",  # the second branch sees the prompt and not the first branch
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "....x.",  # another tree of the same row
        ".....x",  # padding
    ]
    assert tree.attention_mask.shape == (2, 1, 6, 6)
    assert tree.num_tokens == 11
    assert tree.attention_mask.dtype == torch.bool
    for name in ("input_ids", "position_ids", "rows", "targets", "cu_seqlens"):
        assert getattr(tree, name).dtype == torch.int64


def test_the_order_of_sequences_is_the_callers():
    prompts, sequences = ragged_batch()
    backwards = pack(prompts, sequences[::-1], pad_token_id=PAD)
    spans = backwards.cu_seqlens.tolist()
    found = [backwards.targets[a:b].tolist() for a, b in pairwise(spans)]
    assert found == [completion for _, completion in sequences[::-1]]


def test_padding_neither_changes_a_result_nor_makes_it_nan(model):
    prompts, sequences = ragged_batch()
    results = []
    for pad_token_id in (PAD, 7):
        tree = pack(prompts, sequences, pad_token_id=pad_token_id)
        assert (tree.attention_mask.sum(-1) == 1).sum() > len(prompts), "no padding in this batch"
        hidden = tree_hidden(model, tree)
        results.append({"hidden": hidden.detach(), **gradients(model, hidden)})
    for name, value in results[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, results[1][name]), name


def test_every_token_attends_to_itself():
    tree = pack(*ragged_batch(), pad_token_id=PAD, max_tokens_per_row=40)
    assert tree.attention_mask[:, 0].diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize(
    ("budget", "shape"),
    [
        (None, (3, 8)),  # 8 | 5 3 | 4 2
        (8, (3, 8)),
        (13, (2, 13)),  # 8 5 | 4 3 2, as wide as the fuller row
        (22, (1, 22)),
        (1000, (1, 22)),  # no wider than what is there
        (3, (3, 8)),  # a tree above the budget sets the width
    ],
)
def test_trees_share_rows_first_fit_decreasing(budget, shape):
    prompts = random_tokens(3, 8, 2, 5, 4)
    tree = pack(prompts, [(p, [9]) for p in range(5)], pad_token_id=PAD, max_tokens_per_row=budget)
    assert tuple(tree.input_ids.shape) == shape
    assert (tree.input_ids != PAD).sum() == 22


def test_a_prompt_without_sequences_takes_no_room():
    tree = pack(random_tokens(3, 30), [(0, [5, 6])], pad_token_id=PAD)
    assert tree.input_ids.shape == (1, 4)


def test_completions_of_no_tokens_alone_leave_nothing_to_count():
    tree = pack([[1, 2]], [(0, []), (0, [])], pad_token_id=PAD)
    assert tree.rows.numel() == tree.targets.numel() == 0
    assert tree.cu_seqlens.tolist() == [0, 0, 0]
    assert tree.input_ids.tolist() == [[1, 2]]


def test_moving_a_tree_leaves_what_the_loss_plans_with_on_the_host():
    tree = pack([[1, 2]], [(0, [3, 4])], pad_token_id=PAD).to("meta")
    assert tree.targets.device.type == tree.cu_seqlens.device.type == "cpu"
    for name in ("input_ids", "position_ids", "attention_mask", "rows"):
        assert getattr(tree, name).device.type == "meta"


@pytest.mark.parametrize(
    ("prompts", "sequences", "budget", "message"),
    [
        ([[1], []], [(0, [2])], None, "prompt 1 is empty"),
        ([[1]], [(0, [2]), (1, [2])], None, "sequence 1 names prompt 1 of 1 prompts"),
        ([[1]], [(-1, [2])], None, "sequence 0 names prompt -1"),
        ([[1]], [], None, "no sequences to pack"),
        ([[1]], [(0, [2])], 0, "max_tokens_per_row is 0"),
    ],
)
def test_what_cannot_be_packed_is_named(prompts, sequences, budget, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, sequences, pad_token_id=PAD, max_tokens_per_row=budget)
