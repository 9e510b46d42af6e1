"""The computation of one rank of a process group; ``test_sharded.py`` runs it once for all of its tests.

``python sharded_runs.py RANK WORLD FOLDER`` saves this rank's results to ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contract import Batch, random_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hypo_kernels import LoRA, VocabShard, fused_hypo_loss, sequence_logprobs, token_logprobs

CPU = torch.device("cpu")
VOCAB, WIDTH, RANK = 67, 16, 3  # 67: two ranks get 34 and 33 entries
BOTH: dict[str, Any] = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2, "vocab": VOCAB, "width": WIDTH}
FULL_HEAD: dict[str, Any] = {"with_bias": True, "logit_softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole head": FULL_HEAD,
    "several chunks": {"max_chunk_bytes": 12_000},
    "groups larger than a chunk": {"max_chunk_bytes": 8_000},
    "reference from hidden states": {"with_ref_hidden": True, **FULL_HEAD},
    "exact KL": {"with_ref_hidden": True, "kl_estimator": "exact", **FULL_HEAD},
    "exact KL, groups larger than a chunk": {
        "with_ref_hidden": True, "kl_estimator": "exact", "max_chunk_bytes": 13_000,
    },
    "logits far apart": {"spread": 60.0},
    "samples of another policy": {"staleness": 1.0, **FULL_HEAD},
}  # fmt: skip
CERTAIN: dict[str, Any] = {"lead": 25.0, "spread": 0.3}
TENSORS_OF_THE_VOCABULARY = ("ref_lm_head_weight", "ref_bias")


def loss_run(batch: Batch, impl: str, shard: VocabShard | None) -> dict[str, Tensor]:
    """Return a call's results; with a shard, gradients are those of this rank's vocabulary."""
    mine = slice(None) if shard is None else slice(shard.start, shard.start + shard.size)
    weight = batch.weight.detach()[mine].clone().requires_grad_()
    bias = None if batch.bias is None else batch.bias.detach()[mine].clone().requires_grad_()
    hidden = batch.hidden.detach().clone().requires_grad_()
    gen = torch.Generator().manual_seed(5)
    a = (torch.randn(RANK, WIDTH, generator=gen) / WIDTH**0.5).requires_grad_()
    b = torch.randn(VOCAB, RANK, generator=gen)[mine].clone().requires_grad_()
    options = {k: v[mine] if k in TENSORS_OF_THE_VOCABULARY else v for k, v in batch.options.items()}
    out = fused_hypo_loss(
        hidden, weight, batch.targets, batch.cu_seqlens, bias=bias, lora=LoRA(a, b, 0.5), vocab_shard=shard,
        impl=impl, **options,
    )  # fmt: skip
    (out.loss * 1.7).backward()
    named = {"weight": weight, "bias": bias, "hidden": hidden, "A": a, "B": b}
    results = {"loss": out.loss.detach(), "logps": out.logps, "ref_logps": out.ref_logps, "kl": out.kl}
    return results | {f"gradient of {k}": v.grad for k, v in named.items() if v is not None and v.grad is not None}


def token_run(batch: Batch, impl: str, shard: VocabShard | None) -> dict[str, Tensor]:
    mine = slice(None) if shard is None else slice(shard.start, shard.start + shard.size)
    weight = batch.weight.detach()[mine].clone().requires_grad_()
    hidden = batch.hidden.detach().clone().requires_grad_()
    logps, entropies = token_logprobs(
        hidden, weight, batch.targets, return_entropy=True, vocab_shard=shard, impl=impl, max_chunk_bytes=20_000
    )
    (logps.sum() + 0.3 * entropies.square().sum()).backward()
    with torch.no_grad():
        sums = sequence_logprobs(hidden, weight, batch.targets, batch.cu_seqlens, vocab_shard=shard, impl=impl)
    return {
        "logps": logps.detach(), "entropies": entropies.detach(), "sums": sums, "gradient of hidden": hidden.grad,
        "gradient of weight": weight.grad,
    }  # fmt: skip


class Model(nn.Module):
    """A layer and a head whose loss is computed inside ``forward``, or whose head is handed out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        return token_logprobs(self.trunk(batch.hidden.detach()), self.lm_head.weight, batch.targets).sum()


def fsdp_run(rank: int, *, inside: bool) -> dict[str, Tensor]:
    """A step of FSDP2, each rank with data of its own; the head is read inside ``forward``, or as a DTensor."""
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.trunk, mesh=mesh)
    if inside:
        fully_shard(model, mesh=mesh)
    else:
        fully_shard(model.lm_head, mesh=mesh)
    batch = random_batch(**{**BOTH, "seed": rank}, device=CPU)
    if inside:
        model(batch).backward()
    else:
        hidden = model.trunk(batch.hidden.detach())
        assert isinstance(model.lm_head.weight, DTensor)
        token_logprobs(hidden, model.lm_head.weight, batch.targets).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        gradients[name] = parameter.grad.full_tensor()
    return gradients


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    shard = VocabShard.even(VOCAB)
    results["shard"] = (shard.start, shard.size)
    for impl in ("torch", "triton"):
        for name, case in CASES.items():
            batch = random_batch(**BOTH, **case, device=CPU)
            results[f"{impl} {name}"] = loss_run(batch, impl, shard)
        results[f"{impl} tokens"] = token_run(random_batch(**BOTH, device=CPU), impl, shard)
        results[f"{impl} certain tokens"] = token_run(random_batch(**BOTH, **CERTAIN, device=CPU), impl, shard)
    for inside in (True, False):
        results[f"fsdp {inside}"] = fsdp_run(rank, inside=inside)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
