"""A CUDA device without a GPU: tensors without memory, kernels that are compiled and not run.

The host's tensors are real, so that plans are computed; those of the device are fakes of ``FakeTensorMode``. Whatever
is asked of the device is recorded: launches, products, conversions, copies from the host. A read by the host raises,
because it would wait for the device, and because a fake has no values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from python_engine import apply, backward
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.compiled import resources

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
REGISTERS = 65_536  # of a multiprocessor
KB = 1024
# The maximum of one program.
SHARED_MEMORY = {(8, 0): 163 * KB, (8, 9): 99 * KB, (9, 0): 227 * KB, (10, 0): 227 * KB}
MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148, (8, 9): 128}
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)
# Operators whose result, or its shape, depends on values: the host waits for them.
READS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}


class HostRead(AssertionError):
    """The host reads a tensor of the device."""


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: its grid, and what its compiled form takes."""

    kernel: str
    grid: tuple[int, ...]
    variant: str
    shared: int  # bytes a program
    threads: int
    ptx: str = field(repr=False)


@dataclass(frozen=True)
class Product:
    """One GEMM of two matrices into fp32: the smallest alignment in bytes of its pointers and rows, and its shape."""

    shape: tuple[int, int, int]
    alignment: int
    accumulates: bool


@dataclass(frozen=True)
class Copy:
    """One copy from the host to the device."""

    num_bytes: int
    is_pinned: bool
    non_blocking: bool


@dataclass
class Record:
    """The kernel launches, matrix products, copies, casts and operators that ran on the fake device."""

    launches: list[Launch] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    converted: dict[int, int] = field(default_factory=dict)  # storage -> entries that were cast to another dtype
    operators: set[str] = field(default_factory=set)

    def times_converted(self, tensor: Tensor) -> float:
        """Return how often the entries of ``tensor`` were cast to another dtype."""
        return self.converted.get(storage_of(tensor), 0) / tensor.numel()


def storage_of(tensor: Tensor) -> int:
    """Return an identity of a tensor's memory."""
    return int(tensor.untyped_storage()._cdata)


class FakeCuda(FakeTensorMode):
    """Run operators on the host for real, and those on the device as fakes; record the latter."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.record = Record()
        self._pinned: set[int] = set()
        self._kept: list[Tensor] = []  # a storage's identity must not be used again

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        to_device = _is_cuda(kwargs.get("device"))
        if not fakes and not to_device:
            return self._on_host(func, args, kwargs, leaves)
        if fakes:
            _check(func, args, kwargs, fakes)
        if to_device and func is aten._to_copy.default and not fakes:
            self._copied(args[0], kwargs)
        if func in (aten.copy_.default, aten._to_copy.default) and len(leaves) - len(fakes) == 1 and len(fakes) == 1:
            self._copied(next(leaf for leaf in leaves if not isinstance(leaf, FakeTensor)), kwargs)
        self.record.operators.add(str(func))
        self._observe(func, args, kwargs)
        if func in (aten.mm.dtype_out, aten.addmm.dtype_out):
            return kwargs["out"]  # checked by _observe; torch's rules for fakes do not know them
        return super().dispatch(func, types, args, kwargs)

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any], leaves: list[Tensor]) -> Any:
        if func is aten.is_pinned.default:
            return storage_of(leaves[0]) in self._pinned
        if func is aten._pin_memory.default:
            out = args[0].clone()
            pinned = True
        else:
            pinned = bool(kwargs.pop("pin_memory", False))
            out = func(*args, **kwargs)
        if pinned:
            self._pinned.add(storage_of(out))
            self._kept.append(out)
        return out

    def _copied(self, source: Tensor, kwargs: dict[str, Any]) -> None:
        num_bytes = source.numel() * source.element_size()
        is_pinned = storage_of(source) in self._pinned
        self.record.copies.append(Copy(num_bytes, is_pinned, bool(kwargs.get("non_blocking"))))

    def _observe(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if func is aten._to_copy.default and isinstance(args[0], FakeTensor):
            dtype = kwargs.get("dtype")
            if dtype is not None and dtype != args[0].dtype:
                key = storage_of(args[0])
                self._kept.append(args[0])
                self.record.converted[key] = self.record.converted.get(key, 0) + args[0].numel()
        elif func in (aten.mm.dtype_out, aten.mm.out):
            self.record.products.append(_product(args[0], args[1], kwargs["out"], accumulates=False))
        elif func in (aten.addmm.dtype_out, aten.addmm.out):
            assert args[0] is kwargs["out"] or args[0].shape == kwargs["out"].shape
            self.record.products.append(_product(args[1], args[2], kwargs["out"], accumulates=True))


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _check(func: Any, args: Any, kwargs: dict[str, Any], fakes: list[FakeTensor]) -> None:
    """Raise HostRead if the host would wait for the device."""
    name = func.overloadpacket
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        raise HostRead(f"{func} without output_size")
    if func in READS:
        raise HostRead(f"{func} reads a tensor of the device")
    if func is aten._to_copy.default and kwargs.get("device") is not None and not _is_cuda(kwargs["device"]):
        raise HostRead(f"{func} to {kwargs['device']}")
    if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
        raise HostRead(f"{func} to the host")
    if name in (aten.index, aten.index_put, aten.index_put_) and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        raise HostRead(f"{func} with a mask")


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulates: bool) -> Product:
    assert a.dtype == b.dtype, f"a GEMM of {a.dtype} and {b.dtype}"
    assert out.dtype in (a.dtype, torch.float32), f"a GEMM of {a.dtype} into {out.dtype}"
    assert out.shape == (a.shape[0], b.shape[1]), (out.shape, a.shape, b.shape)
    alignments = [16]
    for x in (a, b, out):
        steps = [s for s, n in zip(x.stride(), x.shape, strict=True) if s != 1 and n > 1]
        for offset in (x.data_ptr(), *(step * x.element_size() for step in steps)):
            alignments.append(offset & -offset or 16)
    return Product((a.shape[0], b.shape[1], a.shape[1]), min(alignments), accumulates)


class FakeDriver:
    """A driver of a GPU that is not there, with the methods that Triton calls to compile a kernel."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = 10 * capability[0] + capability[1]

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps one cache of kernels a device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


_taken: dict[bytes, dict[str, int]] = {}  # resources by compiled kernel


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int], memory: int = 80 * 2**30) -> Iterator[FakeCuda]:
    """Make ``device="cuda"`` a device of this capability that keeps nothing and computes nothing."""
    mode = FakeCuda()
    properties = SimpleNamespace(
        name="fake",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=MULTIPROCESSORS[capability],
        total_memory=memory,
    )

    def getitem(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            _check_launch(mode.record, kernel.__name__, grid, compiled, capability)
            return compiled

        return launch

    def data_ptr(tensor: FakeTensor) -> int:
        return 2**20 + tensor.storage_offset() * tensor.element_size()  # allocations are aligned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(FakeTensor, "data_ptr", data_ptr)
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(torch.autograd.Function, "apply", classmethod(apply))
        patch.setattr(JITFunction, "__getitem__", getitem)
        previous = driver._active
        driver.set_active(FakeDriver(capability))  # type: ignore[arg-type]
        try:
            with mode:
                yield mode
        finally:
            driver._active = previous


def _check_launch(record: Record, name: str, grid: tuple[int, ...], compiled: Any, capability: tuple[int, int]) -> None:
    assert all(0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=False)), f"{name}: grid {grid}"
    cubin = compiled.asm["cubin"]
    if cubin not in _taken:
        _taken[cubin] = resources(cubin)
    taken = _taken[cubin]
    threads = 32 * compiled.metadata.num_warps
    assert taken["registers"] * threads <= REGISTERS, f"{name}: {taken} registers of {threads} threads"
    assert compiled.metadata.shared <= SHARED_MEMORY[capability], f"{name}: {compiled.metadata.shared} bytes"
    record.launches.append(
        Launch(name, tuple(grid), compiled.hash, compiled.metadata.shared, threads, compiled.asm["ptx"])
    )
