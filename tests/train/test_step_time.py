"""The arithmetic of a predicted step, by hand, and the lines that a dry run has of it."""

import pytest
import tiny
from transformers import AutoConfig

from hypo_train.config import ConfigError
from hypo_train.data.plan import load_plan
from hypo_train.dry_run import take_dry_run
from hypo_train.metrics.devices import DEVICES, Assumed, bandwidth
from hypo_train.metrics.flops import ModelFlops
from hypo_train.model.load import build_on_meta
from hypo_train.preflight import check, hub
from hypo_train.preflight.memory_estimate import Conditions
from hypo_train.preflight.step_time import Exchange, Speeds, exchanges, predict, work_of
from hypo_train.prepare import prepare
from hypo_train.sampling.registry import SAMPLERS
from hypo_train.utils.rank_share import RankShare

COMPUTE, MEMORY, LINKS = 1e9, 1e8, 1e7


@pytest.fixture
def predicted(settings):
    """``predicted(count, field=value)`` -> {phase: Part}, work and exchanges, of a tiny run at round speeds."""

    def of(count=1, overlaps=True, **changes):
        config = settings(**changes)
        tokenizer = tiny.word_tokenizer()
        plan, _ = load_plan(config, tokenizer, [tokenizer.eos_token_id], RankShare(0, count))
        architecture = AutoConfig.from_pretrained(config.model_name_or_path)
        trained = build_on_meta(config, architecture, device_type="cpu", autocast=False)
        conditions = Conditions("cpu", False, True, SAMPLERS["decode"])
        work = work_of(plan, conditions)
        exchanged = exchanges(trained, work.passes, count=count, sharded=config.fsdp, autocast=False)
        flops = ModelFlops.of_outline(trained, autocast=False)
        speeds = Speeds(COMPUTE, MEMORY, LINKS, overlaps)
        parts = predict(plan, trained, conditions, work, exchanged, flops, speeds)
        return {part.phase: part for part in parts}, work, exchanged

    return of


@pytest.mark.parametrize("changes", [{}, {"use_peft": True}, {"num_layers_unfrozen": 1}])
def test_a_meta_model_has_the_flops_of_the_real_model(settings, changes):
    config = settings(**changes)
    architecture = AutoConfig.from_pretrained(config.model_name_or_path)
    without = build_on_meta(config, architecture, device_type="cpu", autocast=False)
    assert ModelFlops.of_outline(without, autocast=False) == ModelFlops.of(prepare(config).policy)


def test_passes_cost_flops_and_sampling_costs_weight_reads(predicted):
    parts, work, exchanged = predicted(gradient_checkpointing=True)
    assert exchanged == []
    assert parts["backward"].seconds == pytest.approx(
        (parts["forward"].seconds - 2 * 37 * 32 * work.policy.rows / COMPUTE) + 2 * parts["forward"].seconds
    ), "twice a forward pass, and once more the layers of one"
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    matrices = 2 * per_layer + 37 * 32
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their width, bytes
    draw = work.draw
    assert (draw.sequences, draw.new_tokens) == (4 * 2, 8)
    read = 4 * matrices + per_token * (draw.prompt_tokens + draw.sequences * 8 / 2)
    assert parts["sample"].seconds == pytest.approx(8 * read / MEMORY, rel=0.02)
    assert parts["optimizer"].seconds == pytest.approx((3 + 4) * 4 * (2 * per_layer + 2 * 37 * 32) / MEMORY, rel=0.02)


def test_cached_pairs_leave_only_samples_to_the_reference(predicted):
    _, asked, _ = predicted(algorithm="hypo", precompute_ref_log_probs=False)
    _, known, _ = predicted(algorithm="hypo", precompute_ref_log_probs=True)
    assert asked.reference == asked.policy
    assert 0 < known.reference.rows < known.policy.rows
    parts, dpo, _ = predicted(algorithm="dpo", precompute_ref_log_probs=True)
    assert dpo.reference.tokens == 0
    assert dpo.passes.of_reference == 0
    assert "sample" not in parts


def test_gradient_traffic_overlaps_with_the_last_backward_pass(predicted):
    parts, _, [exchange] = predicted(2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    part = parts["backward"]
    assert exchange.sent(2) == exchange.whole
    assert part.hidden == pytest.approx(min(part.computing / 2, exchange.whole / LINKS))
    assert part.waiting + part.hidden == pytest.approx(exchange.whole / LINKS)


def test_only_the_gathers_of_layers_overlap_with_computation(predicted):
    parts, _, exchanged = predicted(2, fsdp=True, per_device_train_batch_size=2)
    sample, forward = (next(e for e in exchanged if e.phase == phase) for phase in ("sample", "forward"))
    assert parts["sample"].waiting == pytest.approx(sample.sent(2) / LINKS)
    assert parts["forward"].hidden == pytest.approx(min(forward.layers / 2 / LINKS, parts["forward"].computing))
    without, _, _ = predicted(2, False, fsdp=True, per_device_train_batch_size=2)
    assert {part.hidden for part in without.values()} == {0}


def test_an_all_reduce_sends_twice_the_bytes_of_a_gather():
    assert Exchange("forward", "gather", 100, 700).sent(8) == 700
    assert Exchange("backward", "reduce", 0, 800).sent(8) == 1400


def test_nodes_exchange_data_over_their_network_adapters():
    h100 = DEVICES["H100"]
    assert bandwidth(h100, 8, Assumed()) == 450e9
    assert bandwidth(h100, 9, Assumed()) == 8 * 50e9
    assert bandwidth(h100, 2, Assumed(devices_per_node=1, network=1e9)) == 1e9
    assert bandwidth(DEVICES["L40S"], 16, Assumed()) is None


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(hub.socket, "create_connection", refuse)


def page_of(config, *flags):
    dry_run, _ = take_dry_run(["--dry_run", *flags])
    return check(config, dry_run).page()


def test_the_report_shows_traffic_step_time_and_assumptions(settings):
    page = page_of(
        settings(fsdp=True, per_device_train_batch_size=1),
        "--dry_run_device",
        "H100",
        "--num_devices",
        "16",
        "--mfu",
        "0.35",
    )
    time = "\n".join(page[page.index("time") : page.index("disk")])
    assert "each of 16 devices sends" in time
    assert "a step takes about" in time
    assert "35% of 989 TFLOP/s" in time
    assert "2 nodes of 8, each sends at 80% of 400 GB/s" in time
    assert any("the host's work" in line and "no CUDA graphs" in line for line in page[page.index("not checked") :])


def test_without_a_named_device_there_are_bytes_and_no_seconds(settings):
    page = page_of(settings(), "--dry_run_device", "cpu", "--num_devices", "2")
    assert any(line.startswith("  each of 2 devices sends ") for line in page)
    assert not any("a step takes about" in line for line in page)
    assert any("how long a step takes: --dry_run_device A100, H100" in line for line in page)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mfu", "40"], "mfu='40': should be less than or equal to 1"),
        (["--mfu", "nan"], "mfu='nan': should be a finite number"),
        (["--devices_per_node", "0"], "devices_per_node='0': should be greater than 0"),
        (
            ["--network_gb_s", "fast"],
            "network_gb_s='fast': should be a valid number, unable to parse string as a number",
        ),
    ],
)
def test_an_assumption_that_cannot_be_is_one_line(flags, message):
    with pytest.raises(ConfigError) as caught:
        take_dry_run(["--dry_run", *flags])
    assert str(caught.value) == f"1 problem in the command line: {message}"
