"""Compare the model of FLOP and bytes with the operations that torch issues.

The tests use the torch row step, with fp32 operands and with bf16 operands as on CUDA. V is much larger than D, so
the passes over the logits dominate the work that is not a GEMM, as in a real LM head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cost
from benchmarks.cost import TORCH, TRITON, Operation, Work
from benchmarks.issued import OperationMeter
from benchmarks.workloads import NUM_GENERATIONS, Batch, Workload, make_batch
from hypo_kernels import amx, fused_hypo_loss, gemm, sequence_logprobs, token_logprobs, workspace
from hypo_kernels.gradients import Gradients, Leaves
from hypo_kernels.head import LMHead

ROWS, VOCAB, WIDTH = 192, 1531, 24
SEQUENCE = 16  # rows, on average: a pair and a group have twice as many
# Operations over logits or hidden states also read and write a few numbers per row: index, target, maximum, sum,
# coefficient. In a call these are fewer bytes than one pass over a row: 1531 logits, or 24 bf16 values (48 bytes).
# An exact KL has them for the logits of two models, 168 bytes.
BYTES_PER_ROW_OF_LOGITS, BYTES_PER_ROW_OF_FEATURES = 200, 44

# ``max_chunk_bytes`` for all rows or for about a third of them: logits and four copies during the reduction.
BUDGETS = {"one chunk": 2**30, "several chunks": ROWS // 3 * VOCAB * 4 * 5}


@pytest.fixture(params=BUDGETS)
def budget(request: pytest.FixtureRequest) -> int:
    return BUDGETS[request.param]


class SixteenBitProducts(TorchDispatchMode):
    """Emulate GEMMs of 16-bit operands into fp32, which torch has on CUDA only. Meters inside see the GEMM itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            return func(*args, **(kwargs or {}))
        *added, a, b = [x for x in args if isinstance(x, Tensor)]
        out = kwargs["out"]
        return out.copy_(sum(added, a.float() @ b.float()))


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """The dtype of hidden states, weight and operands."""
    dtype: torch.dtype = getattr(torch, request.param)
    monkeypatch.setattr(amx, "is_supported", lambda: False)
    monkeypatch.setattr(gemm, "operand_dtype", lambda device, compute_dtype: compute_dtype)
    with SixteenBitProducts():
        yield dtype


def batch_of(
    task: str, dtype: torch.dtype, *, weight: bool, hidden: bool = True, counted: float = 1.0, rows: int = ROWS
) -> Batch:
    batch = make_batch(Workload(task, rows, VOCAB, WIDTH, dtype, SEQUENCE, counted), torch.device("cpu"))
    batch.hidden.requires_grad_(hidden)
    batch.weight.requires_grad_(weight)
    return batch


def loss(batch: Batch, budget: int, **options: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "num_pairs": batch.num_pairs,
        "num_generations": NUM_GENERATIONS,
        "ref_logps": batch.ref_logps if batch.ref_hidden is None else None,
        "ref_hidden": batch.ref_hidden,
        "ref_lm_head_weight": batch.ref_weight,
        **options,
    }
    return fused_hypo_loss(
        batch.hidden,
        batch.weight,
        batch.host_targets,
        batch.cu_seqlens,
        beta=0.1,
        kl_coef=0.05,
        max_chunk_bytes=budget,
        impl="torch",
        **arguments,
    ).loss


def exact_kl(batch: Batch, *, own_reference: bool) -> dict[str, Any]:
    """Return options of :func:`loss` for samples alone."""
    return {
        "num_pairs": 0,
        "kl_estimator": "exact",
        "ref_logps": None,
        "ref_hidden": batch.hidden.detach() + 0.1,
        "ref_lm_head_weight": None if own_reference else batch.weight.detach().clone(),
    }


def issued(call: Callable[[], Any]) -> OperationMeter:
    with OperationMeter() as meter:
        call()
    return meter


def assert_modelled(meter: OperationMeter, batch: Batch, model: Callable[[Work], Sequence[Operation]]) -> None:
    """Compare with the model; the number of chunks is derived from the GEMMs, because the model does not plan."""

    def modelled(chunks: int) -> Sequence[Operation]:
        rows = len(batch.counted_rows)
        return model(Work(rows, VOCAB, WIDTH, chunks, batch.hidden.dtype, row_step=TORCH, cuda=False))

    needed = sum(operation.is_gemm for operation in modelled(1))
    chunks, rest = divmod(len(meter.gemms), needed)
    assert (chunks > 0, rest) == (True, 0), "every chunk has the model's GEMMs"
    assert_equal(meter, modelled(chunks), ignored_rows=ROWS - len(batch.counted_rows))


def assert_equal(meter: OperationMeter, modelled: Sequence[Operation], ignored_rows: int = 0) -> None:
    """Compare GEMMs exactly, and the other passes up to a few numbers per row.

    The gradient of an ignored row is set to zero and scaled; the model omits that.
    """
    assert sum(gemm.flop for gemm in meter.gemms) == sum(operation.flop for operation in modelled)
    over_logits = [x for x in meter.rest if x.touches(VOCAB)]
    over_features = [x for x in meter.rest if x.touches(WIDTH) and not x.touches(VOCAB)]
    row_step = [x for x in modelled if x.name.startswith("row step")]
    others = [x for x in modelled if not x.is_gemm and x not in row_step]
    for side in ("read", "written"):

        def total(operations: Sequence[Any], side: str = side) -> int:
            return sum(getattr(operation, side) for operation in operations)

        assert total(meter.gemms) == total([x for x in modelled if x.is_gemm])
        assert 0 <= total(over_logits) - total(row_step) <= BYTES_PER_ROW_OF_LOGITS * ROWS
        few = BYTES_PER_ROW_OF_FEATURES * ROWS + ignored_rows * WIDTH * 4 * 2
        assert 0 <= total(over_features) - total(others) <= few


@pytest.mark.parametrize(("hidden", "weight"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("counted", [1.0, 0.5])
def test_a_loss_on_complete_groups_matches_the_model(
    hidden: bool, weight: bool, counted: float, budget: int, dtype: torch.dtype
) -> None:
    batch = batch_of("hypo", dtype, hidden=hidden, weight=weight, counted=counted)
    meter = issued(lambda: loss(batch, budget).backward())
    assert_modelled(meter, batch, lambda work: cost.group_closed(work, hidden=hidden, weight=weight))


def test_the_smaller_budget_takes_several_chunks(dtype: torch.dtype) -> None:
    batch = batch_of("hypo", dtype, weight=True)
    assert len(issued(lambda: loss(batch, BUDGETS["one chunk"])).gemms) == 3
    assert len(issued(lambda: loss(batch, BUDGETS["several chunks"])).gemms) > 3


def test_a_reference_with_its_own_weight_adds_log_probs(budget: int, dtype: torch.dtype) -> None:
    batch = batch_of("dpo", dtype, weight=True)
    meter = issued(lambda: loss(batch, budget).backward())
    assert_modelled(meter, batch, lambda work: cost.log_probs(work) + cost.group_closed(work, hidden=True, weight=True))


def test_a_reference_with_the_same_weight_shares_a_gemm() -> None:
    batch = batch_of("dpo", torch.float32, weight=False, rows=128)
    batch.cu_seqlens, batch.num_pairs = torch.tensor([0, 48, 64, 112, 128]), 2  # pairs of 96 rows and of 32
    together = issued(lambda: loss(batch, 2**30, ref_lm_head_weight=None).backward())
    whole = Work(128, VOCAB, WIDTH, 1, torch.float32, TORCH, cuda=False)
    assert len(together.gemms) == 2
    assert_equal(together, cost.group_closed_with_own_reference(whole))
    least = 1531 * 4 * 3 + 24 * 20  # a row of logits, its scratch, its features
    apart = issued(lambda: loss(batch, 100 * least + 64 * 128, ref_lm_head_weight=None).backward())
    assert len(apart.gemms) == 3 + 2


@pytest.mark.parametrize("own_reference", [True, False])
def test_an_exact_kl_with_a_frozen_head_matches_the_model(own_reference: bool, budget: int, dtype: torch.dtype) -> None:
    batch = batch_of("hypo", dtype, weight=False)
    options = exact_kl(batch, own_reference=own_reference)
    meter = issued(lambda: loss(batch, budget, **options).backward())
    assert_modelled(meter, batch, lambda work: cost.exact(work, weight=False, own_reference=own_reference))


def test_an_exact_kl_with_a_trained_head_matches_the_model(budget: int, dtype: torch.dtype) -> None:
    batch = batch_of("hypo", dtype, weight=True)
    options = exact_kl(batch, own_reference=False)
    meter = issued(lambda: loss(batch, budget, **options).backward())
    assert_modelled(meter, batch, lambda work: cost.exact(work, weight=True))


@pytest.mark.parametrize("weight", [True, False])
def test_groups_larger_than_a_chunk_are_computed_twice(weight: bool, dtype: torch.dtype) -> None:
    batch = batch_of("hypo", dtype, weight=weight)
    with pytest.raises(ValueError, match="pass at least") as error:
        loss(batch, 1)
    one_row = int(str(error.value).split("at least ")[1].split()[0])
    meter = issued(lambda: loss(batch, one_row).backward())
    assert_modelled(meter, batch, lambda work: cost.recomputed(work, hidden=True, weight=weight))


def test_log_probs_without_gradients_match_the_model(budget: int, dtype: torch.dtype) -> None:
    batch = batch_of("hypo", dtype, weight=True)

    def forward() -> None:
        with torch.no_grad():
            sequence_logprobs(
                batch.hidden, batch.weight, batch.host_targets, batch.cu_seqlens, max_chunk_bytes=budget, impl="torch"
            )

    assert_modelled(issued(forward), batch, cost.log_probs)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("weight", [True, False])
def test_token_log_probs_match_the_model(entropy: bool, weight: bool, budget: int, dtype: torch.dtype) -> None:
    batch = batch_of("hypo", dtype, weight=weight)
    inputs = (batch.hidden, batch.weight, batch.host_targets)
    with OperationMeter() as forward:
        found = token_logprobs(*inputs, return_entropy=entropy, max_chunk_bytes=budget, impl="torch")
    total = sum(x.sum() for x in found) if entropy else found.sum()
    backward = issued(total.backward)
    assert_modelled(forward, batch, lambda work: cost.log_probs(work, entropy=entropy))
    assert_modelled(
        backward, batch, lambda work: cost.token_backward(work, hidden=True, weight=weight, entropy=entropy)
    )


@pytest.mark.parametrize("in_one_product", [True, False])
def test_on_cuda_an_fp32_sum_is_scaled_and_cast_in_one_pass(in_one_product: bool) -> None:
    work = Work(ROWS, VOCAB, WIDTH, 1 if in_one_product else 2, row_step=TORCH)
    with FakeTensorMode():
        hidden, weight = (
            torch.empty(size, WIDTH, dtype=work.dtype, device="cuda", requires_grad=True) for size in (ROWS, VOCAB)
        )
        gradients = Gradients(
            Leaves(hidden, weight), [True, True, False, False, False], work.dtype, None, in_one_product=in_one_product
        )
        upstream = torch.empty((), device="cuda")
        meter = issued(lambda: gradients.scaled(upstream))
    modelled = [
        operation
        for operation in cost.group_closed(work, hidden=True, weight=True)
        if operation.name.startswith(("dHidden times upstream", "dW")) and not operation.is_gemm
    ]
    assert [x.written for x in meter.operations] == [x.written for x in modelled]
    assert [x.read for x in meter.operations] == [x.read + upstream.element_size() for x in modelled]


def test_only_triton_skips_scaling_by_an_upstream_of_1() -> None:
    def passes(**options: Any) -> list[str]:
        operations = cost.group_closed(Work(ROWS, VOCAB, WIDTH, **options), hidden=True, weight=True)
        return [operation.name for operation in operations if "upstream" in operation.name]

    both = ["dHidden times upstream", "dW times upstream"]
    assert passes(row_step=TRITON) == []
    assert passes(row_step=TRITON, upstream=0.5) == both
    assert passes(row_step=TORCH) == both
    assert passes(row_step=TRITON, chunks=2) == ["dW times upstream, narrowed"]


def test_exponentials_remove_the_passes_over_logits() -> None:
    def step(row_step: cost.RowStep) -> int:
        work = Work(ROWS, VOCAB, WIDTH, row_step=row_step)
        operations = list(work.reduced("statistics and gradients", row_step.gradients))
        return sum(x.bytes for x in operations if "hidden" not in x.name)

    work = Work(ROWS, VOCAB, WIDTH)
    operands = (ROWS + VOCAB) * WIDTH * 2
    # 4 bytes of a logit written and read twice, 2 of a gradient written; or those 2 and, a tile, a number twice.
    assert step(work.row_step) == operands + ROWS * VOCAB * (4 + 2 * 4 + 2)
    tiles = 6
    assert step(cost.EXPONENTIALS) == operands + 2 * ROWS * WIDTH * 2 + ROWS * (VOCAB * 2 + tiles * 2 * 4)


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("rows", [1024, 8192])
def test_the_models_chunks_equal_the_planned_ones(rows: int, buffers: int) -> None:
    with FakeTensorMode():
        head = LMHead(torch.empty(50257, 768, dtype=torch.bfloat16, device="cuda"))  # a vocabulary that is padded
    planned = workspace.max_rows(
        [head],
        torch.bfloat16,
        rows,
        2**30,
        scratch_bytes=lambda *_: 0,
        gradients_in_place=True,
        largest_group=1,
        buffers=buffers,
        buffer_dtype=torch.float32,
        fused_statistics=True,
        stacked=1,
    )
    assert cost.max_rows(Work(rows, 50257, 768), 2**30, buffers) == planned


def test_an_operation_takes_the_longer_of_flop_and_bytes() -> None:
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
def test_the_meter_counts_moved_bytes(call: Callable[[Tensor, Tensor], Any], read: int, written: int) -> None:
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    with OperationMeter() as meter:
        call(x, y)
    kept = [operation for operation in meter.operations if "lift" not in operation.name]
    assert (sum(o.read for o in kept), sum(o.written for o in kept)) == (read, written)


@pytest.mark.parametrize("row_step", cost.ROW_STEPS)
def test_the_command_prints_a_table(
    row_step: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--row-step {row_step} --rows 8192 --vocab 128256 --width 4096 --tflops 790 --bandwidth 4.3".split()
    monkeypatch.setattr(sys, "argv", ["cost", *arguments, "--operations"])
    cost.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in cost.SCHEDULES)
    assert max(map(len, printed.splitlines())) <= 120
