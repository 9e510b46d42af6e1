"""The memory that a dry run foretells: counts that are exact, and the rest held against real steps."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import peak_extra_bytes
from hypo_train.build import precompute_ref_logps
from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.data.rows import Pair
from hypo_train.metrics.meter import Meter
from hypo_train.model.load import build_on_meta
from hypo_train.model.meta_pass import PassShape, num_bytes, simulate_memory
from hypo_train.preflight import memory
from hypo_train.preflight.architectures import known_architecture
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.memory_estimate import Conditions, estimate
from hypo_train.prepare import prepare
from hypo_train.sampling.registry import SAMPLERS
from hypo_train.step import train_step
from hypo_train.utils.rank_share import RankShare

# 7 million parameters, which weigh about as much as the activations of a step of 600 tokens.
MEDIUM = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}
LORA = {"use_peft": True, "lora_target_modules": "all-linear"}
LAST = {"num_layers_unfrozen": 2}
PYTHIA, PYTHIA_LARGE = "EleutherAI/pythia-1.4b-deduped", "EleutherAI/pythia-2.8b-deduped"
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
NUM_LAYERS = 4  # of runs in several processes: all 32 take eight times as long to simulate
TOLERANCE = 0.12  # measured over all of these cases: between -1 and +9 %


def config_of(**changes):
    return Config(model_name_or_path="-", dataset_name="-", **changes)


def outline_of(name, *, num_layers=None, **changes):
    architecture = known_architecture(name)
    architecture.num_hidden_layers = num_layers or architecture.num_hidden_layers
    return build_on_meta(config_of(**changes), architecture, device_type="cuda", autocast=True)


@pytest.mark.parametrize(
    ("name", "count"), [(PYTHIA, 1_414_647_808), (PYTHIA_LARGE, 2_775_208_960), (LLAMA, 8_030_261_248)]
)
def test_built_in_architectures_have_the_published_sizes(name, count):
    policy = outline_of(name)
    assert sum(p.numel() for p in policy.parameters()) == count
    assert {p.device.type for p in policy.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        # peft's choice of GPT-NeoX is query_key_value: r x (D + 3 D) in each layer.
        (PYTHIA, {"use_peft": True, "lora_r": 1024}, 24 * 1024 * 4 * 2048),
        # Four layers, the final norm and the untied head.
        (LLAMA, LAST | {"num_layers_unfrozen": 4}, 4 * 218_112_000 + 4096 + 128256 * 4096),
    ],
    ids=["1.4B LoRA", "8B last 4"],
)
def test_what_is_trained_is_counted_by_the_code_that_trains_it(name, changes, count):
    policy = outline_of(name, dtype="bfloat16", **changes)
    learned = policy.trained_parameters().values()
    assert sum(p.numel() for p in learned) == count
    assert {p.dtype for p in learned} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_simulation_leaves_the_meta_model_unchanged():
    policy = outline_of(PYTHIA, num_layers=4, **LAST).eval()
    before = {name: (id(p), p.device, p.grad) for name, p in policy.named_parameters()}
    attention = policy.base.config._attn_implementation
    held = simulate_memory(
        policy,
        PassShape.packed([8, 8], [[4, 4]] * 2),
        device_type="cuda",
        autocast=True,
        chunk_bytes=2**20,
        accumulates=False,
    )
    assert held.total > 0
    assert {name: (id(p), p.device, p.grad) for name, p in policy.named_parameters()} == before
    assert policy.base.config._attn_implementation == attention
    assert not policy.training


def cuda_pass(rows, **changes):
    policy = outline_of(PYTHIA, num_layers=4, use_peft=True, dtype="bfloat16", **changes)
    return simulate_memory(policy, rows, device_type="cuda", autocast=True, chunk_bytes=0, accumulates=False)


def test_what_is_computed_again_is_not_held():
    rows = PassShape.packed([128] * 4, [[64] * 4] * 4)
    none, selective, full = (cuda_pass(rows, gradient_checkpointing=kind).total for kind in (False, "selective", True))
    assert full < 0.5 * selective < 0.5 * none


def test_prompts_that_are_shared_are_held_once():
    shape = [256] * 4, [[32] * 4] * 4
    shared, separate = cuda_pass(PassShape.packed(*shape)), cuda_pass(PassShape.separate(*shape))
    tokens = 4 * (256 + 4 * 31), 4 * 4 * (256 + 31)
    assert separate.activations / shared.activations == pytest.approx(tokens[1] / tokens[0], rel=0.1)
    assert separate.casts == shared.casts


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """The folder of a Llama that is large enough for its tensors to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.new_config("llama", **MEDIUM))
    return tiny.save(model, tmp_path_factory.mktemp("medium"))


def medium_config(tmp_path, folder, **changes):
    rows = [
        {name: " ".join([row[name]] * repeats) for name, repeats in (("prompt", 12), ("chosen", 6), ("rejected", 6))}
        for row in tiny.pair_rows(8)
    ]
    lengths = {"max_prompt_length": 64, "max_completion_length": 24}
    settings = {"max_steps": 2, "rows": rows, "precompute_ref_log_probs": False, **lengths, **changes}
    return tiny.make_config(tmp_path, folder, **settings)


def measured_peak(config):
    """Bytes of tensors at the peak of a real second step: what the run holds, and what the step adds."""
    run = prepare(config)
    precompute_ref_logps(run, progress=False)
    run.model.train()
    train_step(run, 0, Meter())
    state = [x for of in run.optimizer.state.values() for x in of.values() if x.ndim]
    held = [*run.trained.parameters(), *run.trained.buffers(), *state]
    if config.has_reference:
        held += run.policy.reference_parameters.values()
    _, extra = peak_extra_bytes(lambda: train_step(run, 1, Meter()), torch.device("cpu"))
    return num_bytes(held) + extra, run


def estimated(config, run):
    trained = build_on_meta(config, run.trained.base.config, device_type="cpu", autocast=bool(config.bf16))
    conditions = Conditions("cpu", bool(config.bf16), run.trained.shares_prompts, SAMPLERS["decode"])
    return estimate(Plan(config, run.plan.train_rows, run.plan.eval_rows), trained, conditions)


FAST = [
    {"algorithm": "dpo"},
    {"algorithm": "sft", "gradient_checkpointing": True, **LORA},
    {"algorithm": "hypo", "gradient_checkpointing": "selective", **LAST},
]
# Each algorithm meets each kind of checkpointing and each way to train, and these two each other.
WAYS = ({}, LORA, LAST)
ALGORITHMS = (
    {"algorithm": "hypo"},
    {"algorithm": "dpo", "bf16": True},
    {"algorithm": "sft", "gradient_accumulation_steps": 2},
)
SLOW = [
    {**algorithm, "gradient_checkpointing": checkpointing, **WAYS[(i + j) % 3]}
    for i, algorithm in enumerate(ALGORITHMS)
    for j, checkpointing in enumerate((False, True, "selective"))
] + [{"algorithm": "hypo", "attn_implementation": "sdpa"}, {"algorithm": "dpo", "attn_implementation": "eager"}]


def name_of(changes):
    return " ".join(
        str(value) if name in ("algorithm", "attn_implementation") else f"{name}={value}"
        for name, value in changes.items()
    )


@pytest.mark.parametrize(
    "changes", [*FAST, *(pytest.param(changes, marks=pytest.mark.slow) for changes in SLOW)], ids=name_of
)
def test_the_estimate_is_near_the_peak_of_a_real_step(tmp_path, medium, changes):
    config = medium_config(tmp_path, medium, **{"gradient_checkpointing": False, **changes})
    peak, run = measured_peak(config)
    numbers = estimated(config, run)
    assert numbers.peak == pytest.approx(peak, rel=TOLERANCE), f"{numbers.peak / peak:.3f} {numbers.phases}"


# Several devices


@cache
def of_devices(count, *, num_layers=NUM_LAYERS, **changes):
    """The estimate for one of ``count`` processes that fine-tune layers of Llama-3-8B on rows of 300 tokens."""
    fixed = {"algorithm": "dpo", "precompute_ref_log_probs": False, "bf16": True, "max_steps": 1}
    config = config_of(**{**fixed, "fsdp": count > 1, **changes})
    rows = [Pair(0, (0,) * 200, (0,) * 50, (0,) * 50)] * 64
    plan = Plan(config, rows, [], rank_share=RankShare(0, count))
    architecture = known_architecture(LLAMA)
    architecture.num_hidden_layers = num_layers
    trained = build_on_meta(config, architecture, device_type="cuda", autocast=True)
    return estimate(plan, trained, Conditions("cuda", True, True, SAMPLERS["decode"])), trained


def test_sharding_divides_weights_gradients_and_optimizer_state():
    (alone, trained), (eighth, _) = of_devices(1), of_devices(8)
    for name in (
        "trained weights (float32)",
        "the reference's copy of trained weights",
        "AdamW's two moments (float32)",
    ):
        assert eighth.of(name).training == -(-alone.of(name).training // 8)
    # Gathered in bfloat16 at any time: embedding, head and two layers; and one layer's gradients, in fp32.
    config = trained.base.config
    outside = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    layer = (sum(p.numel() for p in trained.parameters()) - outside) // NUM_LAYERS
    assert eighth.of("gathered weights").training == 2 * outside + 2 * 2 * layer + 4 * layer
    assert alone.peak > 2 * eighth.peak


def test_zero_divides_optimizer_state_and_then_gradients():
    ddp, first, second = (of_devices(8, fsdp=False, zero_stage=stage)[0] for stage in (0, 1, 2))
    moments, weights = "AdamW's two moments (float32)", "trained weights (float32)"
    for zero in (first, second):
        assert zero.of(moments).training == -(-ddp.of(moments).training // 8)
        assert zero.of("ZeRO's copy of its shard of the weights").training == -(-ddp.of(weights).training // 8)
        assert zero.of(weights) == ddp.of(weights)
        assert zero.of("activations") == ddp.of("activations")
    name = "gradients (float32)"
    assert first.of(name).optimizer == ddp.of(name).optimizer == 4 * second.of(name).optimizer
    assert ddp.phases["optimizer"] > first.phases["optimizer"] > second.phases["optimizer"]


def test_ddp_holds_gradients_in_its_buckets_all_the_time():
    (alone, _), (ddp, _) = of_devices(1), of_devices(8, fsdp=False)
    size, gradients = alone.of("trained weights (float32)").training, "gradients (float32)"
    assert ddp.of(gradients)[1:] == (size, size, size)
    assert ddp.phases["training"] == alone.phases["training"] + size - alone.of(gradients).training


def test_what_is_too_much_for_a_device_in_ddp_is_advised_fsdp():
    def advice(numbers, **changes):
        return memory._advice_on_states(config_of(**changes), numbers)

    assert advice(of_devices(8, fsdp=False)[0])[0] == "fsdp: true"
    assert "fsdp: true" not in [*advice(of_devices(1)[0]), *advice(of_devices(8)[0], fsdp=True)]


def test_gathered_weights_that_exceed_the_device_are_refused(monkeypatch):
    numbers, config = of_devices(64, algorithm="hypo")[0], config_of(fsdp=True)
    room = numbers.of("gathered weights").sampling  # and the parts of everything else beside
    monkeypatch.setattr(memory, "available_memory", lambda device: room)
    with pytest.raises(ConfigError, match="try algorithm: dpo, because sampling gathers"):
        memory.check_memory(
            config, numbers, Conditions("cuda", True, True, SAMPLERS["decode"]), Findings(config), shows_table=False
        )


def test_if_sampling_gathers_all_weights_the_advice_says_so():
    numbers, _ = of_devices(64, algorithm="hypo")
    assert "algorithm: dpo, because sampling gathers all weights" in memory._advice(config_of(), numbers)
    assert "algorithm: dpo" not in memory._advice(config_of(), of_devices(1)[0])


def test_a_sharded_vocabulary_is_never_gathered_in_training():
    (whole, trained), (parts, _) = (of_devices(8, num_layers=32, vocab_parallel=cut) for cut in (False, True))
    head = trained.base.get_output_embeddings().weight
    together = "gathered weights"
    assert parts.of(together).sampling == whole.of(together).sampling
    assert whole.of(together).training - parts.of(together).training == 2 * 2 * head.numel()  # embedding and head
    # Nor is the head's gradient: a process has that of its part, and for a turn as much again.
    spared = whole.peak - parts.peak - (whole.of(together).training - parts.of(together).training)
    assert spared > 4 * head.numel() * 6 // 8


def test_a_processs_activations_are_those_of_its_own_rows():
    changes = {"per_device_train_batch_size": 2}
    assert of_devices(8, **changes)[0].of("activations") == of_devices(2, **changes)[0].of("activations")
