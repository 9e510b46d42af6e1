"""The byte-and-FLOP model against the operations that torch issues.

fp32, so that a GEMM operand is its input as it stands. V is much larger than D and than a row's bookkeeping, so
that the passes over the logits dominate what is not a GEMM, as they do in a real head.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cost
from benchmarks.cost import Operation, Passes, RowStep, Work
from benchmarks.issued import OperationMeter
from benchmarks.workloads import NUM_GENERATIONS, Batch, Workload, make_batch
from hypo_kernels import fused_hypo_loss, sequence_logprobs, token_logprobs

ROWS, VOCAB, WIDTH = 192, 1531, 24
SEQUENCE = 16  # rows, on average: a pair and a group have twice as many
# Index, target, lengths, norms, log-prob and coefficient of a row, what the objective makes of them, and the
# gradient of an ignored row: a twelfth of one pass over a row of logits.
BYTES_PER_ROW = 512
# A pass over the logits can be saved on a CPU, but each of them has to be read, and each gradient written.
LEAST = RowStep(Passes(1), Passes(1, gradients_written=1), Passes(1, gradients_written=1))


# ``max_chunk_bytes`` that hold all rows, or about a third of them: logits and four copies while they are reduced.
BUDGETS = {"one chunk": 2**30, "several chunks": ROWS // 3 * VOCAB * 4 * 5}


@pytest.fixture(params=BUDGETS)
def budget(request: pytest.FixtureRequest) -> int:
    return BUDGETS[request.param]


def batch_of(task: str, *, weight: bool, hidden: bool = True, counted: float = 1.0) -> Batch:
    workload = Workload(task, ROWS, VOCAB, WIDTH, torch.float32, SEQUENCE, counted)
    batch = make_batch(workload, torch.device("cpu"))
    batch.hidden.requires_grad_(hidden)
    batch.weight.requires_grad_(weight)
    return batch


def loss(batch: Batch, budget: int) -> Tensor:
    return fused_hypo_loss(
        batch.hidden,
        batch.weight,
        batch.host_targets,
        batch.cu_seqlens,
        num_pairs=batch.num_pairs,
        num_generations=NUM_GENERATIONS,
        ref_logps=batch.ref_logps if batch.ref_hidden is None else None,
        ref_hidden=batch.ref_hidden,
        ref_lm_head_weight=batch.ref_weight,
        beta=0.1,
        kl_coef=0.05,
        max_chunk_bytes=budget,
        impl="torch",
    ).loss


def issued(call: Callable[[], Any]) -> OperationMeter:
    with OperationMeter() as meter:
        call()
    return meter


def assert_modelled(meter: OperationMeter, batch: Batch, model: Callable[[Work], Sequence[Operation]]) -> None:
    """FLOP and the GEMMs' bytes exactly; the other bytes within the passes that the model allows.

    How many chunks there were is taken from the GEMMs: the plan is not the model's.
    """
    counted = len(batch.counted_rows)

    def modelled(chunks: int, row_step: RowStep) -> Sequence[Operation]:
        return model(Work(counted, VOCAB, WIDTH, chunks, operand=4, row_step=row_step))

    needed = sum(operation.is_gemm for operation in modelled(1, LEAST))
    chunks, rest = divmod(len(meter.gemms), needed)
    assert (chunks > 0, rest) == (True, 0), "every chunk takes the model's GEMMs"
    most = modelled(chunks, cost.ROW_STEPS["torch"])
    least = modelled(chunks, LEAST)
    assert sum(gemm.flop for gemm in meter.gemms) == sum(operation.flop for operation in most)
    for side in ("read", "written"):
        assert sum(getattr(gemm, side) for gemm in meter.gemms) == sum(
            getattr(operation, side) for operation in most if operation.is_gemm
        )
    other = sum(operation.bytes for operation in meter.rest)
    assert other <= sum(operation.bytes for operation in most if not operation.is_gemm) + BYTES_PER_ROW * ROWS
    over_logits = sum(operation.bytes for operation in meter.rest if operation.touches(VOCAB))
    assert over_logits >= sum(operation.bytes for operation in least if operation.name.startswith("row step"))


@pytest.mark.parametrize(("hidden", "weight"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("counted", [1.0, 0.5])
def test_a_loss_on_whole_groups_does_what_the_model_says(
    hidden: bool, weight: bool, counted: float, budget: int
) -> None:
    batch = batch_of("hypo", hidden=hidden, weight=weight, counted=counted)
    meter = issued(lambda: loss(batch, budget).backward())
    assert_modelled(meter, batch, lambda work: cost.group_closed(work, hidden=hidden, weight=weight))


def test_the_smaller_budget_takes_several_chunks() -> None:
    batch = batch_of("hypo", weight=True)
    assert len(issued(lambda: loss(batch, BUDGETS["one chunk"])).gemms) == 3
    assert len(issued(lambda: loss(batch, BUDGETS["several chunks"])).gemms) > 3


def test_a_reference_from_its_hidden_states_adds_log_probs(budget: int) -> None:
    batch = batch_of("dpo", weight=True)
    meter = issued(lambda: loss(batch, budget).backward())
    assert_modelled(meter, batch, lambda work: cost.log_probs(work) + cost.group_closed(work, hidden=True, weight=True))


@pytest.mark.parametrize("weight", [True, False])
def test_groups_larger_than_a_chunk_are_computed_twice(weight: bool) -> None:
    batch = batch_of("hypo", weight=weight)
    with pytest.raises(ValueError, match="pass at least") as error:
        loss(batch, 1)
    one_row = int(str(error.value).split("at least ")[1].split()[0])
    meter = issued(lambda: loss(batch, one_row).backward())
    assert_modelled(meter, batch, lambda work: cost.recompute(work, hidden=True, weight=weight))


def test_log_probs_without_gradients_do_what_the_model_says(budget: int) -> None:
    batch = batch_of("hypo", weight=True)

    def forward() -> None:
        with torch.no_grad():
            sequence_logprobs(
                batch.hidden, batch.weight, batch.host_targets, batch.cu_seqlens, max_chunk_bytes=budget, impl="torch"
            )

    assert_modelled(issued(forward), batch, cost.log_probs)


@pytest.mark.parametrize("weight", [True, False])
def test_token_log_probs_do_what_the_model_says(weight: bool, budget: int) -> None:
    batch = batch_of("hypo", weight=weight)
    with OperationMeter() as forward:
        logps = token_logprobs(batch.hidden, batch.weight, batch.host_targets, max_chunk_bytes=budget, impl="torch")
    total = logps.sum()
    backward = issued(total.backward)
    assert_modelled(forward, batch, cost.log_probs)
    assert_modelled(backward, batch, lambda work: cost.recomputed_backward(work, hidden=True, weight=weight))


def test_an_operation_takes_the_longer_of_its_flop_and_its_bytes() -> None:
    compute = Operation("a GEMM", read=5, written=5, flop=1000)
    memory = Operation("a pass", read=50, written=50)
    assert cost.floor([compute, memory], rate=100.0, bandwidth=10.0) == 10.0 + 10.0


@pytest.mark.parametrize(
    ("call", "read", "written"),
    [
        (lambda x, y: x + y, 48, 24),
        (lambda x, y: x.add_(y), 48, 24),
        (lambda x, y: x.copy_(y), 24, 24),
        (lambda x, y: x.zero_(), 0, 24),
        (lambda x, y: torch.add(x, y[:1], out=torch.empty(2, 3)), 24 + 12, 24),
        (lambda x, y: x.t().reshape(3, 2)[1:], 0, 0),  # views
        (lambda x, y: x[torch.tensor([1])], 8 + 12, 12),  # the rows picked, and their index
        (lambda x, y: y[:1].expand(4, 3) * 2.0, 12, 48),  # an expanded row is in memory once
    ],
)
def test_the_meter_counts_what_moves(call: Callable[[Tensor, Tensor], Any], read: int, written: int) -> None:
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    with OperationMeter() as meter:
        call(x, y)
    kept = [operation for operation in meter.operations if "lift" not in operation.name]
    assert (sum(o.read for o in kept), sum(o.written for o in kept)) == (read, written)


def test_the_table_is_a_command() -> None:
    arguments = ["--rows", "8192", "--vocab", "128256", "--width", "4096", "--tflops", "790", "--bandwidth", "4.3"]
    printed = subprocess.run(
        [sys.executable, "-m", "benchmarks.cost", *arguments, "--operations"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(name in printed for name in cost.SCHEDULES)
    assert max(map(len, printed.splitlines())) <= 120
