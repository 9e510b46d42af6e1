"""Every preference loss: TRL's and Liger's own code in float64, the fused pass against autograd, losses of a user."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from contract import FUSED, Batch, Results, assert_close, crossed, in_orders, random_batch, variants
from torch import Tensor

from hypo_kernels import Groups, Pairs, fused_hypo_loss, fused_preference_loss
from hypo_kernels.losses import (
    CPO,
    LOSSES,
    ORPO,
    REBEL,
    SFT,
    BCOPair,
    ChiPO,
    DPOPositive,
    EXOPair,
    IPOMean,
    KTOPair,
    Robust,
    Sigmoid,
    SimPO,
    Weighted,
    log1mexp,
)
from hypo_kernels.pairs import PairLoss, pair_terms

P = 3
CPU = torch.device("cpu")
# TRL's names with TRL's settings: those of its configuration that the loss reads.
TRL: dict[str, tuple[PairLoss, dict[str, Any]]] = {
    **{name: (LOSSES[name](beta=0.3), {"loss_types": [name]}) for name in (
        "sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
    )},
    "ipo": (IPOMean(0.3), {"loss_types": ["ipo"]}),
    "robust": (Robust(0.3, label_smoothing=0.1), {"loss_types": ["robust"], "label_smoothing": 0.1}),
    "exo_pair": (EXOPair(0.3, label_smoothing=0.01), {"loss_types": ["exo_pair"], "label_smoothing": 0.01}),
    "sft": (SFT(), {"loss_types": ["sft"]}),
    "three losses, as MPO": (
        Weighted([Sigmoid(0.3), BCOPair(0.3), SFT()], [0.8, 0.2, 1.0]),
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    **{f"sigmoid, {kind}": (Sigmoid(0.3, f_divergence_type=kind), {"f_divergence_type": kind}) for kind in (
        "forward_kl", "js_divergence", "alpha_divergence",
    )},
}  # fmt: skip


@dataclass
class TRLsBatch:
    """Log-probs of the tokens of P chosen, then P rejected responses, and the reference's sums."""

    rows: Tensor  # (2 P, L), 0 beyond the response
    mask: Tensor  # (2 P, L + 1), the completion mask that TRL's collator makes
    ref_logps: Tensor  # (2 P,)


def trls_batch() -> TRLsBatch:
    gen = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 1, 6, 5, 3, 2])  # one response of a single token
    mask = (torch.arange(8) > 0) & (torch.arange(8) <= lengths[:, None])
    rows = -2 * torch.rand(2 * P, 7, generator=gen, dtype=torch.float32) * mask[:, 1:]
    return TRLsBatch(rows.requires_grad_(), mask.long(), rows.detach().sum(1) + torch.randn(2 * P, generator=gen))


def trls_loss(batch: TRLsBatch, settings: dict[str, Any]) -> Tensor:
    """Return the loss () that ``DPOTrainer`` computes from a model with these log-probs."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    zeros = torch.zeros_like(batch.rows).detach()
    outputs = SimpleNamespace(
        log_probs=batch.rows, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros - 1.5
    )
    same = lambda x: x  # noqa: E731
    trainer_like = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device=CPU, gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        loss_types=["sigmoid"],
        loss_weights=None,
        beta=0.3,
        label_smoothing=0.0,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    trainer_like.__dict__.update(settings)
    trainer_like.loss_weights = trainer_like.loss_weights or [1.0] * len(trainer_like.loss_types)
    inputs = {
        "input_ids": torch.zeros_like(batch.mask),
        "attention_mask": torch.ones_like(batch.mask),
        "completion_mask": batch.mask,
        "ref_chosen_logps": batch.ref_logps[:P],
        "ref_rejected_logps": batch.ref_logps[P:],
    }
    loss: Tensor = trainer._compute_loss(trainer_like, lambda **_: outputs, inputs, False)
    return loss


def pairs_of(batch: TRLsBatch, **tensors: Tensor) -> Pairs:
    lengths = batch.mask.sum(1).to(batch.rows.dtype)
    sums, ref = batch.rows.sum(1), batch.ref_logps
    tokens = int(lengths[:P].sum())
    return Pairs(sums[:P], sums[P:], ref[:P], ref[P:], lengths[:P], lengths[P:], P, tokens, tensors)


@pytest.mark.parametrize("name", TRL)
def test_value_and_gradient_are_those_of_trls_trainer(name: str) -> None:
    loss, settings = TRL[name]
    batch = trls_batch()
    expected = trls_loss(batch, settings)
    (by_rows,) = torch.autograd.grad(expected, batch.rows)
    terms = pair_terms(loss, pairs_of(batch))
    torch.testing.assert_close(terms.losses.mean(), expected.detach(), rtol=1e-5, atol=1e-6)
    coefficients = torch.cat([terms.by_chosen, terms.by_rejected]) / P
    torch.testing.assert_close(
        coefficients[:, None] * batch.mask[:, 1:], by_rows * batch.mask[:, 1:], atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["simpo", "cpo", "cpo, smoothed"])
def test_reference_free_losses_are_those_of_trls_cpo_trainer(name: str) -> None:
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    smoothing = 0.1 if "smoothed" in name else 0.0
    like = SimpleNamespace(
        alpha=0.0, beta=0.3, label_smoothing=smoothing, simpo_gamma=0.5, accelerator=SimpleNamespace(device=CPU),
        loss_type="simpo" if name == "simpo" else "sigmoid",
    )  # fmt: skip
    pairs = pairs_of(trls_batch())
    chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
    if name == "simpo":
        loss: PairLoss = SimPO(0.3, simpo_gamma=0.5)
        chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
    else:
        loss = CPO(0.3, cpo_alpha=0.0, label_smoothing=smoothing)
    torch.testing.assert_close(loss(pairs), trainer.cpo_loss(like, chosen, rejected)[0])


def test_orpo_is_trls_odds_ratio_and_a_likelihood() -> None:
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    like = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=CPU))
    pairs = pairs_of(trls_batch())
    means = pairs.chosen_logps / pairs.chosen_lengths, pairs.rejected_logps / pairs.rejected_lengths
    expected = SFT()(pairs) - trainer.odds_ratio_loss(like, *means)[0]
    torch.testing.assert_close(ORPO(0.3)(pairs), expected)


@pytest.mark.parametrize("name", sorted(set(LOSSES) & {
    "sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
}))  # fmt: skip
def test_value_is_that_of_ligers_equation(name: str) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction
    smoothing = {"robust": 0.1, "exo_pair": 1e-3}.get(name, 0.0)
    pairs = pairs_of(trls_batch())
    both = torch.zeros(2 * P)
    expected, *_ = liger.preference_loss_fn(
        pairs.chosen_logps, pairs.rejected_logps, both, pairs.ref_chosen_logps, pairs.ref_rejected_logps, beta=0.3,
        loss_type=name, label_smoothing=smoothing,
    )  # fmt: skip
    loss = LOSSES[name](0.3, **({"label_smoothing": smoothing} if smoothing else {}))
    torch.testing.assert_close(loss(pairs).mean(), expected)


def test_losses_without_a_peer_are_their_papers_equations() -> None:
    pairs = pairs_of(trls_batch(), chosen_scores=torch.tensor([1.0, 2.0, 0.5]), rejected_scores=torch.zeros(P))
    up, down = pairs.chosen_ratios.detach(), pairs.rejected_ratios.detach()
    beta = 0.3
    expected = {
        ChiPO(beta): -torch.log(torch.sigmoid(beta * (up + up.exp() - down - down.exp()))),
        DPOPositive(beta, dpop_lambda=5.0): -torch.log(torch.sigmoid(beta * (up - down - 5 * (-up).clamp(min=0)))),
        REBEL(beta): (beta * (up - down) - torch.tensor([1.0, 2.0, 0.5])) ** 2,
    }
    for loss, value in expected.items():
        torch.testing.assert_close(loss(pairs).detach(), value)


def test_log1mexp_is_exact_near_zero_and_far_from_it() -> None:
    x = torch.tensor([-1e-12, -1e-3, -0.5, -1.0, -30.0], dtype=torch.float64).requires_grad_()
    expected = torch.tensor([math.log(-math.expm1(float(v))) for v in x.detach()], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), expected)
    torch.testing.assert_close(log1mexp(x.detach().float()), expected.float())
    (by_x,) = torch.autograd.grad(log1mexp(x).sum(), x)
    torch.testing.assert_close(by_x, -x.detach().exp() / -torch.expm1(x.detach()))


@dataclass(frozen=True)
class WithMargin:
    """A loss of a user: DPO that asks for more where the scores differ more."""

    beta: float = 0.2

    def __call__(self, pairs: Pairs) -> Tensor:
        return torch.nn.functional.softplus(
            pairs.tensors["margins"] - self.beta * (pairs.chosen_ratios - pairs.rejected_ratios)
        )


def upward(groups: Groups) -> Tensor:
    """A loss of groups: REINFORCE with rewards, whose gradient is not that of its value."""
    rewards = groups.tensors["rewards"]
    surrogate = -((rewards - rewards.mean(1, keepdim=True)) * groups.logps).sum(1)
    return -rewards.mean(1) + surrogate - surrogate.detach()


LENGTHS = [5, 9, 4, 3, 7, 6, 2, 4, 5, 3]  # 3 pairs, 2 prompts of 2 samples, all ragged
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss": loss()} for name, loss in LOSSES.items() if name != "rebel"},
    "a user's, with margins": {"loss": WithMargin()},
    "three losses": {"loss": Weighted([Sigmoid(), SFT(), KTOPair()], [1.0, 0.5, 0.2])},
    "weighted pairs": {"loss": Sigmoid()},
    "weighted tokens": {"loss": Sigmoid()},
    "a loss of the samples": {"loss": Sigmoid(), "group_loss": upward},
    "exact KL": {"loss": BCOPair(), "group_loss": upward, "kl_estimator": "exact"},
}
MAIN_CASES = ("simpo", "a user's, with margins", "three losses", "a loss of the samples")


def case_batch(case: str, dtype: torch.dtype) -> Batch:
    options = CASES[case]
    batch = random_batch(
        LENGTHS, vocab=67, num_pairs=3, dtype=dtype, device=CPU, with_ref_hidden="kl_estimator" in options
    )
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {"margins": torch.tensor([0.1, 0.5, -0.2], dtype=wide)}
    if case == "weighted pairs":
        tensors["weights"] = torch.tensor([0.5, 2.0, 0.0], dtype=wide)
    extra: dict[str, Any] = {"pair_tensors": tensors, "sample_tensors": {}}
    if "group_loss" in options:
        extra["sample_tensors"] = {"rewards": torch.tensor([1.0, 0.0, 0.3, 0.7], dtype=wide)}
    if case == "weighted tokens":
        extra["token_weights"] = 0.5 + torch.rand(len(batch.targets), generator=torch.Generator().manual_seed(1))
    options = {"kl_coef": 0.5, **options, **extra}
    del batch.options["beta"]
    return batch.with_options(**options)


def fused(batch: Batch, impl: str, **changes: Any) -> Results:
    out = fused_preference_loss(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **{**batch.options, **changes}
    )
    out.loss.backward()
    gradients = {"gradient of hidden": batch.hidden.grad, "gradient of weight": batch.weight.grad}
    return {name: x.detach().double() for name, x in {"loss": out.loss, "logps": out.logps, **gradients}.items()}


def plain(batch: Batch) -> Results:
    """Autograd over full logits, with the loss as a function of all pairs at once, in float64."""
    options = batch.options
    log_p = (batch.hidden @ batch.weight.T).double().log_softmax(-1)
    counted = batch.targets != -100
    rows = log_p.gather(1, batch.targets.clamp_min(0)[:, None]).squeeze(1) * counted
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(batch.cu_seqlens.diff())
    weights = options.get("token_weights")
    weights = torch.ones(len(rows), dtype=torch.double) if weights is None else weights.double()
    weights = torch.where(sequence < 6, weights, 1.0)
    logps = torch.zeros(len(LENGTHS), dtype=torch.double).index_add(0, sequence, weights * rows)
    lengths = torch.zeros(len(LENGTHS), dtype=torch.double).index_add(0, sequence, counted.double())
    ref = options["ref_logps"].double()
    tensors = {name: x.double() for name, x in options["pair_tensors"].items()}
    loss = options["loss"]
    pairs = Pairs(
        logps[:3], logps[3:6], ref[:3], ref[3:6], lengths[:3], lengths[3:6], 3, int(lengths[:3].sum()), tensors
    )
    if hasattr(loss, "batch_statistics"):
        with torch.no_grad():
            pairs = pairs._replace(tensors={**tensors, **loss.batch_statistics(pairs)})
    value = (loss(pairs) * tensors.get("weights", 1.0)).mean()
    ratio = (logps - ref)[6:].view(2, 2)
    advantage = (ratio - ratio.flip(1)).detach()
    surrogate = (advantage * logps[6:].view(2, 2)).mean()
    value = value + options["kl_coef"] * (ratio.detach().mean() + surrogate - surrogate.detach())
    if options.get("group_loss"):
        samples = {name: x.double().view(2, 2) for name, x in options["sample_tensors"].items()}
        groups = Groups(logps[6:].view(2, 2), ref[6:].view(2, 2), lengths[6:].view(2, 2), samples)
        value = value + options["group_loss"](groups).mean()
    value.backward()
    gradients = {"gradient of hidden": batch.hidden.grad, "gradient of weight": batch.weight.grad}
    return {name: x.detach().double() for name, x in {"loss": value, "logps": logps, **gradients}.items()}


@pytest.mark.parametrize("case", [name for name in CASES if name != "exact KL"])
def test_the_specification_is_autograd_of_the_loss(case: str) -> None:
    expected = plain(case_batch(case, torch.float64))
    found = fused(case_batch(case, torch.float64), "reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", ["one chunk", "a chunk for each pair"])
def test_the_fused_pass_is_the_specification_in_any_chunks(case: str, budget: str) -> None:
    expected = fused(case_batch(case, torch.float64), "reference")
    changes = {} if budget == "one chunk" else {"max_chunk_bytes": least_budget(case_batch(case, torch.float64))}
    found = fused(case_batch(case, torch.float64), "torch", **changes)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def least_budget(batch: Batch) -> int:
    with pytest.raises(ValueError, match="pass at least") as error:
        fused(batch, "torch", max_chunk_bytes=1)
    return int(str(error.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize(
    ("impl", "dtype", "case"), crossed(variants(torch.float32, torch.bfloat16), MAIN_CASES, lambda *_: True)
)
def test_losses_are_within_the_contract(impl: str, dtype: torch.dtype, case: str) -> None:
    exact = fused(case_batch(case, dtype).to(torch.float64), "reference")
    kernel = fused(case_batch(case, dtype), impl)
    eager = in_orders(case_batch(case, dtype), lambda run, order: plain(run))
    for name, value in exact.items():
        assert_close(name, kernel[name], [run[name] for run in eager], value, dtype)


@pytest.mark.parametrize("impl", FUSED)
def test_the_preset_is_the_general_function_bit_for_bit(impl: str) -> None:
    batch = case_batch("sigmoid", torch.float32)
    found = fused(batch, impl)
    other = case_batch("sigmoid", torch.float32)
    for key in ("loss", "pair_tensors", "sample_tensors"):
        del other.options[key]
    out = fused_hypo_loss(
        other.hidden, other.weight, other.targets, other.cu_seqlens, beta=0.1, impl=impl, **other.options
    )
    out.loss.backward()
    assert torch.equal(out.loss.detach().double(), found["loss"])
    assert torch.equal(other.weight.grad.double(), found["gradient of weight"])


def sorts(pairs: Pairs) -> Tensor:
    return -torch.nn.functional.logsigmoid(pairs.chosen_ratios.sort()[0] - pairs.rejected_ratios.sort()[0])


def averages(pairs: Pairs) -> Tensor:
    ratios = pairs.chosen_ratios
    return (ratios - ratios.detach().mean()).square()


@dataclass(frozen=True)
class Averages:
    """A loss that reads the mean of all pairs, which it declares as a statistic of the batch."""

    needs_reference: ClassVar[bool] = True

    def batch_statistics(self, pairs: Pairs) -> dict[str, Tensor]:
        return {"mean": pairs.chosen_ratios.mean().expand_as(pairs.chosen_ratios)}

    def __call__(self, pairs: Pairs) -> Tensor:
        return (pairs.chosen_ratios - pairs.tensors["mean"]).square()


@pytest.mark.parametrize("loss", [sorts, averages])
def test_a_loss_that_reads_other_pairs_is_refused(loss: Callable[[Pairs], Tensor]) -> None:
    with pytest.raises(ValueError, match="changes with the other pairs of the batch"):
        fused(case_batch("sigmoid", torch.float32), "torch", loss=loss)


def test_a_statistic_of_the_batch_is_computed_before_its_chunks() -> None:
    def batch() -> Batch:
        return case_batch("sigmoid", torch.float64).with_options(loss=Averages())

    expected = plain(batch())
    found = fused(batch(), "torch", max_chunk_bytes=least_budget(batch()))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo", "sft"])
def test_reference_free_losses_need_no_reference(name: str) -> None:
    batch = random_batch([5, 9, 4, 3], vocab=67, num_pairs=2, dtype=torch.float32, device=CPU)
    out = fused_preference_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, loss=name, num_pairs=2)
    beta = getattr(LOSSES[name](), "beta", 1.0)
    torch.testing.assert_close(out.chosen_rewards, beta * out.logps[:2])
    with pytest.raises(ValueError, match="the reference is missing"):
        fused_preference_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, loss="hinge", num_pairs=2)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a loss that sorts": ({"loss": "aot"}, "sorts the whole batch"),
    "TRL's ipo": ({"loss": "ipo"}, "'ipo_sum' .* or 'ipo_mean'"),
    "an unknown name": ({"loss": "dpo"}, "loss='dpo': must be one of 'sigmoid'"),
    "a number": ({"loss": 3}, "loss is a int"),
    "a mean": ({"loss": lambda pairs: pairs.chosen_ratios.mean()}, "must return one loss each"),
    "a constant": ({"loss": lambda pairs: torch.ones(len(pairs.chosen_logps))}, "do not depend on"),
    "no scores": ({"loss": REBEL()}, "needs pair_tensors={'chosen_scores'"),
    "margins of another length": ({"pair_tensors": {"margins": torch.zeros(4)}}, r"must be \(3,\), one for each pair"),
    "margins with a gradient": (
        {"pair_tensors": {"margins": torch.zeros(3, requires_grad=True)}},
        "requires a gradient",
    ),
    "rewards of another length": ({"sample_tensors": {"r": torch.zeros(3)}}, r"must be \(4,\), one for each online"),
    "weights of sequences": ({"token_weights": torch.ones(10)}, "need one for each row"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fused(case_batch("sigmoid", torch.float32), "torch", **changes)


@pytest.mark.parametrize("field", ["beta", "label_smoothing", "f_divergence_type"])
def test_parameters_out_of_range_are_named(field: str) -> None:
    bad = {"beta": 0.0, "label_smoothing": 0.5, "f_divergence_type": "chi"}[field]
    with pytest.raises(ValueError, match=f"{field}={bad!r}"):
        Sigmoid(**{field: bad})


@pytest.mark.parametrize(
    "case", ["sigmoid", "simpo", "a user's, with margins", "three losses", "a loss of the samples"]
)
def test_losses_compile_into_a_full_graph(case: str) -> None:
    expected = fused(case_batch(case, torch.float32), "torch")
    batch = case_batch(case, torch.float32)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_preference_loss(
            hidden, weight, batch.targets, batch.cu_seqlens, impl="torch", **batch.options
        ).loss

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(batch.hidden, batch.weight)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected["loss"])
    torch.testing.assert_close(batch.weight.grad.double(), expected["gradient of weight"])
