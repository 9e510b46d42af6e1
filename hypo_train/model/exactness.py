"""Check on a few tokens, before training, that a model gives the same results as its own forward pass.

The rows have about 11 tokens. Sliding windows are shortened for the check, so that these rows are longer than them;
that each layer has the window that trees give it is read from the functions of transformers' masks. The model's own
forward pass is that of its eager attention. In training mode, where dropout and routing may draw random numbers, the
results must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.policy import Head, HeadFunction, Policy, active_module
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.text_parts import decoder_of
from hypo_train.model.tree_model import ModelError, TreeModel, first_line
from hypo_train.model.windows import layer_windows, other_window, shortened_windows
from hypo_train.trees.attention import NAME
from hypo_train.trees.pack import pack, separate_rows
from hypo_train.trees.tree import Tree

T = TypeVar("T")
Sequences = list[tuple[int, list[int]]]  # a prompt's index, and the tokens that follow it
EAGER = "eager"  # the attention by which transformers defines every architecture
_SHORT_WINDOW = 4  # shorter than the prompts and than a branch of the rows that are compared


@dataclass(frozen=True)
class _Case:
    """Rows of a few tokens, the results of the model's own forward pass on them, and training's way to compute them."""

    what: str  # the results
    prompts: list[list[int]]
    sequences: Sequences
    pad_token_id: int
    expected: Tensor
    compute: Callable[[Tree], Tensor]

    def in_rows(self) -> Tensor:
        rows = separate_rows(self.prompts, self.sequences, pad_token_id=self.pad_token_id)
        return self.compute(rows.to(self.expected.device))

    def in_trees(self) -> Tensor:
        return self.compute(pack(self.prompts, self.sequences).to(self.expected.device))


def check_exactness(
    model: TreeModel[Any], *, rows_attention: str | None = None, has_dropout: bool = False
) -> str | None:
    """Compare what training will compute with the model's own forward pass on plain rows, for a few tokens.

    Args:
        rows_attention: the attention implementation that separate rows will have; None: the present one, as trees have.
        has_dropout: the model draws random numbers in training by intention.

    Returns:
        None if the model trains on trees, or the reason why it needs separate rows.

    Raises:
        ModelError: logits (or rewards) differ from the model's own on separate rows too, or in training mode.
    """
    if empty := [window for window in model.windows or () if window is not None and window < 1]:
        raise ModelError(
            f"{type(model.base).__name__} has sliding_window={empty[0]}, so that a token would not even see itself: "
            "set it to null in its config.json if it has no window"
        )
    precise = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    # Two layouts of a row round differently: by 3 % of the largest logit in 30 layers of bf16, while a wrong mask is
    # off by 30 %.
    tolerance = 1e-3 if precise else 1e-1
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=not precise),
            shortened_windows(model.base.config, _SHORT_WINDOW),
        ):
            with eval_mode(model):
                case = _policy_case(model, precise) if isinstance(model, Policy) else _reward_case(model)
                why_separate = _why_not_trees(model, case, tolerance)
                if why_separate is not None:
                    _check_rows(model, case, tolerance, rows_attention)
                if isinstance(model, Policy) and model.router_aux_loss_coef:
                    _check_router_loss(model, case, tolerance, in_trees=why_separate is None)
            if not has_dropout:
                compute = case.in_trees if why_separate is None else case.in_rows
                with _attention(model, None if why_separate is None else rows_attention):
                    _check_training_mode(model, case, tolerance, compute)
            return why_separate
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"{type(model.base).__name__} cannot be trained here: {first_line(error)}") from error


@contextmanager
def _attention(model: TreeModel[Any], implementation: str | None) -> Iterator[None]:
    """Run a block with another attention implementation; None keeps the present one."""
    present = model.base.config._attn_implementation
    if implementation is None or implementation == present:
        yield
        return
    model.base.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.base.set_attn_implementation(present)


def _policy_case(policy: Policy, precise: bool) -> _Case:
    """Compute the logits of a few rows by the model's own forward pass, and compare them with those of its head."""
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

    with _attention(policy, EAGER):
        expected, by_head = run(None, plain)
    if torch.isfinite(expected).all() and not _close(by_head, expected, 1e-3 if precise else 1e-2):
        raise ModelError(
            f"{name} computes its logits in a way the kernels do not serve: they differ by "
            f"{(by_head - expected).abs().max():.2g} from its head applied to the last hidden state"
        )

    with _attention(policy, EAGER):
        sooner, _ = run(None, lambda _, head: _plain_logits(policy, prompts[0], branches[0][1][:-1]))
    if torch.isfinite(expected).all() and not _close(sooner, expected[: len(sooner)], 1e-3 if precise else 1e-1):
        raise ModelError(f"{name} is no causal language model: a token's logits depend on the tokens after it")

    def logits(tree: Tree) -> Tensor:
        return run(tree, lambda hidden, head: head.next_token_logits(hidden))

    return _Case("logits", prompts, branches, 0, expected, logits)


def _check_router_loss(policy: Policy, case: _Case, tolerance: float, *, in_trees: bool) -> None:
    """Raise ModelError if the load-balancing loss is not the one of the model's own forward pass on padded rows."""
    device = next(policy.parameters()).device
    rows = separate_rows(case.prompts, case.sequences, pad_token_id=0).to(device)
    assert rows.attention_mask is not None
    options = {"attention_mask": rows.attention_mask.long(), "position_ids": rows.position_ids, "use_cache": False}
    own = getattr(policy.base(input_ids=rows.input_ids, output_router_logits=True, **options), "aux_loss", None)
    if own is None:
        raise ModelError(
            f"router_aux_loss_coef={policy.router_aux_loss_coef:g}: {type(policy.base).__name__} computes no loss of "
            "its routers, set router_aux_loss_coef: 0"
        )
    for tree in (rows, pack(case.prompts, case.sequences).to(device)) if in_trees else (rows,):
        _, found = policy(tree, lambda hidden, head: None, with_aux_loss=True)
        if not _close(found, own, tolerance):
            raise ModelError(
                f"{type(policy.base).__name__}: the loss of its routers is {found:.4g} here and {own:.4g} in its own "
                "forward pass, set router_aux_loss_coef: 0"
            )


def _reward_case(model: TreeModel[Any]) -> _Case:
    """Compute the rewards of a few rows by the model's own forward pass."""
    assert isinstance(model, RewardModel)
    vocab, pad = model.base.get_input_embeddings().weight.shape[0], model.base.config.get_text_config().pad_token_id

    def ids(step: int, start: int, count: int) -> list[int]:
        tokens = [(step * i + start) % vocab for i in range(count)]
        return [(token + 1) % vocab if token == pad else token for token in tokens]

    prompts = [ids(7, 1 + p, 5 + p) for p in range(2)]
    completions = [(0, ids(11, 3, 4)), (0, ids(5, 2, 6)), (1, ids(5, 1, 5)), (1, ids(3, 2, 2))]
    device = next(model.parameters()).device
    rows = [torch.tensor([[*prompts[p], *completion]], device=device) for p, completion in completions]
    with _attention(model, EAGER):
        expected = torch.cat([model.base(input_ids=row, use_cache=False).logits[:, 0].float() for row in rows])
    scored = [(p, [*completion, pad]) for p, completion in completions]  # a reward is read before the last token
    return _Case("rewards", prompts, scored, pad, expected, model.rewards)


def _why_not_trees(model: TreeModel[Any], case: _Case, tolerance: float) -> str | None:
    """Return why the model cannot train on trees with its present attention, or None."""
    if not torch.isfinite(case.expected).all():
        raise ModelError(
            f"{type(model.base).__name__} gives NaN or infinity on a few plain tokens: its weights are damaged, "
            "use other ones"
        )
    attention = model.base.config._attn_implementation
    if attention != NAME:
        return f"{attention} attention takes no trees"
    try:
        windows = layer_windows(model.base.config)
        if reason := other_window(model.base, windows):
            return reason
        in_rows, in_trees = case.in_rows(), case.in_trees()
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        return f"it cannot take trees: {first_line(error)}"
    for layout, found in (("in padded rows", in_rows), ("in trees", in_trees)):
        if not _close(found, case.expected, tolerance):
            return (
                f"its attention does not keep to trees: {case.what} differ by "
                f"{(found - case.expected).abs().max():.2g} {layout}"
            )
    return None


def _check_rows(model: TreeModel[Any], case: _Case, tolerance: float, rows_attention: str | None) -> None:
    """Raise ModelError if padded rows do not give the model's own results either."""
    with _attention(model, rows_attention):
        in_rows, name = case.in_rows(), model.base.config._attn_implementation
    if _close(in_rows, case.expected, tolerance):
        return
    difference = f"{case.what} differ by {(in_rows - case.expected).abs().max():.2g} from those of a row alone"
    with _attention(model, EAGER):
        if name != EAGER and _close(case.in_rows(), case.expected, tolerance):
            raise ModelError(
                f"{type(model.base).__name__} computes something else with {name} attention: {difference} "
                "with eager attention, set attn_implementation: eager"
            )
    raise ModelError(f"{type(model.base).__name__} ({name} attention) does not honour padding: {difference}")


def _check_training_mode(model: TreeModel[Any], case: _Case, tolerance: float, compute: Callable[[], Tensor]) -> None:
    """Raise ModelError if the model gives other results in training mode, its modules of dropout (LoRA's) left out."""
    device = case.expected.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), eval_mode(model):
        for module in model.modules():
            module.training = not isinstance(module, nn.Dropout)
        found = compute()
    if not _close(found, case.expected, tolerance):
        raise ModelError(
            f"{type(model.base).__name__} draws random numbers in training, a router's noise or dropout of its own: "
            f"{case.what} differ by {(found - case.expected).abs().max():.2g} from those in eval mode, and the "
            "log-ratio to the reference would be noise; set what draws them to 0 in its config.json"
        )


def _check_parts(policy: Policy) -> None:
    """Raise ModelError for a head that is not linear (LoRA is allowed), or an adapter that cannot be switched off."""
    name, head = type(policy.base).__name__, active_module(policy.base.get_output_embeddings())
    plain = head
    if hasattr(head, "token_adapter"):
        raise ModelError(
            "trainable_token_indices of the adapter reach the LM head: use modules_to_save with the names of the "
            "embeddings and the LM head"
        )
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
    hidden = decoder_of(policy.base)(input_ids=ids, use_cache=False).last_hidden_state
    predicting = slice(len(prompt) - 1, -1)
    return models_own[0, predicting].float(), head.next_token_logits(hidden[0, predicting])


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether ``a`` and ``b`` differ by at most ``tolerance`` times the largest value of ``b``."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3))
