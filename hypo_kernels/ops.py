"""Custom operators for ``torch.compile``, with fake kernels and registered gradients.

The computation depends on the targets' values, so each call must be one opaque node of the graph. Eager calls do not
use these operators: their autograd Functions save a call's plan between forward and backward.

    hypo_kernels::hypo_loss                 loss, statistics and finished gradients
    hypo_kernels::token_logprobs            log-probs, entropies and softmax norms
    hypo_kernels::token_logprobs_backward   their gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hypo_kernels import gemm, schedule
from hypo_kernels.call import Extras, LossOutput, Reference, prepare
from hypo_kernels.gradients import Leaves, shapes_of_sums
from hypo_kernels.head import LMHead, LoRA
from hypo_kernels.layout import TargetLayout
from hypo_kernels.objective import Importance, Objective
from hypo_kernels.projection import Projection
from hypo_kernels.tokens import TokenPass, token_pass

NUM_LEAVES = len(Leaves._fields)
_OBJECTIVE_NUMBERS = ("kl_coef", "length_penalty", "num_pairs", "num_generations", "importance_cap", "kl_estimator")
_EXTRAS = "Tensor[] extra_tensors, str[] extra_names, Tensor? token_weights, Tensor? behavior_logps"
_OBJECTIVE = (
    "str loss, float[] loss_parameters, str group_loss, float kl_coef, float length_penalty, int num_pairs, "
    "int num_generations, float importance_cap, str kl_estimator"
)
# Every operator's first arguments: the leaves, the head's constants, autocast's dtype, and which leaves need gradients.
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora, Tensor? lora_weight, "
    "float? logit_softcap, float logit_scale, float temperature, ScalarType? autocast, bool[] needed"
)
_NUM_HEAD = NUM_LEAVES + 5
_NUM_REFERENCE = _NUM_HEAD + 2 + len(Reference._fields)  # up to the reference's last argument
_NUM_OUTPUTS = len(LossOutput._fields) + 1  # results of the loss operator that come before the gradients' sums


def hypo_loss(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None,
    reference: Reference,
    extras: Extras,
    objective: Objective,
    settings: dict[str, Any],
) -> tuple[LossOutput, Tensor]:
    """Return the output in the caller's order, and the sequences' lengths (S,); arguments as in ``call.prepare``."""
    loss, *statistics, lengths = _hypo_loss(
        *_head_arguments(hidden, head),
        _traceable(targets),
        cu_seqlens,
        *reference,
        *_flat_extras(extras),
        **_flat_objective(objective),
        **settings,
    )[:_NUM_OUTPUTS]
    logps, ref_logps, kl, sums = (x.detach() for x in statistics)
    importance = None if extras.behavior_logps is None else Importance(*sums.unbind(1))
    return LossOutput(loss, logps, ref_logps, kl, importance), lengths


def token_logprobs(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor | TargetLayout,
    *,
    max_chunk_bytes: int | None,
    impl: str,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log-probs of the shape of ``targets``, and entropies (empty without ``with_entropy``)."""
    logps, entropies, _ = _token_logprobs(
        *_head_arguments(hidden, head), _traceable(targets), max_chunk_bytes, impl, with_entropy
    )
    return logps, entropies


def _flat_extras(extras: Extras) -> tuple[list[Tensor], list[str], Tensor | None, Tensor | None]:
    """Return the caller's constants as an operator's arguments: tensors, and names that say whose they are."""
    tensors = [*extras.pair_tensors.values(), *extras.sample_tensors.values()]
    names = [f"pair {name}" for name in extras.pair_tensors] + [f"sample {name}" for name in extras.sample_tensors]
    return tensors, names, extras.token_weights, extras.behavior_logps


def _parse_extras(
    tensors: Sequence[Tensor], names: Sequence[str], token_weights: Tensor | None, behavior_logps: Tensor | None
) -> Extras:
    found: dict[str, dict[str, Tensor]] = {"pair": {}, "sample": {}}
    for name, tensor in zip(names, tensors, strict=True):
        owner, _, key = name.partition(" ")
        found[owner][key] = tensor
    return Extras(found["pair"], found["sample"], token_weights, behavior_logps)


def _flat_objective(objective: Objective) -> dict[str, Any]:
    """Return the objective as an operator's arguments."""
    from hypo_kernels import loss_handles  # it imports TorchDynamo, which eager calls do not need

    loss, parameters = loss_handles.of_pair_loss(objective.loss)
    return {
        "loss": loss,
        "loss_parameters": parameters,
        "group_loss": "" if objective.group_loss is None else loss_handles.of_object(objective.group_loss),
        **{name: getattr(objective, name) for name in _OBJECTIVE_NUMBERS},
    }


def _parse_objective(
    loss: str, loss_parameters: Sequence[float], group_loss: str, numbers: dict[str, Any]
) -> Objective:
    from hypo_kernels import loss_handles

    return Objective(
        loss=loss_handles.to_pair_loss(loss, loss_parameters),
        group_loss=loss_handles.to_object(group_loss) if group_loss else None,
        **numbers,
    )


def _traceable(targets: Tensor | TargetLayout) -> Tensor:
    if not isinstance(targets, Tensor):
        raise ValueError("targets is a TargetLayout: under torch.compile, pass targets and cu_seqlens as tensors")
    return targets


def _head_arguments(hidden: Tensor, head: LMHead) -> tuple[Any, ...]:
    if head.vocab_shard is not None:
        raise ValueError("vocab_shard: torch.compile cannot trace a sharded head; call outside of it")
    projection = Projection.of(hidden, head)
    leaves = Leaves.of(projection)
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    grad_enabled = torch.is_grad_enabled()
    needed = [grad_enabled and x is not None and x.requires_grad for x in leaves]
    return (*leaves, head.logit_softcap, head.logit_scale, head.temperature, autocast, needed)


def _parse(arguments: Sequence[Any]) -> tuple[Projection, torch.dtype | None, list[bool]]:
    """Return projection, autocast's dtype and needed gradients from an operator's flat arguments."""
    leaves = Leaves(*arguments[:NUM_LEAVES])
    softcap, scale, temperature, autocast, needed = arguments[NUM_LEAVES:_NUM_HEAD]
    assert leaves.hidden is not None
    assert leaves.weight is not None
    lora = None  # A was applied before the operator, which receives the product
    if leaves.lora_weight is not None:
        lora = LoRA(_absent(leaves.hidden), leaves.lora_weight)
    head = LMHead(leaves.weight, leaves.bias, softcap, scale, temperature, lora)
    return Projection(head, leaves.hidden, leaves.lora), autocast, needed


def _compute_dtype(arguments: Sequence[Any]) -> torch.dtype:
    projection, autocast, _ = _parse(arguments)
    return projection.hidden.dtype if autocast is None else autocast


def _as_traced(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Restore the autocast state at tracing: the compiled call may run outside that autocast block."""
    if autocast is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=autocast)


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _sums(arguments: Sequence[Any]) -> list[Tensor]:
    """Return new tensors for the sums of the needed gradients, and empty tensors for the others."""
    projection, _, needed = _parse(arguments)
    likes = shapes_of_sums(Leaves.of(projection), _compute_dtype(arguments), None)
    sums = []
    for like, is_needed in zip(likes, needed, strict=True):
        sums.append(like.new_empty(like.shape) if is_needed and like is not None else _absent(projection.hidden))
    return sums


def _finished(sums: Sequence[Tensor], leaves: Sequence[Any], factor: Tensor | None) -> list[Tensor | None]:
    """Return the sums times ``factor`` (), in the shapes and dtypes of the leaves; None for those not needed."""
    gradients: list[Tensor | None] = []
    for x, (needed, shape, dtype) in zip(sums, leaves, strict=True):
        gradients.append((x if factor is None else x * factor).view(shape).to(dtype) if needed else None)
    return gradients


def _shapes(arguments: Sequence[Any]) -> list[tuple[bool, Any, Any]]:
    """Return for each leaf whether it needs a gradient, its shape and its dtype."""
    leaves, needed = arguments[:NUM_LEAVES], arguments[_NUM_HEAD - 1]
    return [(n, None, None) if x is None else (n, x.shape, x.dtype) for x, n in zip(leaves, needed, strict=True)]


@torch.library.custom_op(
    "hypo_kernels::hypo_loss",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor targets, Tensor? cu_seqlens, "
    f"Tensor? ref_logps, Tensor? ref_hidden, Tensor? ref_lm_head_weight, Tensor? ref_bias, {_EXTRAS}, *, "
    f"{_OBJECTIVE}, int? max_chunk_bytes, bool validate, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _hypo_loss(
    *args: Any,
    loss: str,
    loss_parameters: Sequence[float],
    group_loss: str,
    max_chunk_bytes: int | None,
    validate: bool,
    impl: str,
    **numbers: Any,
) -> tuple[Tensor, ...]:
    """Return a LossOutput in the caller's order, the lengths, and the gradients' sums for the backward pass.

    The fields of ``importance`` are the columns of one tensor, which is empty without ``behavior_logps``.
    """
    projection, autocast, needed = _parse(args)
    targets, cu_seqlens, *reference = args[_NUM_HEAD:_NUM_REFERENCE]
    extras = _parse_extras(*args[_NUM_REFERENCE:])
    with _as_traced(projection.hidden.device, autocast):
        call = prepare(
            projection,
            targets,
            cu_seqlens,
            Reference(*reference),
            extras,
            _parse_objective(loss, loss_parameters, group_loss, numbers),
            max_chunk_bytes=max_chunk_bytes,
            validate=validate,
            impl=impl,
        )
        if call.impl == "reference":
            raise ValueError("impl='reference' is eager: call it outside of torch.compile, or use impl='auto'")
        with gemm.undisturbed(projection.hidden.device):
            output, gradients = schedule.run(call, needed, sums_are_wide=True)
    sums = [_absent(projection.hidden) if x is None else x for x in gradients.sums]
    value, logps, ref_logps, kl, importance = call.in_call_order(output)
    sample_sums = _absent(value) if importance is None else torch.stack(importance, dim=1)
    return value, logps, ref_logps, kl, sample_sums, call.lengths, *sums


@_hypo_loss.register_fake
def _(*args: Any, num_pairs: int, **_options: Any) -> tuple[Tensor, ...]:
    hidden, targets, cu_seqlens = args[0], args[_NUM_HEAD], args[_NUM_HEAD + 1]
    wide = gemm.accumulator_dtype(_compute_dtype(args))
    sequences = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    samples, behavior_logps = sequences - 2 * num_pairs, args[-1]
    sample_sums = (0,) if behavior_logps is None else (samples, len(Importance._fields))
    loss, logps, ref_logps, kl, importance = (
        hidden.new_empty(shape, dtype=wide) for shape in ((), (sequences,), (sequences,), (samples,), sample_sums)
    )
    return loss, logps, ref_logps, kl, importance, hidden.new_empty(sequences, dtype=torch.long), *_sums(args)


def _no_gradient(argument: Any) -> list[None] | None:
    """Return None in the structure of an operator's argument: autograd expects a list for a list of tensors."""
    is_tensors = isinstance(argument, (list, tuple)) and all(isinstance(x, Tensor) for x in argument)
    return [None] * len(argument) if is_tensors else None


def _keep_gradients(ctx: Any, inputs: Sequence[Any], keyword_only_inputs: Any, output: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*output[_NUM_OUTPUTS:])
    ctx.leaves, ctx.inputs_without = _shapes(inputs), [_no_gradient(x) for x in inputs[NUM_LEAVES:]]


def _hand_out_gradients(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = _finished(ctx.saved_tensors, ctx.leaves, grad_loss)
    return (*gradients, *ctx.inputs_without)


_hypo_loss.register_autograd(_hand_out_gradients, setup_context=_keep_gradients)


_TOKENS = f"{_HEAD}, Tensor targets, int? max_chunk_bytes, str impl, bool with_entropy"


@torch.library.custom_op(
    "hypo_kernels::token_logprobs", mutates_args=(), schema=f"({_TOKENS}) -> (Tensor, Tensor, Tensor)"
)
def _token_logprobs(*args: Any) -> tuple[Tensor, ...]:
    """Return log-probs and entropies of the shape of the targets, 0 at ignored rows, and norms (rows, 3)."""
    plan, targets = _token_pass(args)
    results = plan.forward()
    rows = plan.layout.on(results.logps.device).rows

    def as_targets(x: Tensor) -> Tensor:
        return x.new_zeros(targets.numel(), *x.shape[1:]).index_copy_(0, rows, x)

    entropies = _absent(results.logps)
    if results.entropies is not None:
        entropies = as_targets(results.entropies).view(targets.shape)
    return as_targets(results.logps).view(targets.shape), entropies, as_targets(results.norms)


@_token_logprobs.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    hidden, targets, with_entropy = args[0], args[_NUM_HEAD], args[_NUM_HEAD + 3]
    wide = gemm.accumulator_dtype(_compute_dtype(args))
    return (
        hidden.new_empty(targets.shape, dtype=wide),
        hidden.new_empty(targets.shape if with_entropy else 0, dtype=wide),
        hidden.new_empty((targets.numel(), 3), dtype=wide),
    )


@torch.library.custom_op(
    "hypo_kernels::token_logprobs_backward",
    mutates_args=(),
    schema=f"({_TOKENS}, Tensor norms, Tensor entropies, Tensor by_logps, Tensor by_entropies) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _token_logprobs_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients' sums."""
    plan, _ = _token_pass(args)
    *_, norms, entropies, by_logps, by_entropies = args
    rows = plan.layout.on(norms.device).rows
    row_entropies, row_by_entropies = [
        x.flatten()[rows] if plan.with_entropy else None for x in (entropies, by_entropies)
    ]
    needed = args[_NUM_HEAD - 1]
    gradients = plan.backward(
        Leaves.of(plan.projection),
        norms[rows],
        row_entropies,
        by_logps.flatten()[rows],
        row_by_entropies,
        needed,
        sums_are_wide=True,
    )
    return tuple(_absent(plan.projection.hidden) if x is None else x for x in gradients.sums)


@_token_logprobs_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_sums(args))


def _keep_norms(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _, entropies, norms = output
    targets = inputs[_NUM_HEAD]
    ctx.save_for_backward(*inputs[:NUM_LEAVES], targets, norms, entropies)
    ctx.constants, ctx.settings = inputs[NUM_LEAVES:_NUM_HEAD], inputs[_NUM_HEAD + 1 :]
    ctx.leaves = _shapes(inputs)


def _backward_of_tokens(ctx: Any, by_logps: Tensor, by_entropies: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *leaves, targets, norms, entropies = ctx.saved_tensors
    arguments = (*leaves, *ctx.constants, targets, *ctx.settings)
    sums = _token_logprobs_backward(*arguments, norms, entropies, by_logps, by_entropies)
    return (*_finished(sums, ctx.leaves, None), *[None] * (len(arguments) - NUM_LEAVES))


_token_logprobs.register_autograd(_backward_of_tokens, setup_context=_keep_norms)


def _token_pass(args: Sequence[Any]) -> tuple[TokenPass, Tensor]:
    projection, autocast, _ = _parse(args)
    targets, max_chunk_bytes, impl, with_entropy = args[_NUM_HEAD : _NUM_HEAD + 4]
    with _as_traced(projection.hidden.device, autocast):
        plan = token_pass(projection, targets, None, max_chunk_bytes, impl, with_entropy)
    if plan.impl == "reference":
        raise ValueError("impl='reference' is eager: call it outside of torch.compile, or use impl='auto'")
    return plan, targets
