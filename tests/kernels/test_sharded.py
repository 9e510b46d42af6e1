"""Heads sharded over two gloo processes: vocabulary parallelism, and FSDP2's DTensors."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import NO_TRITON, random_batch
from sharded_runs import BOTH, CASES, CERTAIN, CPU, VOCAB, Model, loss_run, token_run

from hypo_kernels import TargetLayout, VocabShard, token_logprobs
from hypo_kernels.chunked_head import ChunkedLMHead
from hypo_kernels.head import LMHead

WORLD = 2
IMPLS = ["torch", "triton"]
pytestmark = [
    pytest.mark.slow,
    NO_TRITON,
    pytest.mark.skipif(torch.cuda.is_available(), reason="two processes of CPU tensors, under Triton's interpreter"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every rank's results."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("sharded_runs.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(WORLD), folder], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_the_vocabulary_is_split_as_torch_chunk_splits_it(ranks: list[dict[str, Any]]) -> None:
    sizes = [len(part) for part in torch.arange(VOCAB).chunk(WORLD)]
    assert [rank["shard"] for rank in ranks] == [(0, sizes[0]), (sizes[0], sizes[1])]


def together(ranks: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """Merge the ranks' results: concatenate the vocabulary's parts, and check that the rest is equal on all ranks."""
    out = {}
    for name in ranks[0][key]:
        parts = [rank[key][name] for rank in ranks]
        if name in ("gradient of weight", "gradient of bias", "gradient of B"):
            out[name] = torch.cat(parts)
            continue
        assert torch.equal(parts[0], parts[1]), name
        out[name] = parts[0]
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_sharded_head_gives_the_whole_heads_loss_and_gradients(
    impl: str, case: str, ranks: list[dict[str, Any]]
) -> None:
    expected = loss_run(random_batch(**BOTH, **CASES[case], device=CPU), impl, None)
    got = together(ranks, f"{impl} {case}")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_token_log_probs_and_entropies_of_a_sharded_head(impl: str, ranks: list[dict[str, Any]]) -> None:
    expected = token_run(random_batch(**BOTH, device=CPU), impl, None)
    got = together(ranks, f"{impl} tokens")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_nearly_certain_tokens_of_a_sharded_head_are_exact(impl: str, ranks: list[dict[str, Any]]) -> None:
    """One rank holds the target, and both hold some of what its probability lacks."""
    exact = token_run(random_batch(**BOTH, **CERTAIN, device=CPU).to(torch.float64), "reference", None)
    got = together(ranks, f"{impl} certain tokens")
    for name in ("logps", "sums", "gradient of hidden", "gradient of weight"):
        largest = float(exact[name].abs().max())
        assert 0 < largest < 1e-5
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("inside", [True, False], ids=["inside forward", "as a DTensor outside of it"])
def test_fsdp2_gets_the_mean_of_the_ranks_gradients(inside: bool, ranks: list[dict[str, Any]]) -> None:
    model = Model()
    losses = [model(random_batch(**{**BOTH, "seed": rank}, device=CPU)) for rank in range(WORLD)]
    (sum(losses) / WORLD).backward()
    for rank in ranks:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank[f"fsdp {inside}"][name], parameter.grad)


def test_a_weight_that_is_not_the_ranks_share_is_refused() -> None:
    class Group:
        pass

    shard = VocabShard(Group(), start=34, size=33, largest=34, vocab_size=67)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lm_head_weight has 34 .* vocab_shard 33: .* 34 to 67"):
        token_logprobs(torch.randn(2, 4), torch.randn(34, 4), torch.zeros(2, dtype=torch.long), vocab_shard=shard)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("budget", [20_000, 26_000, 34_000, 60_000, 2**20])
def test_ranks_with_unequal_shares_plan_alike(budget: int, impl: str) -> None:
    """Otherwise a rank would wait for a reduction that the other never starts. bf16 heads are converted in panels."""

    class Group:
        pass

    batch = random_batch(**BOTH, device=CPU)
    layout = TargetLayout.of(batch.targets, batch.cu_seqlens)
    plans = []
    for start, size in ((0, 40), (40, 27)):
        shard = VocabShard(Group(), start=start, size=size, largest=40, vocab_size=VOCAB)  # type: ignore[arg-type]
        head = LMHead(batch.weight.detach()[start : start + size].bfloat16(), vocab_shard=shard)
        chunked = ChunkedLMHead([head], layout, torch.bfloat16, impl, budget, statistics_only=True)
        plans.append((chunked.fused_statistics, chunked.max_rows, chunked.rows_of_statistics))
    assert plans[0] == plans[1]
