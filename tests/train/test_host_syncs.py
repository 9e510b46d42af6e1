"""A step, its sampler aside, never makes the host wait for the device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hypo_train.build import precompute_ref_logps
from hypo_train.metrics.meter import Meter
from hypo_train.prepare import prepare
from hypo_train.step import train_step
from hypo_train.trees.tree import Tree

aten = torch.ops.aten

# What makes a value of the device known to the host, or the shape of a result depend on one.
READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class HostRead(AssertionError):
    """The host waits for the device."""


class DeviceTensors(TorchDispatchMode):
    """On a CPU, what would be on the device: the parameters and whatever is computed from them or moved there.

    Reading one of these raises HostRead; tensors of the host, which plan a step, may be read. What is not seen
    here is a blocking copy of the host's to the device: that takes a device.
    """

    def __init__(self, tensors):
        super().__init__()
        self.storages = {}  # id -> the storage, which keeps the id its own
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage

    def has(self, value):
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = any(self.has(value) for value in tree_leaves((args, kwargs)))
        if on_device:
            indices = args[1] if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else []
            masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
            fixed = function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
            if masked or (function in READS and not fixed):
                raise HostRead(f"{function} reads a tensor of the device")
        out = function(*args, **kwargs)
        if on_device:
            for value in tree_leaves(out):
                if isinstance(value, torch.Tensor):
                    self.add(value)
        return out


class DeviceMethods(TorchFunctionMode):
    """The same for what Python asks of a tensor without an operator."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in METHODS and self.device.has(args[0]):
            raise HostRead(f"{function.__name__} reads a tensor of the device")
        return function(*args, **(kwargs or {}))


class DrawnBefore:
    """A sampler whose completions are known before the step."""

    live = True
    takes_prompt_kv = True

    def sample(self, prompts, n, max_new_tokens, *, seed, prompt_kv=None, prompt_indices=None):
        completions = [[7 + i % 3, 9, 1][i % 3 :] for i in range(len(prompts) * n)]
        return SimpleNamespace(completions=lambda: completions, logprobs=None)

    def weights_changed(self, step):
        pass

    def release(self):
        pass


WAYS = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "lm_head"]},
    "last layer": {"num_layers_unfrozen": 1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "separate rows": {"attn_implementation": "sdpa"},
    "exact": {"kl_estimator": "exact"},
}
# Once a call of the decoder, and on no tree.
ASKED = "transformers asks whether the mask masks anything"
IN_TRANSFORMERS = pytest.mark.xfail(raises=(HostRead, RuntimeError), strict=True, reason=ASKED)
CASES = [
    *((algorithm, way) for algorithm in ("dpo", "hypo") for way in WAYS if way not in ("exact", "separate rows")),
    *(pytest.param(algorithm, "separate rows", marks=IN_TRANSFORMERS) for algorithm in ("dpo", "hypo")),
    ("hypo", "exact"),
    ("ipo", "full"),
    ("sft", "full"),
]


def a_run(settings, algorithm, way, **changes):
    run = prepare(settings(algorithm=algorithm, **{**WAYS[way], **changes}))
    run = replace(run, sampler=DrawnBefore())
    precompute_ref_logps(run, progress=False)
    run.model.train()
    return run


@pytest.mark.parametrize(("algorithm", "way"), CASES, ids=str)
def test_a_step_reads_nothing_from_the_device(settings, monkeypatch, algorithm, way):
    run, meter = a_run(settings, algorithm, way), Meter()
    known = [run.train_ref_logps] if run.train_ref_logps is not None else []
    device = DeviceTensors([*run.policy.parameters(), *run.policy.reference_parameters.values(), *known])
    moved = Tree.to

    def to(tree, where):
        tree = moved(tree, where)
        on_device = [tree.input_ids, tree.position_ids, tree.rows, tree.attention_mask]
        for tensor in on_device:
            if tensor is not None:
                device.add(tensor)
        return tree

    monkeypatch.setattr(Tree, "to", to)
    with device, DeviceMethods(device), run.timer.step():
        train_step(run, 0, meter)
    assert meter.read()["loss"] != 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("algorithm", "way"), CASES, ids=str)
def test_on_a_gpu_a_step_does_not_synchronise(settings, algorithm, way):
    run, meter = a_run(settings, algorithm, way, bf16=True), Meter()
    train_step(run, 0, meter)  # compiles and tunes, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        with run.timer.step():
            train_step(run, 1, meter)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.read()["loss"] != 0


# The tests above can fail


READERS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.max()),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_read_is_noticed(reader):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    device = DeviceTensors([weight])
    with device, DeviceMethods(device), pytest.raises(HostRead):
        READERS[reader](weight * 2)


def test_the_hosts_own_tensors_may_be_read():
    lengths = torch.tensor([2, 3])
    device = DeviceTensors([torch.zeros(2)])
    with device, DeviceMethods(device):
        assert int(lengths.sum()) == 5
        assert lengths[lengths > 2].tolist() == [3]
