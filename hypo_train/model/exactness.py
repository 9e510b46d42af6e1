"""Check on a few tokens, before training, that a model gives the same results as its own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.policy import Head, HeadFunction, Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import ModelError, TreeModel, first_line
from hypo_train.trees.attention import NAME
from hypo_train.trees.pack import pack, separate_rows
from hypo_train.trees.tree import Tree

T = TypeVar("T")
Sequences = list[tuple[int, list[int]]]  # a prompt's index, and the tokens that follow it


def check_exactness(model: TreeModel[Any]) -> str | None:
    """Compare what training will compute with the model's own forward pass on plain rows, for a few tokens.

    Returns:
        None if the model trains on trees, or the reason why it needs separate rows.

    Raises:
        ModelError: logits (or rewards) differ from the model's own on separate rows too.
    """
    precise = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    try:
        with (
            eval_mode(model),
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=not precise),
        ):
            return _check_policy(model, precise) if isinstance(model, Policy) else _check_rewards(model, precise)
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"{type(model.base).__name__} cannot be trained here: {first_line(error)}") from error


def _check_policy(policy: Policy, precise: bool) -> str | None:
    name = type(policy.base).__name__
    _check_parts(policy)
    vocab = policy.head().weight.shape[0]
    prompts = [[(7 * i + 1 + p) % vocab for i in range(5 + p)] for p in range(2)]
    branches = [(0, [(11 * i + 3) % vocab for i in range(4)]), (0, [(5 * i + 2) % vocab for i in range(6)])]
    branches.append((1, [(3 * i + 4) % vocab for i in range(5)]))

    def run(tree: Tree | None, function: HeadFunction[T]) -> T:
        return functional_call(policy, _random_lora_b(policy), (tree, function))

    def plain(_: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        models_own, by_head = zip(*(_plain_logits(policy, prompts[p], branch) for p, branch in branches), strict=True)
        return torch.cat(models_own), torch.cat(by_head)

    expected, by_head = run(None, plain)
    if torch.isfinite(expected).all() and not _close(by_head, expected, 1e-3 if precise else 1e-2):
        raise ModelError(
            f"{name} computes its logits in a way the kernels do not serve: they differ by "
            f"{(by_head - expected).abs().max():.2g} from its head applied to the last hidden state"
        )

    def logits(tree: Tree) -> Tensor:
        return run(tree, lambda hidden, head: head.next_token_logits(hidden))

    why_separate_rows = _choose_rows(policy, logits, "logits", prompts, branches, 0, expected, precise)
    if policy.router_aux_loss_coef:
        _check_router_loss(policy, prompts, branches, 1e-3 if precise else 1e-1, in_trees=why_separate_rows is None)
    return why_separate_rows


def _check_router_loss(
    policy: Policy, prompts: list[list[int]], branches: Sequences, tolerance: float, *, in_trees: bool
) -> None:
    """Raise ModelError if the load-balancing loss is not the one of the model's own forward pass on padded rows."""
    device = next(policy.parameters()).device
    rows = separate_rows(prompts, branches, pad_token_id=0).to(device)
    assert rows.attention_mask is not None
    options = {"attention_mask": rows.attention_mask.long(), "position_ids": rows.position_ids, "use_cache": False}
    own = getattr(policy.base(input_ids=rows.input_ids, output_router_logits=True, **options), "aux_loss", None)
    if own is None:
        raise ModelError(
            f"router_aux_loss_coef={policy.router_aux_loss_coef:g}: {type(policy.base).__name__} computes no loss of "
            "its routers, set router_aux_loss_coef: 0"
        )
    for tree in (rows, pack(prompts, branches).to(device)) if in_trees else (rows,):
        _, found = policy(tree, lambda hidden, head: None, with_aux_loss=True)
        if not _close(found, own, tolerance):
            raise ModelError(
                f"{type(policy.base).__name__}: the loss of its routers is {found:.4g} here and {own:.4g} in its own "
                "forward pass, set router_aux_loss_coef: 0"
            )


def _check_rewards(model: TreeModel[Any], precise: bool) -> str | None:
    assert isinstance(model, RewardModel)
    vocab, pad = model.base.get_input_embeddings().weight.shape[0], model.base.config.get_text_config().pad_token_id

    def ids(step: int, start: int, count: int) -> list[int]:
        tokens = [(step * i + start) % vocab for i in range(count)]
        return [(token + 1) % vocab if token == pad else token for token in tokens]

    prompts = [ids(7, 1 + p, 5 + p) for p in range(2)]
    completions = [(0, ids(11, 3, 4)), (0, ids(5, 2, 6)), (1, ids(5, 1, 5)), (1, ids(3, 2, 2))]
    device = next(model.parameters()).device
    rows = [torch.tensor([[*prompts[p], *completion]], device=device) for p, completion in completions]
    expected = torch.cat([model.base(input_ids=row, use_cache=False).logits[:, 0].float() for row in rows])
    scored = [(p, [*completion, pad]) for p, completion in completions]  # a reward is read before the last token
    return _choose_rows(model, model.rewards, "rewards", prompts, scored, pad, expected, precise)


def _choose_rows(
    model: TreeModel[Any],
    compute: Callable[[Tree], Tensor],
    what: str,
    prompts: list[list[int]],
    sequences: Sequences,
    pad_token_id: int,
    expected: Tensor,
    precise: bool,
) -> str | None:
    """Return why the model needs separate rows, or None; raise ModelError if those are not exact either."""
    name, attention = type(model.base).__name__, model.base.config._attn_implementation
    # Two layouts of a row round differently: by 3 % of the largest logit in 30 layers of bf16, while a wrong mask is
    # off by 30 %.
    tolerance = 1e-3 if precise else 1e-1
    in_rows = compute(separate_rows(prompts, sequences, pad_token_id=pad_token_id).to(expected.device))
    if not torch.isfinite(expected).all():
        raise ModelError(f"{name} gives NaN or infinity on a few plain tokens: its weights are damaged, use other ones")
    if not _close(in_rows, expected, tolerance):
        raise ModelError(
            f"{name} ({attention} attention) does not honour padding: {what} differ by "
            f"{(in_rows - expected).abs().max():.2g} from those of a row alone"
        )
    if attention != NAME:
        return f"{attention} attention takes no trees"
    try:
        in_trees = compute(pack(prompts, sequences).to(expected.device))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        return f"it cannot take trees: {first_line(error)}"
    if _close(in_trees, expected, tolerance):
        return None
    return f"its attention does not keep to trees: {what} differ by {(in_trees - expected).abs().max():.2g}"


def _check_parts(policy: Policy) -> None:
    """Raise ModelError for a head that is not linear (LoRA is allowed), or an adapter that cannot be switched off."""
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


def _random_lora_b(policy: Policy) -> dict[str, Tensor]:
    """Return random values for the B of LoRA on the head: it is zero before training, which would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    head_parameters = {id(p) for p in policy.base.get_output_embeddings().parameters()}
    return {
        name: torch.randn(p.shape, generator=generator).to(p)
        for name, p in policy.named_parameters()
        if id(p) in head_parameters and ".lora_B." in name
    }


def _plain_logits(policy: Policy, prompt: Sequence[int], branch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return logits (len(branch), V) of a plain row: the model's, and those of its head on the last hidden state."""
    head = policy.head()
    ids = torch.tensor([[*prompt, *branch]], device=head.weight.device)
    models_own = policy.base(input_ids=ids, use_cache=False).logits
    hidden = policy.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    predicting = slice(len(prompt) - 1, -1)
    return models_own[0, predicting].float(), head.next_token_logits(hidden[0, predicting])


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether ``a`` and ``b`` differ by at most ``tolerance`` times the largest value of ``b``."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3))
