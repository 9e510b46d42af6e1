"""Simulate a training pass with fake tensors, which have no memory, to compute its peak memory.

The model's own code runs forward and backward under torch's ``FakeTensorMode``, with autocast and checkpointing. Every
tensor is counted from its creation until it is freed. Two parts are replaced:

Attention: with fake tensors, SDPA would compute all T x T scores, which the real kernels do not. A custom operator
saves the same tensors as the real kernels: queries, keys, values, output and the log-sum-exp of each row. Its name
contains "attention", so that selective checkpointing keeps its output. On a CPU, attention copies a prompt's keys and
values for each branch. Eager attention is not replaced.

The head: the real loss plans its chunks from values, so their size is an argument here.

Fake CUDA tensors need a CUDA build of torch, so all fake tensors are on the CPU. On CUDA, autocast computes norms in
fp32; on a CPU it does not, so the norms are replaced.
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
from hypo_train.model.text_parts import decoder_of
from hypo_train.trees.layout import Layout

_NAME = "hypo_simulated"


@dataclass(frozen=True)
class PassShape:
    """The shape of one pass."""

    rows: int
    width: int  # tokens of a row, padding included
    counted: int  # tokens that go through the head
    layout: Layout | None  # of the trees in the one row; None: separate rows

    @classmethod
    def packed(cls, prompts: Sequence[int], branches: Sequence[Sequence[int]]) -> PassShape:
        """Return the shape of trees of these lengths. A branch's last token is predicted and never an input."""
        layout = Layout(tuple(prompts), tuple(tuple(length - 1 for length in lengths) for lengths in branches))
        return cls(1, layout.num_tokens, sum(map(sum, branches)), layout)

    @classmethod
    def separate(cls, prompts: Sequence[int], branches: Sequence[Sequence[int]]) -> PassShape:
        """Return the shape of the same trees with one row for each branch, padded to the longest."""
        lengths = [prompt + length - 1 for prompt, group in zip(prompts, branches, strict=True) for length in group]
        return cls(len(lengths), max(lengths), sum(map(sum, branches)), None)


@dataclass(frozen=True)
class PeakMemory:
    """The bytes that a pass holds at its peak, without the model's own tensors."""

    casts: int = 0  # autocast's copies of weights
    activations: int = 0  # created by the forward pass
    loss: int = 0  # the head's chunk, and its gradients until backward returns them
    gradients: int = 0  # of the weights
    temporary: int = 0  # created by the backward pass

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
    """Return the peak memory of one micro-batch, forward and backward.

    Args:
        trained: on the meta device; it is not changed.
        device_type: the device of the real pass, "cuda" or "cpu".
        autocast: compute under bfloat16.
        chunk_bytes: bytes of the loss's temporaries.
        accumulates: whether gradients of earlier micro-batches exist.
        parts: number of shards of the vocabulary; the head's gradients are then those of a shard.
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
    """Return the memory of a forward pass over prompts of these lengths.

    With ``gradients`` it is the memory kept for the backward pass, without them the peak of the forward pass.
    """
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
    """Let a model on the meta device run in a block, with fake tensors."""
    with _faked(trained, "cpu", autocast, training=False), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        yield


def _decode(trained: Policy | RewardModel, rows: PassShape, device_type: str) -> Tensor:
    ids = torch.zeros(rows.rows, rows.width, dtype=torch.long)
    # transformers does not change a mask of four dimensions. Other masks would be built from values.
    mask = (1, 1, 1, 1) if rows.layout else (rows.rows, 1, rows.width, rows.width)
    return (
        decoder_of(trained.base)(
            input_ids=ids,
            position_ids=ids,
            attention_mask=torch.ones(mask, dtype=torch.bool),
            use_cache=False,
            simulated_copies=_copied_by_runs(rows.layout, device_type),
        )
    ).last_hidden_state


def _copied_by_runs(layout: Layout | None, device_type: str) -> tuple[int, int]:
    """Return the number of tokens whose keys and values attention copies on a CPU, and the elements of its masks."""
    if layout is None or device_type != "cpu":
        return 0, 0
    groups = [(layout.prompts[t], sum(group)) for t, group in layout.branch_groups]
    return sum(prompt + length for prompt, length in groups), sum(
        length * (prompt + length) for prompt, length in groups
    )


# Attention


@torch.library.custom_op("hypo_train::simulated_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, (R, H, N, D) with the values' D, and the log-sum-exp (R, H, N) in fp32."""
    raise NotImplementedError("fake tensors have no values")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *_ = ctx.saved_tensors
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


_attention.register_autograd(_attention_backward, setup_context=_keep)


def _simulated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    simulated_copies: tuple[int, int] = (0, 0),
    **options: Any,
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    tokens, masked = simulated_copies
    copies = key.new_empty(tokens * key.shape[1] * (key.shape[-1] + value.shape[-1]) + masked)
    out, _ = _attention(query, key, value, copies)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _simulated_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


# The loss


class _Loss(torch.autograd.Function):
    """A loss that computes its gradients in the forward call, as the fused one does."""

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
            else:  # this rank's shard of the gradients, and temporaries for the rank whose rows are computed
                ctx.gradients += [None] * len(matrices)
                ctx.of_shard, of_a_turn = (
                    [m.new_empty(-(-m.numel() // parts), dtype=torch.float32) for m in trained] for _ in range(2)
                )
                temporary += [*of_a_turn, torch.empty_like(hidden), torch.empty_like(hidden, dtype=torch.float32)]
            del temporary
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, []  # so that only the caller keeps them alive
        return (None, None, None, *gradients)


def _head_loss(
    trained: Policy | RewardModel, hidden: Tensor, chunk_bytes: int, parts: int, tracker: _Tracker
) -> Tensor:
    if isinstance(trained, RewardModel):
        return trained.head()(hidden).float().sum()
    head = trained.head()
    matrices = [head.weight, head.bias, *(() if head.lora is None else head.lora[:2])]
    return _Loss.apply(tracker, chunk_bytes, parts, hidden, *(m for m in matrices if m is not None))


# Fake tensors, and the tracker that counts their bytes


class _Tracker(TorchDispatchMode):
    """Count the bytes of live storages by the part of the pass that created them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._kinds: dict[int, tuple[str, int]] = {}  # live storage -> kind and bytes
        self._live: Counter[str] = Counter()
        self._kind = "activations"
        self.start()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient_accumulated)

    @property
    def peak(self) -> PeakMemory:
        return PeakMemory(**self._peak)

    def start(self) -> None:
        """Restart the peak from the storages that are live now."""
        self._peak = dict(self._live)

    def give_gradients(self, model: nn.Module) -> None:
        """Create gradients, as if earlier micro-batches had left them."""
        with self.making("gradients"):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Count tensors that a block creates as ``kind``."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:
            out = _grouped_product(*args, **(kwargs or {}))
        else:
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

    def _gradient_accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # a shard of the head, whose gradient the loss keeps
            return
        key = self._key(parameter.grad)
        kind, nbytes = self._kinds[key]
        self._kinds[key] = "gradients", nbytes
        self._live[kind] -= nbytes
        self._live["gradients"] += nbytes


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **options: Any) -> Tensor:
    """Return the product of a mixture of experts' layer, without values; torch's own has them in bf16 alone."""
    groups = () if offs is None or a.ndim != b.ndim else offs.shape
    batch = a.shape[:1] if a.ndim == b.ndim == 3 else groups
    return a.new_empty(*batch, a.shape[-2], b.shape[-1], dtype=options.get("out_dtype"))


def _norms_in_fp32(model: nn.Module) -> Callable[[], None]:
    """Make LayerNorms compute in fp32, as autocast does on CUDA but not on CPUs; return a function that undoes it."""
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
    """Replace the model's meta tensors by fake CPU tensors in a block, and yield a tracker."""
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
    """Replace each of the model's tensors by a new one, shared ones once; return a function that undoes it."""
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
    """Return the bytes of the distinct tensors, whether they have memory or not."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in {id(t): t for t in tensors}.values())
