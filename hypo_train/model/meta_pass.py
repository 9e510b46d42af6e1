"""A training pass on tensors that have shapes and dtypes but no memory, and what it would have held at its peak.

The model's own code runs, forward and backward, under torch's ``FakeTensorMode``: its layers, autocast's casts and
checkpointing take part as they are, and every tensor is counted from its making until nothing refers to it. Two things
are stood in for:

Attention. On fake tensors SDPA would choose the path that makes all T x T scores, which none of the real ones does: an
operator of our own keeps what they keep, queries, keys, values, output and the log-sum-exp of each row. It is called an
attention, so that selective checkpointing keeps its output as it does the real one's. On a CPU, trees are attended run
by run, and every branch has a copy of its prompt's keys and values. Eager attention runs as it is, scores and all.

The head. The loss plans its chunks on the host, from values: what it holds is an argument here.

Fake tensors of a GPU need a build of torch that has GPUs, so these claim to lie on a CPU. Autocast differs: on CUDA it
computes norms in fp32, which is added.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.trees.layout import Layout

_NAME = "hypo_rehearsed"


@dataclass(frozen=True)
class PassShape:
    """The tokens of one pass."""

    rows: int
    width: int  # tokens of a row, padding included
    counted: int  # rows that go through the head
    layout: Layout | None  # of the trees in the one row; None: separate rows

    @classmethod
    def packed(cls, prompts: Sequence[int], branches: Sequence[Sequence[int]]) -> PassShape:
        """Trees of so many tokens, their branches' last ones included, which are predicted and never an input."""
        layout = Layout(tuple(prompts), tuple(tuple(length - 1 for length in lengths) for lengths in branches))
        return cls(1, layout.num_tokens, sum(map(sum, branches)), layout)

    @classmethod
    def separate(cls, prompts: Sequence[int], branches: Sequence[Sequence[int]]) -> PassShape:
        """The same in a row a branch, padded to the longest."""
        lengths = [prompt + length - 1 for prompt, of in zip(prompts, branches, strict=True) for length in of]
        return cls(len(lengths), max(lengths), sum(map(sum, branches)), None)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes that a pass holds, beside the model's own, at the moment when it holds most."""

    casts: int = 0  # autocast's copies of weights
    activations: int = 0  # what the forward pass made
    loss: int = 0  # the head's chunk, and its gradients until they are handed on
    gradients: int = 0  # of the weights
    temporary: int = 0  # what the backward pass made

    @property
    def total(self) -> int:
        return self.casts + self.activations + self.loss + self.gradients + self.temporary


def simulate_memory(
    trained: Policy | RewardModel,
    rows: PassShape,
    *,
    device_type: str,
    autocast: bool,
    chunk_bytes: int,
    accumulates: bool,
    parts: int = 1,
) -> PeakMemory:
    """What one micro-batch holds, forward and backward, at its peak.

    Args:
        trained: on the meta device; left as it is.
        device_type: "cuda" or "cpu", which it would train on.
        autocast: under bfloat16.
        chunk_bytes: the loss's temporaries.
        accumulates: after other micro-batches, whose gradients are there.
        parts: of the vocabulary, where processes work on each other's rows; gradients of parts are in ``loss`` until
            they are handed on, and no others are made in the head.
    """
    with _faked(trained, device_type, autocast) as tracker:
        if accumulates:
            tracker.give_gradients(trained)
        with tracker.making("activations"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = _decode(trained, rows, device_type)
            loss = _head_loss(trained, hidden.flatten(0, 1)[: rows.counted], chunk_bytes, parts, tracker)
        del hidden
        with tracker.making("temporary"):
            loss.backward()
        return tracker.peak


def simulate_prompt_memory(
    trained: Policy | RewardModel, prompts: Sequence[int], *, device_type: str, autocast: bool, gradients: bool
) -> PeakMemory:
    """What a pass over prompts of so many tokens holds: until its backward pass, or, without ``gradients``, while it
    runs."""
    layout = Layout(tuple(prompts), tuple(() for _ in prompts))
    rows = PassShape(1, layout.num_tokens, 0, layout)
    with _faked(trained, device_type, autocast, training=gradients) as tracker:
        with (
            tracker.making("activations"),
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            hidden = _decode(trained, rows, device_type)
        if gradients:
            tracker.start()
        del hidden
        return tracker.peak


@contextmanager
def fake_weights(trained: Policy | RewardModel, *, autocast: bool) -> Iterator[None]:
    """A model on the meta device can be run, on tokens that have no values either."""
    with _faked(trained, "cpu", autocast, training=False), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        yield


def _decode(trained: Policy | RewardModel, rows: PassShape, device_type: str) -> Tensor:
    ids = torch.zeros(rows.rows, rows.width, dtype=torch.long)
    # Of four dimensions a mask passes through transformers as it is; what padded rows need is made from values.
    mask = (1, 1, 1, 1) if rows.layout else (rows.rows, 1, rows.width, rows.width)
    return (
        trained.base.get_decoder()(
            input_ids=ids,
            position_ids=ids,
            attention_mask=torch.ones(mask, dtype=torch.bool),
            use_cache=False,
            rehearsed_copies=_copied_by_runs(rows.layout, device_type),
        )
    ).last_hidden_state


def _copied_by_runs(layout: Layout | None, device_type: str) -> tuple[int, int]:
    """(tokens, mask) of attention run by run: keys and values that are copied, and scores that masks are added to."""
    if layout is None or device_type != "cpu":
        return 0, 0
    groups = [(layout.prompts[t], sum(group)) for t, group in layout.branch_groups]
    return sum(prompt + own for prompt, own in groups), sum(own * (prompt + own) for prompt, own in groups)


# What attention keeps for its backward pass.


@torch.library.custom_op("hypo_train::rehearsed_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """(R, H, N, D) -> output of that shape, with the values' D, and (R, H, N) fp32."""
    raise NotImplementedError("it has no values")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_backward(ctx: Any, by_out: Tensor, by_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *_ = ctx.saved_tensors
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


_attention.register_autograd(_attention_backward, setup_context=_keep)


def _rehearsed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rehearsed_copies: tuple[int, int] = (0, 0),
    **options: Any,
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    tokens, masked = rehearsed_copies
    copies = key.new_empty(tokens * key.shape[1] * (key.shape[-1] + value.shape[-1]) + masked)
    out, _ = _attention(query, key, value, copies)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _rehearsed_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


# What the loss keeps.


class _Loss(torch.autograd.Function):
    """A loss that has computed its gradients in the forward call, as the fused one does."""

    @staticmethod
    def forward(ctx: Any, tracker: _Tracker, chunk_bytes: int, parts: int, hidden: Tensor, *matrices: Tensor) -> Tensor:
        trained = [m for m in matrices if m.requires_grad]
        with tracker.making("loss"):
            temporary = [torch.empty(chunk_bytes, dtype=torch.uint8)]
            ctx.gradients = [torch.empty_like(hidden)] if hidden.requires_grad else [None]
            # Products are summed in fp32.
            if parts == 1:
                ctx.gradients += [
                    torch.empty_like(m, dtype=torch.float32) if m.requires_grad else None for m in matrices
                ]
            else:  # which are no tensors of the matrices' shapes: they stay here, beside those of a turn
                ctx.gradients += [None] * len(matrices)
                ctx.of_parts, of_a_turn = (
                    [m.new_empty(-(-m.numel() // parts), dtype=torch.float32) for m in trained] for _ in range(2)
                )
                temporary += [*of_a_turn, torch.empty_like(hidden), torch.empty_like(hidden, dtype=torch.float32)]
            del temporary
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, []  # handed on: nothing else holds them
        return (None, None, None, *gradients)


def _head_loss(
    trained: Policy | RewardModel, hidden: Tensor, chunk_bytes: int, parts: int, tracker: _Tracker
) -> Tensor:
    if isinstance(trained, RewardModel):
        return trained.head()(hidden).float().sum()
    head = trained.head()
    matrices = [head.weight, head.bias, *(() if head.lora is None else head.lora[:2])]
    return _Loss.apply(tracker, chunk_bytes, parts, hidden, *(m for m in matrices if m is not None))


# Fakes, and who counts them.


class _Tracker(TorchDispatchMode):
    """Counts the bytes of storages from their making to their end, by what made them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._kinds: dict[int, tuple[str, int]] = {}  # of live storages: what made them, and their bytes
        self._live: Counter[str] = Counter()
        self._kind = "activations"
        self.start()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient_is_there)

    @property
    def peak(self) -> PeakMemory:
        return PeakMemory(**self._peak)

    def start(self) -> None:
        """The peak starts anew from what is live."""
        self._peak = dict(self._live)

    def give_gradients(self, model: nn.Module) -> None:
        """As earlier micro-batches leave them."""
        with self.making("gradients"):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        is_cast = function is torch.ops.aten._to_copy.default and self._key(args[0]) in self._weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, "casts" if is_cast else self._kind)
        return out

    def _key(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _count(self, tensor: Tensor, kind: str) -> None:
        storage, key = tensor.untyped_storage(), self._key(tensor)
        if key in self._kinds or key in self._weights:
            return
        self._kinds[key] = kind, storage.nbytes()
        self._live[kind] += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        if self._live.total() > sum(self._peak.values()):
            self._peak = dict(self._live)

    def _forget(self, key: int) -> None:
        kind, nbytes = self._kinds.pop(key)
        self._live[kind] -= nbytes

    def _gradient_is_there(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # of a head in parts: the loss has it
            return
        key = self._key(parameter.grad)
        kind, nbytes = self._kinds[key]
        self._kinds[key] = "gradients", nbytes
        self._live[kind] -= nbytes
        self._live["gradients"] += nbytes


def _norms_in_fp32(model: nn.Module) -> Callable[[], None]:
    """LayerNorms compute as autocast has them on CUDA, in fp32; on a CPU it leaves them in bf16. How to undo it."""
    norms = [module for module in model.modules() if type(module) is nn.LayerNorm]
    for norm in norms:
        norm.forward = partial(_norm_in_fp32, norm)  # type: ignore[method-assign]

    def undo() -> None:
        for norm in norms:
            del norm.forward

    return undo


def _norm_in_fp32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


@contextmanager
def _faked(
    trained: Policy | RewardModel, device_type: str, autocast: bool, *, training: bool = True
) -> Iterator[_Tracker]:
    """Fakes in the place of the model's meta tensors, on a CPU by their own account, and a tracker of what is made."""
    config = trained.base.config
    attention = config._attn_implementation
    with ExitStack() as stack:
        stack.callback(trained.train, trained.training)
        trained.train(training)
        stack.enter_context(FakeTensorMode())
        stack.callback(_replace_tensors(trained))
        if attention != "eager":
            stack.callback(trained.base.set_attn_implementation, attention)
            trained.base.set_attn_implementation(_NAME)
        if autocast and device_type == "cuda":
            stack.callback(_norms_in_fp32(trained))
        yield stack.enter_context(_Tracker(trained))


def _replace_tensors(model: nn.Module) -> Callable[[], None]:
    """Put a new tensor in the place of each of the model's, shared ones in all their places; how to undo it."""
    new: dict[int, Tensor] = {}
    old: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in new:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    new[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                old.append((tensors, name, tensor))
                tensors[name] = new[id(tensor)]

    def undo() -> None:
        for tensors, name, tensor in old:
            tensors[name] = tensor

    return undo


def num_bytes(tensors: Any) -> int:
    """Of distinct tensors, memory or not."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in {id(t): t for t in tensors}.values())
