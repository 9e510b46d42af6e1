"""The proof, on a few tokens and before any training, that a model can be trained exactly here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.policy import Head, HeadFunction, Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import ModelError, first_line
from hypo_train.trees.attention import NAME
from hypo_train.trees.pack import Batcher, pack, separate_rows
from hypo_train.trees.tree import Tree

T = TypeVar("T")


def check_exactness(policy: Policy) -> str | None:
    """Compare what the loss will compute with what the model computes, on a few tokens, before any training.

    Returns:
        why the model has to train on separate rows: its attention does not do what a tree asks of it. None: it
        trains on trees.

    Raises:
        ModelError: the logits are not the head's function of the last hidden state, or a padded row's are not
            those of the row alone.
    """
    name = type(policy.base).__name__
    _check_parts(policy)
    weight = policy.head().weight
    vocab, device = weight.shape[0], weight.device
    prompts = [[(7 * i + 1 + p) % vocab for i in range(5 + p)] for p in range(2)]
    branches = [(0, [(11 * i + 3) % vocab for i in range(4)]), (0, [(5 * i + 2) % vocab for i in range(6)])]
    branches.append((1, [(3 * i + 4) % vocab for i in range(5)]))
    precise = all(p.dtype == torch.float32 for p in policy.parameters() if p.is_floating_point())

    def run(tree: Tree, function: HeadFunction[T]) -> T:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=not precise):
            return functional_call(policy, _drawn_b(policy), (tree.to(device), function))

    def every(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        own, by_head = zip(*(_plain_logits(policy, prompts[p], branch) for p, branch in branches), strict=True)
        return head.next_token_logits(hidden), torch.cat(own), torch.cat(by_head)

    def logits_of(tree: Tree) -> Tensor:
        return run(tree, lambda hidden, head: head.next_token_logits(hidden))

    try:
        with eval_mode(policy):
            in_rows, alone, by_head = run(separate_rows(prompts, branches, pad_token_id=0), every)
            _check_finite(alone, name)
            if not _close(by_head, alone, 1e-3 if precise else 1e-2):
                raise ModelError(
                    f"{name} computes its logits in a way the kernels do not serve: they differ by "
                    f"{(by_head - alone).abs().max():.2g} from its head applied to the last hidden state"
                )
            if not _close(in_rows, alone, 1e-3 if precise else 1e-1):
                raise ModelError(
                    f"{name} ({policy.base.config._attn_implementation} attention) does not honour padding: "
                    f"logits differ by {(in_rows - alone).abs().max():.2g} from those of a row alone"
                )
            return _why_no_trees(policy, logits_of, prompts, branches, alone, precise)
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be trained here: {first_line(error)}") from error


def check_rewards(model: RewardModel) -> str | None:
    """The same of a reward model: its rewards in trees and padded rows against its own of single rows.

    Raises:
        ModelError: rewards in a padded row are not the model's own.
    """
    name, attention = type(model.base).__name__, model.base.config._attn_implementation
    parameter = next(model.parameters())
    vocab, pad = model.base.get_input_embeddings().weight.shape[0], model.base.config.get_text_config().pad_token_id

    def ids(step: int, start: int, count: int) -> list[int]:
        found = [(step * i + start) % vocab for i in range(count)]
        return [(token + 1) % vocab if token == pad else token for token in found]

    prompts = [ids(7, 1 + p, 5 + p) for p in range(2)]
    completions = [ids(11, 3, 4), ids(5, 2, 6), ids(5, 1, 5), ids(3, 2, 2)]
    precise = all(p.dtype == torch.float32 for p in model.parameters())

    def rewards(batcher: Batcher) -> Tensor:
        tree = batcher.scored(prompts, completions).to(parameter.device)
        return model.rewards(tree)

    with eval_mode(model), torch.no_grad(), torch.autocast(parameter.device.type, torch.bfloat16, enabled=not precise):
        try:
            alone = torch.cat([_plain_reward(model, [*prompts[i // 2], *c]) for i, c in enumerate(completions)])
            in_rows = rewards(Batcher(pad, shares_prompts=False))
        except (TypeError, RuntimeError) as error:
            raise ModelError(f"{name} cannot be trained here: {first_line(error)}") from error
        _check_finite(alone, name)
        if not _close(in_rows, alone, 1e-3 if precise else 1e-1):
            raise ModelError(
                f"{name} ({attention} attention) gives a row alone other rewards than the same row in a batch: they "
                f"differ by {(in_rows - alone).abs().max():.2g}"
            )
        if attention != NAME:
            return f"{attention} attention takes no trees"
        try:
            in_trees = rewards(Batcher(pad))
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            return f"it cannot take trees: {first_line(error)}"
    if _close(in_trees, alone, 1e-3 if precise else 1e-1):
        return None
    return f"its attention does not keep to trees: rewards differ by {(in_trees - alone).abs().max():.2g}"


def _check_finite(results: Tensor, name: str) -> None:
    if not torch.isfinite(results).all():
        raise ModelError(f"{name} gives NaN or infinity on a few plain tokens: its weights are damaged, use other ones")


def _plain_reward(model: RewardModel, tokens: list[int]) -> Tensor:
    """(1,) by the model's own forward."""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    return model.base(input_ids=ids, use_cache=False).logits[:, 0].float()


def _why_no_trees(
    policy: Policy,
    logits_of: Callable[[Tree], Tensor],
    prompts: list[list[int]],
    branches: list[tuple[int, list[int]]],
    alone: Tensor,
    precise: bool,
) -> str | None:
    attention = policy.base.config._attn_implementation
    if attention != NAME:
        return f"{attention} attention takes no trees"
    try:
        in_tree = logits_of(pack(prompts, branches))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        return f"it cannot take trees: {first_line(error)}"
    # Two layouts of a row round differently: by 3 % of the largest logit in 30 layers of bf16, where a wrong mask
    # is off by 30 %.
    if _close(in_tree, alone, 1e-3 if precise else 1e-1):
        return None
    return f"its attention does not keep to trees: logits differ by {(in_tree - alone).abs().max():.2g}"


def _check_parts(policy: Policy) -> None:
    """Refuse a head that is no linear layer, with or without LoRA, and an adapter that does not switch off."""
    name, head = type(policy.base).__name__, policy.base.get_output_embeddings()
    plain = head
    if policy.is_peft:
        from peft.tuners.lora import Linear

        plain = head.base_layer if type(head) is Linear else head
        for config in policy.model.peft_config.values():
            if config.bias != "none":
                raise ModelError(f"bias={config.bias!r} of the adapter also trains the reference: use bias='none'")
    if type(plain) is not nn.Linear:
        kind = "none" if head is None else type(head).__name__
        raise ModelError(f"{name} has no plain linear LM head (found {kind}), nor LoRA on one")


def _drawn_b(policy: Policy) -> dict[str, Tensor]:
    """Random values for the B of LoRA on the head: before training it is zero, and would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    of_head = {id(p) for p in policy.base.get_output_embeddings().parameters()}
    return {
        name: torch.randn(p.shape, generator=generator).to(p)
        for name, p in policy.named_parameters()
        if id(p) in of_head and ".lora_B." in name
    }


def _plain_logits(policy: Policy, prompt: Sequence[int], branch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits (len(branch), V) of a plain row: the model's own, and the head's of the last hidden state."""
    head = policy.head()
    ids = torch.tensor([[*prompt, *branch]], device=head.weight.device)
    own = policy.base(input_ids=ids, use_cache=False).logits
    hidden = policy.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    predicting = slice(len(prompt) - 1, -1)
    return own[0, predicting].float(), head.next_token_logits(hidden[0, predicting])


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Within ``tolerance`` of the largest value."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3))
