"""Estimate the memory of a run, component by component, before it starts.

Weights, copies, gradients and the optimizer's state follow from the shapes of the model on the meta device. Activations
come from a simulation of the largest micro-batch (:mod:`hypo_train.model.meta_pass`), with samples of the maximal
length. Only tensors are counted: CUDA's context and unused memory of the allocator come on top. Evaluations are not
counted.

On a CPU, estimates were between 1 % below and 9 % above the peak of real steps of a small model (full, LoRA and last
layers, each kind of checkpointing, fp32 and bf16). On CUDA nothing has been compared yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from hypo_kernels import workspace
from hypo_train.data.plan import Plan
from hypo_train.data.rows import Example, Pair
from hypo_train.model.meta_pass import PassShape, PeakMemory, num_bytes, simulate_memory, simulate_prompt_memory
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import bytes_in_4_bits, quantizable
from hypo_train.model.reference_cache import splits_to_precompute
from hypo_train.model.reward_model import RewardModel
from hypo_train.optim import footprint
from hypo_train.preflight.sharded_sizes import divided, gathered_bytes, zero_bytes
from hypo_train.sampling.decode.branches import num_slots
from hypo_train.sampling.decode.cuda_graphs import bucket
from hypo_train.sampling.decode.sampler import copy_to_decode_from, prefill_tokens
from hypo_train.sampling.merged_weights import MergedWeights
from hypo_train.sampling.registry import SamplerEntry

DeviceType = Literal["cuda", "cpu"]

GATHERED = "gathered weights"
_REWARD_MODEL = "the reward model"  # not sharded
# Each logit is held as the head gives it, divided by the temperature, as a probability, and in an fp64 sum.
_BYTES_PER_SAMPLED_LOGIT = 4 + 4 + 4 + 8


@dataclass(frozen=True)
class Conditions:
    """Settings of the computation that memory depends on."""

    device_type: DeviceType
    autocast: bool  # compute under bfloat16
    shares_prompts: bool  # the model runs trees
    sampler: SamplerEntry | None  # draws a step's samples; None for a reward model

    def prompts_run_first(self, plan: Plan) -> bool:
        """Return whether the sampler reuses the keys and values of the training pass over the prompts."""
        takes_prompt_kv = self.sampler is not None and self.sampler.prompt_kv
        return plan.may_run_prompts_first and takes_prompt_kv and self.shares_prompts


class Component(NamedTuple):
    """The bytes of one kind of tensor in each phase: sampling, a micro-batch's passes, and the optimizer step."""

    name: str
    sampling: int
    training: int
    optimizer: int


@dataclass(frozen=True)
class Estimate:
    """The memory of a run in each phase of a step."""

    components: list[Component]
    draws_samples: bool
    kv_of_a_prompt: int  # bytes; on CUDA prompts are decoded in several batches if memory needs it
    kv: int
    processes: int = 1  # of the run

    @property
    def phases(self) -> dict[str, int]:
        """Return the bytes of all components in each phase of a step."""
        names = ("sampling", "training", "optimizer") if self.draws_samples else ("training", "optimizer")
        return {name: sum(getattr(part, name) for part in self.components) for name in names}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def least(self) -> int:
        """Return the peak if the prompts of a step are decoded one by one."""
        phases = self.phases
        if "sampling" in phases:
            phases["sampling"] -= self.kv - self.kv_of_a_prompt
        return max(phases.values())

    def of(self, name: str) -> Component:
        return next(part for part in self.components if part.name == name)


def estimate(
    plan: Plan, trained: Policy | RewardModel, conditions: Conditions, *, reward_model: Any = None
) -> Estimate:
    """Estimate the memory of one process on its device. Memory of vLLM is not included.

    Args:
        trained: on the meta device, as :func:`hypo_train.model.load.build_on_meta` makes it.
        reward_model: a module on the meta device.
    """
    config, parameters = plan.config, list(trained.parameters())
    learned = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    size = num_bytes(learned)
    peak = _training_pass(plan, trained, conditions)
    draws = _sampling(plan, trained, conditions)
    kept_draws = draws if config.keep_sampling_memory else _Draws()
    optimizer = footprint(
        config.optim,
        trained.trained_parameters().items(),
        roles=trained.parameter_roles,
        device_type=conditions.device_type,
    )
    always = [
        (f"frozen weights ({config.dtype})", num_bytes([*frozen, *trained.buffers()]) if frozen else 0),
        ("trained weights (float32)", size),
        ("the reference's copy of trained weights", _reference_bytes(plan, trained, conditions.device_type)),
        (_REWARD_MODEL, 0 if reward_model is None else num_bytes(reward_model.parameters())),
    ]
    packed = [p for p in quantizable(trained.base) if not p.requires_grad] if config.load_in_4bit else []
    if packed:
        in_4_bits = sum(bytes_in_4_bits(p.numel(), nested=config.use_bnb_nested_quant) for p in packed)
        always[0] = (
            "frozen weights (4 bits, the rest " + config.dtype + ")",
            always[0][1] - num_bytes(packed) + in_4_bits,
        )
    count = plan.world_size if config.fsdp else 1
    always = [(name, number if name == _REWARD_MODEL else divided(number, count)) for name, number in always]
    gathered = (0, 0)
    if count > 1:
        gathered = gathered_bytes(trained, autocast=conditions.autocast, vocab_parallel=config.vocab_parallel)
    gradients, changing = divided(peak.gradients, count), divided(size, count)
    state, temporary = divided(optimizer.state, count), divided(optimizer.temporary, count)
    zero, in_buckets = None, 0
    if config.zero_stage and plan.world_size > 1:
        zero = zero_bytes(
            config.zero_stage,
            plan.world_size,
            trained=size,
            gradients=peak.gradients,
            state=optimizer.state,
            temporary=optimizer.temporary,
        )
        gradients, changing, state, temporary = zero.gradients, zero.changing_gradients, zero.state, zero.temporary
    elif plan.world_size > 1 and not config.fsdp:
        in_buckets, gradients = size, size  # DDP makes buckets at once, and gradients are views of them
    unpacked = max((num_bytes([p]) for p in packed), default=0)
    components = [
        *(Component(name, number, number, number) for name, number in always),
        Component(optimizer.what, state, state, state),
        Component("ZeRO's copy of its shard of the weights", *[zero.weights if zero else 0] * 3),
        Component("gradients (float32)", in_buckets, gradients, changing),
        Component("ZeRO's bucket of gradients", 0, *[zero.bucket if zero else 0] * 2),
        Component(GATHERED, *gathered, 0),
        # Sharded weights are gathered in the compute dtype already.
        Component("autocast's copies of weights (bfloat16)", 0, peak.casts if count == 1 else 0, 0),
        Component("activations", draws.activations, peak.activations + peak.temporary, 0),
        Component("the loss: a chunk of logits and gradients", 0, peak.loss, 0),
        Component("one layer's weights, dequantized", unpacked, unpacked, 0),
        *([] if count > 1 else [Component("the sampler's copy of weights", draws.weights, *[kept_draws.weights] * 2)]),
        Component("the sampler's keys and values", draws.kv, kept_draws.kv, kept_draws.kv),
        Component("the optimizer's temporaries", 0, 0, temporary),
    ]
    present = [part for part in components if any(part[1:])]
    return Estimate(present, config.draws_samples, draws.kv_of_a_prompt, draws.kv, plan.world_size)


def _reference_bytes(plan: Plan, trained: Policy | RewardModel, device_type: DeviceType) -> int:
    """Return the bytes of the reference's copies on the training device; they are on the CPU if no step uses them."""
    config = plan.config
    if not isinstance(trained, Policy) or not config.has_reference:
        return 0
    precomputed = splits_to_precompute(plan)
    used_in_steps = config.draws_samples or "train" not in precomputed
    used_in_evaluations = device_type == "cpu" and bool(plan.eval_rows)
    return num_bytes(trained.reference_parameters.values()) if used_in_steps or used_in_evaluations else 0


def _training_pass(plan: Plan, trained: Policy | RewardModel, conditions: Conditions) -> PeakMemory:
    """Return the peak of the run's largest micro-batch, forward and backward."""
    largest = plan.largest_micro_batch
    rows = [plan.train_rows[i] for i in largest.rows]
    prompts = [len(row.prompt) for row in rows]
    branches = [branch_lengths(plan, row, online=i < largest.num_online) for i, row in enumerate(rows)]
    shape = (PassShape.packed if conditions.shares_prompts else PassShape.separate)(prompts, branches)
    peak = simulate_memory(
        trained,
        shape,
        device_type=conditions.device_type,
        autocast=conditions.autocast,
        chunk_bytes=_chunk_bytes(plan, trained, shape.counted, max(map(sum, branches)), conditions),
        accumulates=not plan.one_micro_batch,
        parts=_parts(plan),
    )
    if conditions.prompts_run_first(plan) and conditions.device_type == "cuda":
        # Attention of the branches keeps another copy of the prompts' keys and values.
        again = sum(prompts) * kv_bytes_per_token(trained, conditions.autocast)
        return PeakMemory(peak.casts, peak.activations + again, peak.loss, peak.gradients, peak.temporary)
    return peak


def _parts(plan: Plan) -> int:
    """Return the number of shards of the vocabulary."""
    return plan.world_size if plan.config.vocab_parallel else 1


def branch_lengths(plan: Plan, row: Any, *, online: bool) -> list[int]:
    """Return the tokens of each completion of a row. An online row also has samples, of the maximal length."""
    if isinstance(row, Example):
        return [len(row.completion)]
    lengths = [len(row.chosen), len(row.rejected)] if isinstance(row, Pair) else []
    if plan.config.spec.trains_reward_model:
        return [length + 1 for length in lengths]  # one more token, whose hidden state gives the score
    return lengths + ([plan.max_new_tokens] * plan.config.num_generations if online else [])


def _chunk_bytes(
    plan: Plan, trained: Policy | RewardModel, counted: int, largest_group: int, conditions: Conditions
) -> int:
    """Return the bytes of the temporaries in one call of the loss."""
    if isinstance(trained, RewardModel):
        return 0
    weight, device = trained.head().weight, torch.device(conditions.device_type)
    return workspace.estimated_bytes(
        weight.dtype,
        divided(weight.shape[0], _parts(plan)),
        weight.shape[1],
        counted,
        device=device,
        compute_dtype=torch.bfloat16 if conditions.autocast else torch.float32,
        max_chunk_bytes=plan.config.max_chunk_bytes or _default_budget(device),
        largest_group=largest_group,
        buffers=2 if plan.config.kl_estimator == "exact" else 1,
    )


def _default_budget(device: torch.device) -> int:
    """Return the loss's default budget; the smallest one for a CUDA device that is not here."""
    is_here = device.type != "cuda" or torch.cuda.is_available()
    return workspace.default_budget(device) if is_here else workspace.DEFAULT_BYTES


class _Draws(NamedTuple):
    """The bytes that sampling takes in a step."""

    weights: int = 0
    kv: int = 0
    kv_of_a_prompt: int = 0
    activations: int = 0


def _sampling(plan: Plan, trained: Policy | RewardModel, conditions: Conditions) -> _Draws:
    device_type, autocast = conditions.device_type, conditions.autocast
    kind = None if conditions.sampler is None else conditions.sampler.memory
    if kind is None or not isinstance(trained, Policy) or not plan.config.draws_samples:
        return _Draws()
    config, per_token = plan.config, kv_bytes_per_token(trained, autocast)
    n, new = config.num_generations, plan.max_new_tokens
    window = min(config.rollout_steps, plan.total_steps)
    count = -(-math.ceil(config.online_fraction * plan.batch_size * window) // plan.world_size)
    longest = max(len(row.prompt) for row in plan.train_rows)
    weights = _merged_bytes(trained, device_type, autocast, new) if kind == "decode" else 0
    if kind == "decode":
        width = bucket(longest) if device_type == "cuda" else longest
        of_a_prompt = num_slots(width, n * new) * per_token
        prefilled = min(count, max(1, prefill_tokens(device_type) // longest))
    else:
        of_a_prompt, prefilled = n * (longest + new) * per_token, count * n
    logits = count * n * trained.head().weight.shape[0] * _BYTES_PER_SAMPLED_LOGIT
    options: dict[str, Any] = {"device_type": device_type, "autocast": autocast}
    if conditions.prompts_run_first(plan):
        kept = simulate_prompt_memory(trained, [longest] * count, **options, gradients=True).total
        activations = kept + max(count * longest * per_token, logits)
    else:
        peak = simulate_prompt_memory(trained, [longest] * prefilled, **options, gradients=False)
        prefill = peak.total - (peak.casts if weights else 0)  # the copy has the compute dtype, so nothing is cast
        activations = max(prefill + prefilled * longest * per_token, logits)
    return _Draws(weights, count * of_a_prompt, of_a_prompt, activations)


def _merged_bytes(policy: Policy, device_type: DeviceType, autocast: bool, max_new_tokens: int) -> int:
    """Return the bytes of the sampler's copy of the weights, if it makes one."""
    compute = torch.bfloat16 if autocast else torch.float32
    needed, dtype = copy_to_decode_from(policy.model, compute, device_type, max_new_tokens=max_new_tokens)
    return MergedWeights(policy.model, dtype).nbytes() if needed else 0


def kv_bytes_per_token(trained: Policy | RewardModel, autocast: bool) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config = trained.base.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers * 2 * kv_heads * head_dim * (2 if autocast else 4)
