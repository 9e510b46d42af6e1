"""The backward pass in Python: torch's own engine asks for a CUDA context, which fakes do not have."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

_apply = torch.autograd.Function.apply


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call a Function, and note which of its arguments are tensors: the graph has no edges for the others."""
    out = _apply.__func__(function, *args)  # type: ignore[attr-defined]
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor) and isinstance(leaf.grad_fn, BackwardCFunction):
            leaf.grad_fn.of_tensors = [isinstance(x, Tensor) for x in args]  # type: ignore[attr-defined]
    return out


def backward(loss: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """Add the gradients of ``loss`` to its leaves, as ``loss.backward()`` does. Hooks are not called."""
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        gradients = {loss.grad_fn: {0: torch.ones_like(loss) if gradient is None else gradient}}
        waits = _consumers(loss.grad_fn)
        ready = [loss.grad_fn]
        while ready:
            node = ready.pop()
            given = gradients.pop(node, {})
            results = _results(node, given) if given else ()
            for i, (following, place) in enumerate(node.next_functions):
                if following is None:
                    continue
                result = results[i] if i < len(results) else None
                if result is not None:
                    slots = gradients.setdefault(following, {})
                    slots[place] = result if place not in slots else slots[place] + result
                waits[following] -= 1
                if waits[following] == 0:
                    ready.append(following)


def _consumers(root: Any) -> Counter[Any]:
    """Return how many edges lead to each node below ``root``."""
    count: Counter[Any] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            count[following] += 1
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return count


def _results(node: Any, given: dict[int, Tensor]) -> tuple[Any, ...]:
    if hasattr(node, "variable"):
        leaf = node.variable
        leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
        assert leaf.grad.device == leaf.device
        assert leaf.grad.dtype == leaf.dtype
        return ()
    inputs = [given.get(i) for i in range(max(len(node._input_metadata), max(given) + 1))]
    if isinstance(node, BackwardCFunction):
        results = node.apply(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(x for x, is_tensor in zip(results, node.of_tensors, strict=True) if is_tensor)  # type: ignore[attr-defined]
    results = node(*inputs)
    return results if isinstance(results, tuple) else (results,)
