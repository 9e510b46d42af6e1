from itertools import pairwise

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import modeling_flash_attention_utils as flash_utils

from hypo_train.trees.attention import NAME, Part, branch_mask, decoder_inputs
from hypo_train.trees.layout import Layout
from hypo_train.trees.pack import pack, separate_rows

VOCAB, PAD = 61, 0


# GPT-2's learned positions are wrong at once when a branch does not restart them.
@pytest.fixture(params=["llama", "gpt_neox", "qwen2", "qwen3", "gpt2"])
def model(request):
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if request.param == "gpt2" else {}
    model = tiny.new_model(request.param, vocab_size=VOCAB, **dropout)
    model.set_attn_implementation(NAME)
    return model


def random_tokens(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def ragged_batch():
    """Five prompts of 1..9 tokens; pairs of three, then two samples of two, some empty or of one token."""
    prompts = random_tokens(4, 1, 9, 6, 3)
    owners = [0, 1, 2, 0, 1, 2, 3, 3, 4, 4]
    completions = random_tokens(5, 2, 7, 3, 1, 11, 0, 4, 8, 6, seed=1)
    return prompts, list(zip(owners, completions, strict=True))


def decode(model, tree, part):
    """(R, N, D) hidden states of a part of the tree's tokens."""
    tokens = part.tokens if part else slice(None)
    attention = decoder_inputs(part, "cpu") if part else {"attention_mask": tree.attention_mask}
    return model.get_decoder()(
        input_ids=tree.input_ids[:, tokens],
        position_ids=tree.position_ids[:, tokens],
        use_cache=False,
        **attention,
    ).last_hidden_state


def in_one_call(model, tree):
    return decode(model, tree, Part(tree.layout))


def prompts_first(model, tree):
    """The prompts, then the branches from their keys and values."""
    kept = {}
    prompts = decode(model, tree, Part(tree.layout, has_branches=False, kept=kept))
    return torch.cat([prompts, decode(model, tree, Part(tree.layout, has_prompts=False, prompt=kept))], dim=1)


def hidden_of(model, prompts, sequences, way):
    """(T, D) the hidden states that predict the counted tokens."""
    if way == "separate rows":
        tree = separate_rows(prompts, sequences, pad_token_id=PAD)
        hidden = decode(model, tree, None)
    else:
        tree = pack(prompts, sequences)
        hidden = {"in one call": in_one_call, "prompts first": prompts_first}[way](model, tree)
    return hidden.flatten(0, 1)[tree.rows]


def one_by_one(model, prompts, sequences):
    """The same from one plain row a sequence, without padding, by SDPA as it is."""
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


WAYS = ["in one call", "prompts first", "separate rows"]


@pytest.fixture(params=[0, 96], ids=["a branch at a time", "a tree at a time"])
def groups(request, monkeypatch):
    monkeypatch.setattr("hypo_train.trees.layout.SMALL_TREE", request.param)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("way", WAYS)
def test_hidden_states_and_gradients_equal_those_of_plain_rows(model, groups, way, checkpointing):
    batch = ragged_batch()
    expected = one_by_one(model, *batch)
    expected_gradients = gradients(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    found = hidden_of(model, *batch, way)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert_close(found_gradients[name], gradient, atol=1e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_softcapped_scores_are_capped_in_trees_too(groups, way):
    model = tiny.new_model("gemma2", vocab_size=VOCAB, attn_logit_softcapping=2.0)
    batch = ragged_batch()
    model.set_attn_implementation("eager")
    expected = one_by_one(model, *batch)
    if way != "separate rows":
        model.set_attn_implementation(NAME)
    assert_close(hidden_of(model, *batch, way), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def flash(monkeypatch):
    """flash-attn's two functions by SDPA, with the names of its arguments; counts the sequences without padding."""
    unpadded = []

    def plain(q, k, v, softmax_scale=None, causal=False):
        states = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*states, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        unpadded.append(len(q))
        runs = pairwise(cu_seqlens_q.tolist())
        parts = [plain(*(x[a:b].unsqueeze(0) for x in (q, k, v)), softmax_scale, causal)[0] for a, b in runs]
        return torch.cat(parts)

    functions = plain, varlen, None, flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return unpadded


@pytest.mark.parametrize("batch", ["ragged", "rows of one length", "one row"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen3"])
def test_flash_attention_gets_separate_rows_without_padding(flash, architecture, batch):
    model = tiny.new_model(architecture, vocab_size=VOCAB)
    prompts, sequences = ragged_batch()
    if batch == "rows of one length":
        sequences = [(0, tokens) for tokens in random_tokens(5, 5, 5)]
    elif batch == "one row":
        sequences = sequences[:1]
    expected = one_by_one(model, prompts, sequences)
    # Without flash-attn, transformers' own setter would refuse.
    model.config._attn_implementation_internal = "flash_attention_2"
    found = hidden_of(model, prompts, sequences, "separate rows")
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    tokens = sum(len(prompts[p]) + max(0, len(completion) - 1) for p, completion in sequences)
    assert flash == ([tokens] * 2 if batch == "ragged" else [])


def test_only_small_trees_attend_all_branches_together():
    layout = Layout((40, 40, 3), ((28, 0, 28), (28, 29), (0,)))
    assert layout.branch_groups == [(0, (28, 28)), (1, (28,)), (1, (29,))]


def test_nothing_is_computed_twice_or_padded(model):
    tokens = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts, sequences = ragged_batch()
    tree = pack(prompts, sequences)
    in_one_call(model, tree)
    prompts_first(model, tree)
    branches = sum(max(0, len(completion) - 1) for _, completion in sequences)
    assert tokens == [sum(map(len, prompts)) + branches, sum(map(len, prompts)), branches]
    assert tree.num_tokens == tree.layout.num_tokens == tokens[0]


def test_without_a_tree_the_model_attends_as_under_sdpa(model):
    ids = torch.tensor([[PAD, PAD, 5, 7], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(found[mask.bool()], model(input_ids=ids, attention_mask=mask).logits[mask.bool()])


def test_the_attention_of_a_run_is_not_saved_with_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_every_index_of_a_hand_written_batch():
    prompts = [[11, 12, 13], [21], [31, 32]]
    sequences = [
        (0, [14, 15, 16]),  # chosen of prompt 0
        (1, [22]),  # chosen of prompt 1: one token, so its branch is empty
        (0, [17, 18]),  # rejected of prompt 0
        (1, []),  # rejected of prompt 1: nothing to count
        (2, [33, 34, 35]),
    ]
    tree = pack(prompts, sequences)
    #                                 prompt 0    1   prompt 2 | s0      s2  s4
    assert tree.input_ids.tolist() == [[11, 12, 13, 21, 31, 32, 14, 15, 17, 33, 34]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 3, 4, 3, 2, 3]]
    assert tree.layout == Layout(prompts=(3, 1, 2), branches=((2, 1), (0, 0), (2,)))
    #                              s0       s1 s2    s4
    assert tree.rows.tolist() == [2, 6, 7, 3, 2, 8, 5, 9, 10]
    assert tree.targets.tolist() == [14, 15, 16, 22, 17, 18, 33, 34, 35]
    assert tree.cu_seqlens.tolist() == [0, 3, 4, 6, 6, 9]
    assert tree.num_tokens == 11
    masks = [branch_mask(prompt, branches, None, "cpu") for prompt, branches in ((3, (2, 1)), (2, (2,)))]
    drawn = [["".join(".x"[seen] for seen in query) for query in mask] for mask in masks]
    assert drawn == [["xxxx..", "xxxxx.", "xxx..x"], ["xxx.", "xxxx"]]
    within_3 = branch_mask(2, (3, 1), 3, "cpu")  # the last two tokens of a prompt
    drawn = ["".join(".x"[seen] for seen in query) for query in within_3]
    assert drawn == ["xxx...", ".xxx..", "..xxx.", "xx...x"]
    for name in ("input_ids", "position_ids", "rows", "targets", "cu_seqlens"):
        assert getattr(tree, name).dtype == torch.int64

    apart = separate_rows(prompts, sequences, pad_token_id=PAD)
    assert apart.input_ids.tolist() == [
        [11, 12, 13, 14, 15],
        [21, PAD, PAD, PAD, PAD],
        [11, 12, 13, 17, PAD],
        [21, PAD, PAD, PAD, PAD],
        [31, 32, 33, 34, PAD],
    ]
    assert apart.position_ids.tolist()[2] == [0, 1, 2, 3, 0]
    assert apart.attention_mask.sum(1).tolist() == [5, 1, 4, 1, 4]
    assert apart.rows.tolist() == [2, 3, 4, 5, 12, 13, 21, 22, 23]
    assert apart.targets.tolist() == tree.targets.tolist()
    assert apart.cu_seqlens.tolist() == tree.cu_seqlens.tolist()
    assert apart.num_tokens == 15


def test_the_order_of_sequences_is_the_callers():
    prompts, sequences = ragged_batch()
    backwards = pack(prompts, sequences[::-1])
    spans = backwards.cu_seqlens.tolist()
    found = [backwards.targets[a:b].tolist() for a, b in pairwise(spans)]
    assert found == [completion for _, completion in sequences[::-1]]


def test_a_prompt_without_sequences_takes_no_room():
    tree = pack(random_tokens(3, 30), [(0, [5, 6])])
    assert tree.input_ids.shape == (1, 4)


def test_completions_of_no_tokens_alone_leave_nothing_to_count():
    tree = pack([[1, 2]], [(0, []), (0, [])])
    assert tree.rows.numel() == tree.targets.numel() == 0
    assert tree.cu_seqlens.tolist() == [0, 0, 0]
    assert tree.input_ids.tolist() == [[1, 2]]


def test_moving_a_tree_keeps_its_loss_plan_on_the_host():
    for tree in (pack([[1, 2]], [(0, [3, 4])]), separate_rows([[1, 2]], [(0, [3, 4])], pad_token_id=PAD)):
        moved = tree.to("meta")
        assert moved.targets.device.type == moved.cu_seqlens.device.type == "cpu"
        within_3 = branch_mask(2, (3, 1), 3, "cpu")  # the last two tokens of a prompt
    drawn = ["".join(".x"[seen] for seen in query) for query in within_3]
    assert drawn == ["xxx...", ".xxx..", "..xxx.", "xx...x"]
    for name in ("input_ids", "position_ids", "rows"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.attention_mask.device.type == "meta"


@pytest.mark.parametrize(
    ("prompts", "sequences", "message"),
    [
        ([[1], []], [(0, [2])], "prompt 1 is empty"),
        ([[1]], [(0, [2]), (1, [2])], "sequence 1 has prompt index 1, but there are 1 prompts"),
        ([[1]], [(-1, [2])], "sequence 0 has prompt index -1"),
        ([[1]], [], "no sequences to pack"),
    ],
)
def test_what_cannot_be_packed_is_named(prompts, sequences, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, sequences)
    with pytest.raises(ValueError, match=message):
        separate_rows(prompts, sequences, pad_token_id=PAD)
