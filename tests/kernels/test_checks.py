"""Bad arguments raise ``ValueError`` with the argument's name and value; no check waits for a GPU unless asked to."""

import math
import re
from typing import Any

import pytest
import torch
from contract import IMPLS, NO_TRITON

from hypo_kernels import fused_hypo_loss, sequence_logprobs, token_logprobs

T, D, V = 10, 4, 11
META = torch.device("meta")  # a device of its own that every machine has


def good() -> dict[str, Any]:
    """Arguments of a call that works: one pair and one prompt with two samples."""
    return {
        "hidden": torch.randn(T, D),
        "lm_head_weight": torch.randn(V, D),
        "targets": torch.arange(T) % V,
        "cu_seqlens": torch.tensor([0, 3, 5, 9, 10]),
        "num_pairs": 1,
        "beta": 0.1,
        "kl_coef": 0.1,
        "ref_logps": torch.zeros(4),
    }


def from_hidden(**changes: Any) -> dict[str, Any]:
    """Arguments that give the reference as hidden states instead of log-probs."""
    return {"ref_logps": None, "ref_hidden": torch.randn(T, D), "ref_lm_head_weight": torch.randn(V, D), **changes}


def padded(**changes: Any) -> dict[str, Any]:
    return {
        "hidden": torch.randn(4, 3, D), "targets": torch.zeros(4, 3, dtype=torch.long), "cu_seqlens": None, **changes
    }  # fmt: skip


def with_one(value: float, *shape: int) -> torch.Tensor:
    x = torch.zeros(*shape)
    x.view(-1)[3] = value
    return x


# What is wrong -> (changed arguments, what the message must hold).
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    # implementations
    "an unknown impl": ({"impl": "cuda"}, ["impl='cuda'", "'triton', 'triton-rows', 'triton-epilogue', 'torch'"]),
    # shapes
    "hidden of one dimension": ({"hidden": torch.randn(T)}, ["hidden", "(10,)", "(T, D)"]),
    "a weight of one dimension": ({"lm_head_weight": torch.randn(D)}, ["lm_head_weight", "(4,)", "(V, D)"]),
    "an empty vocabulary": ({"lm_head_weight": torch.randn(0, D)}, ["lm_head_weight", "(0, 4)", "empty"]),
    "unequal features": ({"lm_head_weight": torch.randn(V, 5)}, ["hidden has 4 features", "lm_head_weight 5"]),
    "a bias of another length": ({"bias": torch.randn(12)}, ["bias", "(12,)", "(11,)"]),
    "too few targets": ({"targets": torch.arange(9)}, ["targets", "(9,)", "(10, 4)"]),
    "packed hidden without bounds": ({"cu_seqlens": None}, ["cu_seqlens is missing"]),
    "padded hidden with bounds": (padded(cu_seqlens=torch.tensor([0, 12])), ["cu_seqlens", "padded", "(4, 3, 4)"]),
    # dtypes
    "integer hidden": ({"hidden": torch.ones(T, D, dtype=torch.long)}, ["hidden is torch.int64"]),
    "an integer weight": ({"lm_head_weight": torch.ones(V, D, dtype=torch.int8)}, ["lm_head_weight is torch.int8"]),
    "hidden and weight of two dtypes": (
        {"hidden": torch.randn(T, D).bfloat16()},
        ["hidden is torch.bfloat16", "lm_head_weight torch.float32", "torch.autocast"],
    ),
    "floating targets": ({"targets": torch.zeros(T)}, ["targets is torch.float32"]),
    "boolean targets": ({"targets": torch.ones(T, dtype=torch.bool)}, ["targets is torch.bool"]),
    "floating bounds": ({"cu_seqlens": torch.tensor([0.0, 10.0])}, ["cu_seqlens is torch.float32"]),
    "integer reference log-probs": ({"ref_logps": torch.zeros(4, dtype=torch.long)}, ["ref_logps is torch.int64"]),
    # devices
    "a weight elsewhere": ({"lm_head_weight": torch.randn(V, D, device=META)}, ["hidden is on cpu", "on meta"]),
    "a bias elsewhere": ({"bias": torch.randn(V, device=META)}, ["bias is on meta", "cpu"]),
    "reference log-probs elsewhere": ({"ref_logps": torch.zeros(4, device=META)}, ["ref_logps is on meta", "cpu"]),
    # bounds
    "bounds of two dimensions": ({"cu_seqlens": torch.tensor([[0, 10]])}, ["cu_seqlens", "(1, 2)", "(S+1,)"]),
    "bounds that start late": ({"cu_seqlens": torch.tensor([1, 3, 5, 9, 10])}, ["cu_seqlens starts at 1"]),
    "bounds that end early": ({"cu_seqlens": torch.tensor([0, 3, 5, 9])}, ["cu_seqlens ends at 9", "T=10"]),
    "bounds that end late": ({"cu_seqlens": torch.tensor([0, 3, 5, 11])}, ["cu_seqlens ends at 11", "T=10"]),
    "bounds that fall": ({"cu_seqlens": torch.tensor([0, 5, 3, 9, 10])}, ["falls from 5 to 3", "position 2"]),
    # targets
    "a target beyond the vocabulary": ({"targets": torch.full((T,), V)}, ["targets holds 11", "[0, 11)"]),
    "a negative target": ({"targets": torch.full((T,), -1)}, ["targets holds -1", "-100 to ignore"]),
    # sequences
    "an odd sequence": ({"cu_seqlens": torch.tensor([0, 3, 5, 10])}, ["3 sequences", "num_generations=2"]),
    "a sample too few for its group": ({"num_generations": 3}, ["2 online samples", "num_generations=3"]),
    "more pairs than sequences": ({"num_pairs": 3}, ["num_pairs=3 needs 6 sequences", "has 4"]),
    "negative pairs": ({"num_pairs": -1}, ["num_pairs=-1"]),
    "one sample a prompt": ({"num_generations": 1}, ["num_generations=1", "at least 2"]),
    "no sequences": (
        {"hidden": torch.randn(0, D), "targets": torch.zeros(0, dtype=torch.long), "cu_seqlens": torch.tensor([0]),
         "num_pairs": 0, "ref_logps": torch.zeros(0)},
        ["no sequences"],
    ),
    # the objective
    "a beta of 0": ({"beta": 0.0}, ["beta=0.0", "positive"]),
    "an infinite beta": ({"beta": math.inf}, ["beta=inf"]),
    "a negative kl_coef": ({"kl_coef": -0.1}, ["kl_coef=-0.1"]),
    "a kl_coef of NaN": ({"kl_coef": math.nan}, ["kl_coef=nan"]),
    "an infinite length penalty": ({"length_penalty": math.inf}, ["length_penalty=inf"]),
    "an unknown preference": ({"preference": "hinge"}, ["preference='hinge'", "sigmoid", "ipo"]),
    "label smoothing of a half": ({"label_smoothing": 0.5}, ["label_smoothing=0.5", "[0, 0.5)"]),
    "negative label smoothing": ({"label_smoothing": -0.1}, ["label_smoothing=-0.1"]),
    "an unknown estimator": (from_hidden(kl_estimator="k3"), ["kl_estimator='k3'", "'sampled', 'exact'"]),
    "the exact estimator with log-probs alone": (
        {"kl_estimator": "exact"}, ["kl_estimator='exact'", "ref_logps", "pass ref_hidden and ref_lm_head_weight"],
    ),
    "label smoothing of IPO": ({"label_smoothing": 0.1, "preference": "ipo"}, ["label_smoothing=0.1", "'ipo'"]),
    # samples of another policy
    "behaviour log-probs a sequence": (
        {"behavior_logps": torch.zeros(4)}, ["behavior_logps has shape (4,)", "targets (10,)", "one for each row"],
    ),
    "behaviour log-probs of 16 bits": (
        {"behavior_logps": torch.zeros(T).bfloat16()}, ["behavior_logps is torch.bfloat16", "float32 or float64"],
    ),
    "behaviour log-probs elsewhere": (
        {"behavior_logps": torch.zeros(T, device=META)}, ["behavior_logps is on meta and hidden on cpu"],
    ),
    "behaviour log-probs that are not constant": (
        {"behavior_logps": torch.zeros(T, requires_grad=True)},
        ["behavior_logps requires a gradient", "behavior_logps.detach()"],
    ),
    "behaviour log-probs and the exact estimator": (
        from_hidden(behavior_logps=torch.zeros(T), kl_estimator="exact"),
        ["behavior_logps corrects kl_estimator='sampled', not 'exact'"],
    ),
    "an importance cap of 0": ({"importance_cap": 0.0}, ["importance_cap=0.0", "positive"]),
    "a negative importance cap": ({"importance_cap": -2.0}, ["importance_cap=-2.0"]),
    "an importance cap of NaN": ({"importance_cap": math.nan}, ["importance_cap=nan"]),
    # the head
    "a softcap of 0": ({"logit_softcap": 0.0}, ["logit_softcap=0.0"]),
    "an infinite softcap": ({"logit_softcap": math.inf}, ["logit_softcap=inf"]),
    "a scale of 0": ({"logit_scale": 0.0}, ["logit_scale=0.0"]),
    "a temperature of 0": ({"temperature": 0.0}, ["temperature=0.0"]),
    "a negative temperature": ({"temperature": -1.0}, ["temperature=-1.0"]),
    # the reference
    "no reference": ({"ref_logps": None}, ["reference is missing", "ref_logps", "ref_hidden"]),
    "two references": (
        {"ref_hidden": torch.randn(T, D), "ref_lm_head_weight": torch.randn(V, D)}, ["ref_logps and ref_hidden"],
    ),
    "a reference head alone": ({"ref_lm_head_weight": torch.randn(V, D)}, ["ref_lm_head_weight", "ref_hidden"]),
    "reference log-probs of another count": ({"ref_logps": torch.zeros(5)}, ["ref_logps", "(5,)", "(4,)"]),
    "reference hidden states of another shape": (
        from_hidden(ref_hidden=torch.randn(9, D)), ["ref_hidden has shape (9, 4)", "hidden (10, 4)"],
    ),
    "a trained head as its own reference": (
        from_hidden(ref_lm_head_weight=None, lm_head_weight=torch.randn(V, D, requires_grad=True)),
        ["lm_head_weight is being trained", "ref_lm_head_weight"],
    ),
    "a reference head of another vocabulary": (
        from_hidden(ref_lm_head_weight=torch.randn(12, D)), ["lm_head_weight has 11", "ref_lm_head_weight 12"],
    ),
    "a reference head of other features": (
        from_hidden(ref_lm_head_weight=torch.randn(V, 5)), ["ref_hidden has 4 features", "ref_lm_head_weight 5"],
    ),
    "a trained bias as its own reference": (
        from_hidden(ref_lm_head_weight=None, bias=torch.randn(V, requires_grad=True)),
        ["bias is being trained", "ref_bias"],
    ),
    "a reference bias alone": ({"ref_bias": torch.randn(V)}, ["ref_bias", "ref_hidden"]),
    "a reference bias of another length": (from_hidden(ref_bias=torch.randn(3)), ["ref_bias", "(3,)", "(11,)"]),
    "a reference in two dtypes": (
        from_hidden(ref_hidden=torch.randn(T, D).half()),
        ["ref_hidden is torch.float16", "ref_lm_head_weight torch.float32"],
    ),
    # budget
    "no budget": ({"max_chunk_bytes": 0}, ["max_chunk_bytes=0", "positive"]),
    "a budget below one row": ({"max_chunk_bytes": 100}, ["max_chunk_bytes=100", "one row of 11 logits", "at least"]),
    # values, looked at only when asked
    "NaN in hidden": ({"hidden": with_one(math.nan, T, D), "validate": True}, ["hidden holds 1"]),
    "an infinity in hidden": ({"hidden": with_one(math.inf, T, D), "validate": True}, ["hidden holds 1"]),
    "NaN in reference log-probs": ({"ref_logps": with_one(math.nan, 4), "validate": True}, ["ref_logps holds 1"]),
    "NaN in behaviour log-probs": (
        {"behavior_logps": torch.full((T,), math.nan), "validate": True}, ["behavior_logps holds 5"],
    ),
    "NaN in reference hidden states": (
        from_hidden(ref_hidden=with_one(math.nan, T, D), validate=True), ["ref_hidden holds 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_a_bad_argument_is_named_with_its_value(wrong: str) -> None:
    changes, expected = BAD[wrong]
    with pytest.raises(ValueError, match=re.escape(expected[0])) as error:
        fused_hypo_loss(**{**good(), **changes})
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("impl", IMPLS)
def test_the_arguments_that_the_bad_ones_start_from_are_good(impl: str, device: torch.device) -> None:
    of_samples = torch.cat([torch.full((5,), math.nan), torch.zeros(5)])  # those of the pair are not read
    for changes in (
        {},
        from_hidden(),
        padded(),
        {"validate": True},
        {"behavior_logps": of_samples, "validate": True, "importance_cap": math.inf},
    ):
        assert fused_hypo_loss(**moved({**good(), **changes}, device), impl=impl).loss.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrong", ["an odd sequence", "bounds that end early", "a target beyond the vocabulary"])
def test_checks_are_the_same_for_every_implementation(wrong: str, impl: str, device: torch.device) -> None:
    changes, expected = BAD[wrong]
    with pytest.raises(ValueError, match=re.escape(expected[0])):
        fused_hypo_loss(**moved({**good(), **changes}, device), impl=impl)


@pytest.mark.parametrize(
    "wrong",
    [
        "an unknown impl", "hidden of one dimension", "unequal features", "a bias of another length",
        "too few targets", "hidden and weight of two dtypes", "floating targets", "a weight elsewhere",
        "a target beyond the vocabulary", "a negative target", "a softcap of 0", "a temperature of 0",
        "no budget", "a budget below one row",
    ],
)  # fmt: skip
def test_the_log_prob_functions_check_the_same(wrong: str) -> None:
    changes, expected = BAD[wrong]
    arguments = {**good(), **changes}
    for name in ("num_pairs", "beta", "kl_coef", "ref_logps"):
        del arguments[name]
    with pytest.raises(ValueError, match=re.escape(expected[0])):
        sequence_logprobs(**arguments)
    del arguments["cu_seqlens"]
    with pytest.raises(ValueError, match=re.escape(expected[0])):
        token_logprobs(**arguments)


@pytest.mark.parametrize(
    "wrong", ["packed hidden without bounds", "bounds that start late", "bounds that end early", "bounds that fall"]
)
def test_sequence_logprobs_checks_its_bounds(wrong: str) -> None:
    changes, expected = BAD[wrong]
    arguments = {**good(), **changes}
    with pytest.raises(ValueError, match=re.escape(expected[0])):
        sequence_logprobs(*(arguments[name] for name in ("hidden", "lm_head_weight", "targets", "cu_seqlens")))


@NO_TRITON
def test_triton_does_not_compute_in_float64(device: torch.device) -> None:
    doubles = moved(good(), device)
    doubles |= {name: doubles[name].double() for name in ("hidden", "lm_head_weight", "ref_logps")}
    with pytest.raises(ValueError, match=r"impl='triton' .*float64.* impl='torch'"):
        fused_hypo_loss(**doubles, impl="triton")
    assert fused_hypo_loss(**doubles).loss.dtype == torch.float64  # "auto" knows


def test_triton_refuses_cpu_tensors_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton' needs CUDA tensors, got cpu; use impl='torch'"):
        fused_hypo_loss(**good(), impl="triton")


def test_values_are_not_looked_at_unless_asked() -> None:
    """A check would wait for the GPU: NaN passes through, as in any op of torch."""
    assert fused_hypo_loss(**{**good(), "hidden": with_one(math.nan, T, D)}).loss.isnan()
