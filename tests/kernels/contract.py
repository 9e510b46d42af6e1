"""``err(kernel) <= 2 * (err(eager) + eps(dtype) * max|truth|)``, for the outputs and for every gradient.

Three kinds of runs of one batch: float64 through ``impl="reference"`` is the truth, plain autograd over full logits at
the tested dtype is eager, and the kernel must be about as exact as eager. The error of a run is the largest absolute
error in a tensor, and eager's error is the largest over ``EAGER_ORDERS`` runs in different orders of summation.

**Why several orders.** A sum of n floats has an error of at most (n - 1) * eps/2 * sum|x| in every order (Higham, 2002,
section 4.2). Below that bound, the error depends on the order, and the order on the BLAS: on the lanes of SSE, AVX2,
AVX-512 and AMX, on how many terms a panel has, and on the number of threads. So the error of one eager run is one draw
of a random variable, which can be small by luck, and the kernel's error is another draw. With R independent orders, the
kernel's draw is the largest of R + 1 with probability 1 / (R + 1) if the kernel is as exact as eager; the factor 2 of
the contract then makes a failure rare, as errors of sums are not spread by a factor of 2 beyond the largest of many
draws. The orders are random permutations of the rows of each sequence, of the vocabulary and of the features. In fp32
and fp64, some also multiply by blocks of the vocabulary and add the products, as a BLAS adds panels. In 16 bits they do
not: there every block would be rounded to 16 bits, which no BLAS does.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypo_kernels import fused_hypo_loss

Results = dict[str, Tensor]

NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TRITON = pytest.param("triton", marks=NO_TRITON)
IMPLS = ["torch", TRITON, "reference"]
FUSED = ["torch", TRITON]


def variants(*dtypes: torch.dtype, impls: Sequence[Any] = FUSED) -> list[Any]:
    """(impl, dtype) parameters; Triton does not compute in float64."""
    out = []
    for impl in impls:
        name, marks = (impl.values[0], impl.marks) if hasattr(impl, "values") else (impl, ())
        for dtype in dtypes:
            if (name, dtype) != ("triton", torch.float64):
                out.append(pytest.param(name, dtype, marks=marks, id=f"{name}-{str(dtype).removeprefix('torch.')}"))
    return out


def slow_unless(quick: Callable[..., bool], parameters: Iterable[Any]) -> list[Any]:
    """Mark the parameters slow for which ``quick(*values)`` is false: only ``make test-all`` runs them."""
    marked = []
    for parameter in parameters:
        if not hasattr(parameter, "values"):
            parameter = pytest.param(*(parameter if isinstance(parameter, tuple) else (parameter,)))
        marks = [] if quick(*parameter.values) else [pytest.mark.slow]
        marked.append(pytest.param(*parameter.values, marks=[*parameter.marks, *marks], id=parameter.id))
    return marked


def crossed(variants: Sequence[Any], cases: Iterable[Any], quick: Callable[..., bool]) -> list[Any]:
    """(impl, dtype, case) parameters of every combination, slow unless ``quick(impl, dtype, case)``."""
    return slow_unless(
        quick,
        [
            pytest.param(*variant.values, case, marks=variant.marks, id=f"{variant.id}-{case}")
            for variant, case in itertools.product(variants, cases)
        ],
    )


EAGER_ORDERS = 12
BLOCKS = (1, 2, 1, 7)  # of the vocabulary, in the products of an order
EVERY_VARIANT = [
    *variants(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *variants(torch.float32, torch.bfloat16, impls=["reference"]),
]


@dataclass(frozen=True)
class Batch:
    """One call of ``fused_hypo_loss``. ``options`` are its other keyword arguments."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,) int64, on the CPU
    cu_seqlens: Tensor  # (S+1,) int64, on the CPU
    bias: Tensor | None = None  # (V,)
    options: dict[str, Any] = field(default_factory=dict)
    blocks: int = 1  # of the vocabulary, which eager multiplies by one after the other

    @property
    def lengths(self) -> Tensor:
        """Counted tokens of each sequence, (S,)."""
        counted = F.pad((self.targets != -100).cumsum(0), (1, 0))
        return counted[self.cu_seqlens[1:]] - counted[self.cu_seqlens[:-1]]

    def to(self, dtype: torch.dtype) -> Batch:
        """Return a copy in ``dtype`` with new leaves."""

        def convert(x: Any) -> Any:
            return x.detach().to(dtype, copy=True) if isinstance(x, Tensor) else x

        leaves = [None if x is None else convert(x).requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        wide = torch.promote_types(dtype, torch.float32)
        log_probs = ("ref_logps", "behavior_logps")
        options = {key: value.to(wide) if key in log_probs else convert(value) for key, value in self.options.items()}
        return replace(self, hidden=leaves[0], weight=leaves[1], bias=leaves[2], options=options)

    def with_options(self, **options: Any) -> Batch:
        return replace(self, options={**self.options, **options})


def random_batch(
    lengths: Sequence[int],
    vocab: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    width: int = 16,
    ignored: float = 0.3,
    ignored_sequences: Sequence[int] = (),
    spread: float = 2.0,
    offset: float = 0.0,
    with_bias: bool = False,
    with_ref_hidden: bool = False,
    cheap_reference: bool = False,
    staleness: float | None = None,
    lead: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Batch:
    """Sequences of ``lengths`` rows, logits ~ N(offset, spread²), a share ``ignored`` of the rows at -100.

    The reference log-probs are the policy's plus noise, so that no coefficient saturates; a
    ``cheap_reference`` is noise alone and spares a batch with large logits the pass over them. With a ``staleness``
    the samples are another policy's, whose log-probs of tokens are this one's plus noise of that size; what no one
    may read of them is NaN. With a ``lead`` all targets are one token, whose logit is ``lead`` above the others'.
    """
    gen = torch.Generator().manual_seed(seed)
    num_rows = sum(lengths)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    hidden, weight = randn(num_rows, width), randn(vocab, width) * spread / width**0.5
    if offset:
        hidden[:, 0], weight[:, 0] = 1.0, offset
    targets = torch.randint(vocab, (num_rows,), generator=gen)
    if lead is not None:
        hidden[:, 0], weight[:, 0] = 1.0, 0.0
        targets[:], weight[vocab // 2], weight[vocab // 2, 0] = vocab // 2, 0.0, lead
    targets[torch.rand(num_rows, generator=gen) < ignored] = -100
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for i in ignored_sequences:
        targets[cu_seqlens[i] : cu_seqlens[i + 1]] = -100
    bias = randn(vocab).to(device, dtype) if with_bias else None
    options = {"beta": 0.1, "kl_coef": 0.05, "num_pairs": 0, **options}
    batch = Batch(hidden.to(device, dtype), weight.to(device, dtype), targets, cu_seqlens, bias, options)
    if staleness is not None:
        logps = plain_token_logps(batch.to(torch.float64)).detach() + staleness * randn(num_rows).to(device)
        logps[: cu_seqlens[2 * batch.options["num_pairs"]]] = float("nan")
        logps[(targets == -100).to(device)] = float("nan")
        batch = batch.with_options(behavior_logps=logps.to(torch.promote_types(dtype, torch.float32)))
    if with_ref_hidden:
        ref = {
            "ref_hidden": hidden + 0.1 * randn(num_rows, width),
            "ref_lm_head_weight": weight + 0.1 * randn(vocab, width),
        }
        if with_bias:
            ref["ref_bias"] = randn(vocab)
        return batch.with_options(**{key: value.to(device, dtype) for key, value in ref.items()}).to(dtype)
    logps = 0.0 if cheap_reference else plain_logps(batch.to(torch.float64)).detach()
    noise = 2 * randn(len(lengths)).to(device)
    return batch.with_options(ref_logps=(logps + noise).to(torch.promote_types(dtype, torch.float32))).to(dtype)


def plain_logps(batch: Batch, *, of_reference: bool = False) -> Tensor:
    """Return sequence log-probs (S,) from full logits."""
    return _sums(batch, plain_token_logps(batch, of_reference=of_reference))


def plain_token_logps(batch: Batch, *, of_reference: bool = False) -> Tensor:
    """Return token log-probs (T,), 0 at ignored rows, from the sum of the other tokens: exact for likely targets."""
    logp = plain_distributions(batch, of_reference=of_reference)
    targets = batch.targets.to(logp.device)
    index = targets.clamp_min(0)[:, None]
    log_odds = logp.gather(1, index).squeeze(1) - logp.scatter(1, index, -1e30).logsumexp(dim=1)
    return F.logsigmoid(log_odds).masked_fill(targets == -100, 0.0)


def _sums(batch: Batch, rows: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in rows.split(batch.cu_seqlens.diff().tolist())])


def plain_distributions(batch: Batch, *, of_reference: bool = False) -> Tensor:
    """Return the log-softmax (T, V) of full logits: the product in the batch's dtype, the softmax in fp32."""
    options = batch.options
    hidden, weight, bias = batch.hidden, batch.weight, batch.bias
    if of_reference:
        hidden, weight, bias = options["ref_hidden"], options["ref_lm_head_weight"], options.get("ref_bias")
    logits = F.linear(hidden, weight, bias)
    if batch.blocks > 1:
        weights = weight.chunk(batch.blocks)
        biases = [None] * len(weights) if bias is None else bias.chunk(batch.blocks)
        logits = torch.cat([F.linear(hidden, *part) for part in zip(weights, biases, strict=True)], dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.get("logit_scale", 1.0)
    cap = options.get("logit_softcap")
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return (logits / options.get("temperature", 1.0)).log_softmax(-1)


def plain_objective(batch: Batch, logps: Tensor, ref_logps: Tensor, weighted: Tensor | None = None) -> Tensor:
    """The loss () of sequence log-probs, as the paper writes it, with Algorithm 1's surrogate for the gradient.

    ``weighted`` (N,) log-probs of the samples take their own's place in the surrogate.
    """
    options = batch.options
    beta, pairs, k = options["beta"], options["num_pairs"], options.get("num_generations", 2)
    ratio = logps - ref_logps
    chosen, rejected, samples = ratio.split([pairs, pairs, len(ratio) - 2 * pairs])
    loss = logps.new_zeros(())
    if pairs and options.get("preference", "sigmoid") == "ipo":
        loss = loss + ((chosen - rejected - 1 / (2 * beta)) ** 2).mean()
    elif pairs:
        flip, margin = options.get("label_smoothing", 0.0), beta * (chosen - rejected)
        loss = loss - ((1 - flip) * F.logsigmoid(margin) + flip * F.logsigmoid(-margin)).mean()
    if len(samples) and options.get("kl_estimator") != "exact":
        lengths = batch.lengths[2 * pairs :].to(samples)
        r = (samples.detach() + options.get("length_penalty", 0.0) * lengths).view(-1, k)
        others = torch.stack([r[:, [j for j in range(k) if j != i]].mean(1) for i in range(k)], dim=1)
        surrogate = ((r - others) * (samples if weighted is None else weighted).view(-1, k)).mean()
        loss = loss + options["kl_coef"] * (r.mean() + surrogate - surrogate.detach())
    return loss


def plain_importance(batch: Batch, rows: Tensor) -> tuple[Tensor, Results]:
    """Return Σ_t w_t log π(y_t) of each sample (N,), with constant weights, and its statistics; ``rows`` (T,)."""
    behavior, cap = batch.options["behavior_logps"], batch.options.get("importance_cap", 2.0)
    weighted, found = [], []
    for a, b in list(itertools.pairwise(batch.cu_seqlens.tolist()))[2 * batch.options["num_pairs"] :]:
        counted = [t for t in range(a, b) if batch.targets[t] != -100]
        log_ratio = rows[counted].detach() - behavior[counted]
        ratio = log_ratio.exp()
        weight = torch.where(ratio > cap, cap, ratio)
        weighted.append((weight * rows[counted]).sum())
        found.append([x.sum() for x in (log_ratio, ratio, weight, weight**2, (ratio > cap).to(ratio))])
    names = ("log_ratio", "ratio", "weight", "squared_weight", "truncated")
    return torch.stack(weighted), {
        name: torch.stack(sums) for name, sums in zip(names, zip(*found, strict=True), strict=True)
    }


def plain_exact_online(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the exact estimator's term of the loss () and the KL of each sample (N,), row by row as in the formula."""
    options = batch.options
    k, penalty = options.get("num_generations", 2), options.get("length_penalty", 0.0)
    log_p, log_q = plain_distributions(batch), plain_distributions(batch, of_reference=True).detach()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    bounds = batch.cu_seqlens.tolist()
    # Of each sample: its counted rows, and what the rows after each of them cost.
    counted = [[t for t in range(a, b) if batch.targets[t] != -100] for a, b in itertools.pairwise(bounds)]
    counted = counted[2 * options["num_pairs"] :]
    costs = divergence.detach() + penalty
    to_come = [[costs[rows[t + 1 :]].sum() for t in range(len(rows))] for rows in counted]
    kls, surrogates = [], []
    for i, rows in enumerate(counted):
        group = range(i - i % k, i - i % k + k)
        surrogate = divergence[rows].sum()
        for t, row in enumerate(rows):
            others = [to_come[j][t] if t < len(to_come[j]) else 0.0 for j in group if j != i]
            advantage = to_come[i][t] - sum(others) / (k - 1)
            surrogate = surrogate + advantage * log_p[row, batch.targets[row]]
        surrogates.append(surrogate)
        kls.append(divergence[rows].detach().sum())
    kl, lengths = torch.stack(kls), torch.tensor([len(rows) for rows in counted]).to(divergence)
    surrogate = torch.stack(surrogates).mean()
    return options["kl_coef"] * ((kl + penalty * lengths).mean() + surrogate - surrogate.detach()), kl


def run_eager(batch: Batch, upstream: float = 1.0) -> Results:
    rows = plain_token_logps(batch)
    logps, ref_logps = _sums(batch, rows), batch.options.get("ref_logps")
    if ref_logps is None:
        ref_logps = plain_logps(batch, of_reference=True)
    weighted, importance = plain_importance(batch, rows) if "behavior_logps" in batch.options else (None, {})
    loss = plain_objective(batch, logps, ref_logps.detach(), weighted)
    kl = (logps - ref_logps)[2 * batch.options["num_pairs"] :]
    if batch.options.get("kl_estimator") == "exact" and len(kl):
        online, kl = plain_exact_online(batch)
        loss = loss + online
    (loss * upstream).backward()
    return _results(batch, loss, logps, ref_logps, kl, importance)


Order = dict[str, Tensor]  # permutations of rows "t", vocabulary "v" and features "d"
# The axes of results that follow an order.
GRADIENTS = {"gradient of hidden": "td", "gradient of weight": "vd", "gradient of bias": "v"}
ROWS = {**GRADIENTS, "logps": "t", "entropies": "t"}


def eager_runs(batch: Batch, upstream: float = 1.0, orders: int = EAGER_ORDERS) -> list[Results]:
    """Eager results of the loss in several orders of summation, put back into the batch's own."""
    return in_orders(batch, lambda run, order: run_eager(run, upstream), orders=orders)


def in_orders(
    batch: Batch,
    run: Callable[[Batch, Order], Results],
    axes: Mapping[str, str] = GRADIENTS,
    orders: int = EAGER_ORDERS,
) -> list[Results]:
    """Results of ``run(batch, order)`` in several orders of summation, put back into the batch's own.

    ``axes`` names the axes of results that follow the order, "-" for one that does not.
    """
    found = []
    for seed in range(orders):
        order = _order(batch, seed)
        results = run(_reordered(batch, order, seed).to(batch.hidden.dtype), order)
        inverse = {axis: permutation.argsort() for axis, permutation in order.items()}
        found.append({name: take(x, axes.get(name, ""), inverse) for name, x in results.items()})
    return found


def _order(batch: Batch, seed: int) -> Order:
    """Return random permutations, or the batch's own order for seed 0."""
    vocab, width = batch.weight.shape
    if seed == 0:
        return {"t": torch.arange(len(batch.targets)), "v": torch.arange(vocab), "d": torch.arange(width)}
    gen = torch.Generator().manual_seed(seed)
    sizes, starts = batch.cu_seqlens.diff().tolist(), batch.cu_seqlens[:-1].tolist()
    t = torch.cat([start + torch.randperm(size, generator=gen) for start, size in zip(starts, sizes, strict=True)])
    return {"t": t, "v": torch.randperm(vocab, generator=gen), "d": torch.randperm(width, generator=gen)}


def _reordered(batch: Batch, order: Order, seed: int) -> Batch:
    v = order["v"]
    targets = torch.where(batch.targets == -100, -100, v.argsort()[batch.targets.clamp_min(0)])[order["t"]]
    axes = {"ref_hidden": "td", "ref_lm_head_weight": "vd", "ref_bias": "v", "behavior_logps": "t"}
    adds_exactly = batch.hidden.dtype in (torch.float32, torch.float64)
    return replace(
        batch,
        hidden=take(batch.hidden, "td", order),
        weight=take(batch.weight, "vd", order),
        bias=None if batch.bias is None else take(batch.bias, "v", order),
        targets=targets,
        options={name: take(x, axes[name], order) if name in axes else x for name, x in batch.options.items()},
        blocks=min(BLOCKS[seed % len(BLOCKS)], len(v)) if adds_exactly else 1,
    )


def take(x: Tensor, axes: str, order: Order) -> Tensor:
    """``x`` with each of its ``axes`` in its order; "-" is an axis without one."""
    x = x.detach()
    for dim, axis in enumerate(axes):
        if axis != "-":
            x = x.index_select(dim, order[axis].to(x.device))
    return x


def run_fused(batch: Batch, impl: str, upstream: float = 1.0) -> Results:
    out = fused_hypo_loss(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, bias=batch.bias, impl=impl, **batch.options
    )
    importance = {} if out.importance is None else out.importance._asdict()
    statistics = [x for name, x in out._asdict().items() if name not in ("lengths", "importance")]
    assert {x.dtype for x in [*statistics, *importance.values()]} == {
        torch.promote_types(batch.hidden.dtype, torch.float32)
    }
    (out.loss * upstream).backward()
    return _results(batch, out.loss, out.logps, out.ref_logps, out.kl, importance)


def _results(batch: Batch, loss: Tensor, logps: Tensor, ref_logps: Tensor, kl: Tensor, importance: Results) -> Results:
    results = {"loss": loss, "logps": logps, "ref_logps": ref_logps, **importance}
    if batch.options.get("kl_estimator") == "exact":  # the sampled one is a difference of log-probs, no more
        results["kl"] = kl
    for name in ("hidden", "weight", "bias"):
        leaf = getattr(batch, name)
        if leaf is not None and leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype
            results[f"gradient of {name}"] = leaf.grad
    return {name: value.detach().double() for name, value in results.items()}


def truth(batch: Batch, upstream: float = 1.0) -> Results:
    exact = batch.to(torch.float64)
    if "max_chunk_bytes" in exact.options:
        exact = exact.with_options(max_chunk_bytes=2**30)
    return run_fused(exact, "reference", upstream)


def loss_scale(batch: Batch, exact: Results) -> float:
    """Σ |∂loss/∂logp · logp|: the loss is a difference of log-probs, whose size sets its rounding."""
    logps = exact["logps"].clone().requires_grad_()
    loss = plain_objective(batch, logps, exact["ref_logps"])
    if batch.options.get("kl_estimator") == "exact":  # a mean of divergences, of log-probs about as large
        loss = loss + batch.options["kl_coef"] * logps[2 * batch.options["num_pairs"] :].mean()
    (coefficients,) = torch.autograd.grad(loss, logps)
    return float((coefficients * logps).detach().abs().sum())


def assert_contract(batch: Batch, impl: str, upstream: float = 1.0, kernel: Results | None = None) -> None:
    """Check the contract for ``batch``; ``kernel`` are the implementation's results if it has run already."""
    dtype = batch.hidden.dtype
    exact = truth(batch, upstream)
    if kernel is None:
        kernel = run_fused(batch.to(dtype), impl, upstream)
    assert kernel.keys() == exact.keys()
    if dtype == torch.float64:  # the truth rounds as much as the kernel does
        for name, value in exact.items():
            torch.testing.assert_close(kernel[name], value, msg=lambda text, name=name: f"{name}: {text}")
        return
    eager = eager_runs(batch, upstream)
    scales = {"loss": loss_scale(batch, exact)}
    for name, value in exact.items():
        assert_close(name, kernel[name], [run[name] for run in eager], value, dtype, scales.get(name, 0.0))


def assert_close(
    name: str, kernel: Tensor, eager: Sequence[Tensor], exact: Tensor, dtype: torch.dtype, scale: float = 0.0
) -> None:
    """``err(kernel) <= 2 * (err(eager) + eps(dtype) * max|truth|)``; ``scale`` is a larger max|truth|."""
    assert all(run.isfinite().all() for run in eager), f"{name}: eager is not finite, hence no measure of the kernel"
    err_kernel, err_eager = _max(kernel.double() - exact), max(_max(run.double() - exact) for run in eager)
    bound = 2 * (err_eager + torch.finfo(dtype).eps * max(_max(exact), scale))
    assert err_kernel <= bound, f"{name}: error {err_kernel:.3g} exceeds {bound:.3g} (eager's is {err_eager:.3g})"


def _max(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0
