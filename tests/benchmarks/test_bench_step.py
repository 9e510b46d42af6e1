"""The step benchmark compares like with like: the same ids, weights, samples and gradients on both sides."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState

pytest.importorskip("trl", reason="needs trl: pip install -e '.[bench]'")

from benchmarks.grid import Grid
from benchmarks.step import material as material_module
from benchmarks.step import report, session, variants, waterfall
from benchmarks.step.cases import TUNINGS, Case, cases
from benchmarks.step.contender import Contender, Pool, caught_gradients, distance, move_from_reference
from benchmarks.step.material import EOS, PAD, Material, Missing, id_tokenizer, prepare_material
from benchmarks.step.memory import allocator, forget_peak, peak_bytes
from benchmarks.step.phases import REST, Hook, timed_phases
from benchmarks.step.process import TrialError, TrialProcess
from benchmarks.step.session import MeasuredCase, StepResult, StepSession
from benchmarks.step.trial import TOLERANCE, Trial, build
from benchmarks.step.variants import DPO, HYPO, HYPO_PLAIN, TRL_DPO, TRL_HYPO, Saving, Variant, without

CPU = torch.device("cpu")
BY_TUNING = {case.tuning: case for case in cases(CPU, Grid.QUICK)}
FULL = BY_TUNING["full"]
NO_CHECKPOINTING = "TRL DPO, precomputed, no checkpointing"
BY_NAME = {variant.name: variant for variant in variants.variants(FULL)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prevent downloads, telemetry and files in the user's cache; reset accelerate's precision after each test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def prepared(tmp_path: Path):
    return lambda case=FULL: prepare_material(case, tmp_path / "material", CPU)


def gradients(variant: Variant, material: Material, folder: Path) -> dict[str, torch.Tensor]:
    """Return the gradients of a step on given samples, from weights away from the reference's."""
    contender = build(variant, material, folder / variant.name)
    move_from_reference(contender)
    contender.tap.given = material.given_samples()
    with caught_gradients(contender) as found:
        contender.step()
    return found


def test_words_of_ids_are_tokenized_to_these_ids() -> None:
    tokenizer = id_tokenizer(100)
    assert tokenizer("t17 t4").input_ids == [17, 4]
    assert tokenizer("t17 t99 <eos>").input_ids == [17, 99, EOS]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)


@pytest.mark.parametrize("name", [TRL_DPO, TRL_HYPO, DPO, HYPO])
def test_the_ids_of_every_pair_reach_the_model_unchanged(name: str, prepared, tmp_path: Path) -> None:
    material = prepared()
    contender = build(BY_NAME[name], material, tmp_path)
    assert contender.seen_pairs() == {(pair.prompt, pair.chosen, pair.rejected) for pair in material.pairs}
    assert len(contender.seen_pairs()) == FULL.pairs


@pytest.mark.parametrize("name", [TRL_HYPO, HYPO])
def test_a_step_draws_all_tokens_from_the_given_prompts(name: str, prepared, tmp_path: Path) -> None:
    material = prepared()
    contender = build(BY_NAME[name], material, tmp_path)
    contender.step()
    assert contender.tap.tokens == FULL.pairs * FULL.num_generations * FULL.new_tokens
    assert contender.tap.prompts == {pair.prompt for pair in material.pairs}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_hypo_on_trl_has_the_gradient_of_our_hypo(tuning: str, prepared, tmp_path: Path) -> None:
    material = prepared(BY_TUNING[tuning])
    theirs = gradients(BY_NAME[TRL_HYPO], material, tmp_path)
    assert distance(gradients(BY_NAME[HYPO], material, tmp_path), theirs) < TOLERANCE[False].gradient
    without_kl = gradients(BY_NAME[TRL_DPO], material, tmp_path)
    assert distance(without_kl, theirs) > 0.1  # the KL term changes the gradient visibly


def test_only_trls_default_recomputes_activations(prepared, tmp_path: Path) -> None:
    material = prepared()
    default = build(BY_NAME[TRL_DPO], material, tmp_path / "default")
    other = build(BY_NAME[NO_CHECKPOINTING], material, tmp_path / "other")
    assert layer_forwards(default) == 2 * layer_forwards(other)


def layer_forwards(contender: Contender) -> int:
    """Count the calls of the policy's first layer in a step, recomputations included."""
    calls: list[int] = []
    layer = contender.trainer.model.model.layers[0].self_attn  # type: ignore[attr-defined]
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    contender.step()
    return len(calls)


def test_a_step_moves_no_weight_so_contenders_share_them(prepared, tmp_path: Path) -> None:
    material, pool = prepared(), Pool()
    contenders = [build(BY_NAME[name], material, tmp_path / name) for name in (TRL_HYPO, HYPO, DPO)]
    for contender in contenders:
        move_from_reference(contender)
        contender.step()
        pool.share(contender)
    before = {name: p.detach().clone() for name, p in contenders[0].parameters().items()}
    for contender in contenders:
        contender.step()
    for contender in contenders:
        assert contender.parameters().keys() == before.keys()
        for name, parameter in contender.parameters().items():
            assert parameter.data_ptr() == contenders[0].parameters()[name].data_ptr()
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-9)
        assert {t.data_ptr() for t in contender.moments().values()} == {
            t.data_ptr() for t in contenders[0].moments().values()
        }
        if contender is not contenders[2]:  # our DPO, its pairs' log-probs known, has let go of the reference
            assert {t.data_ptr() for t in contender.references().values()} == {
                t.data_ptr() for t in contenders[0].references().values()
            }


def test_right_variants_are_timed_and_wrong_ones_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = Variant("HyPO with another KL", "ours", "hypo", {"kl_coef": 0.5})
    short = Variant("HyPO with short samples", "ours", "hypo", {"max_new_tokens": 3})
    broken = Variant("HyPO that cannot start", "ours", "hypo", {"num_layers_unfrozen": 99})
    window = Variant("HyPO, 2 steps a draw", "ours", "hypo", {"rollout_steps": 2, "online_fraction": 0.5})
    trl = [BY_NAME[TRL_DPO], BY_NAME[NO_CHECKPOINTING], BY_NAME[TRL_HYPO]]
    everyone = [*trl, BY_NAME[HYPO], window, wrong, short, broken]
    monkeypatch.setattr(session, "variants", lambda case: everyone)
    measuring = StepSession(CPU, rounds=1, on_measured=lambda measured, seconds: None)
    measured = measuring.measure(FULL, [variant.name for variant in everyone])
    right = measured.results[HYPO]
    assert not right.wrong
    assert right.median == pytest.approx(sum(right.phases[0].values()), rel=0.05)
    assert {"sample", "reference", "forward", "backward", "optimizer"} <= right.phases[0].keys()
    assert right.peak_bytes > right.held_bytes > 0
    assert measured.times_gemms(right) > 1
    assert measured.results[window.name].flop < right.flop  # half as many prompts have samples
    assert not measured.results[window.name].wrong
    best = min(trl[:2], key=lambda variant: measured.results[variant.name].first_seconds)
    assert measured.results[TRL_HYPO].variant.settings == best.settings
    assert "gradient is off" in measured.results[wrong.name].wrong
    assert measured.seconds(wrong.name) is None
    drawn = FULL.pairs * FULL.num_generations
    assert measured.results[short.name].wrong == f"drew {drawn * 3} tokens, not {drawn * FULL.new_tokens}"
    assert "num_layers_unfrozen=99" in measured.results[broken.name].failed
    text = "\n".join(report.table(measured, CPU))
    assert "\n  TRL best: TRL DPO" in text
    assert f"WRONG    {wrong.name}" in text
    assert f"FAILED   {broken.name}" in text


def test_parked_weights_come_back_as_they_were(prepared, tmp_path: Path) -> None:
    trial = Trial(BY_NAME[HYPO], prepared(), tmp_path)
    trial.check()
    before = {name: p.detach().clone() for name, p in trial.contender.parameters().items()}
    trial.rest()
    assert sum(tensor.untyped_storage().nbytes() for _, _, tensor in trial.contender.held()) == 0
    trial.sample()
    assert trial.contender.held_bytes() > 0
    for name, parameter in trial.contender.parameters().items():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-9)


def test_equal_samples_leave_the_gradient_of_dpo(prepared, tmp_path: Path) -> None:
    material, some = prepared(), Variant("HyPO", "ours", "hypo")
    truth = gradients(BY_NAME[TRL_DPO], material, tmp_path)
    contender = build(some, material, tmp_path / "some")
    move_from_reference(contender)
    contender.tap.given = material.given_samples(equal=True)
    with caught_gradients(contender) as found:
        contender.step()
    assert distance(found, truth) < TOLERANCE[False].gradient


def test_a_process_that_dies_is_an_error_with_its_code(prepared, tmp_path: Path) -> None:
    trial = TrialProcess(BY_NAME[DPO], prepared(), tmp_path)
    trial._process.kill()
    with pytest.raises(TrialError, match="exit code -9: out of memory"):
        trial.check()


def test_the_peak_starts_again_when_it_is_forgotten() -> None:
    block = torch.ones(2**25)
    high = peak_bytes()
    del block
    forget_peak()
    assert peak_bytes() < high - 2**26


def test_the_allocator_is_named_with_its_variables() -> None:
    assert allocator({"HOME": "/", "MALLOC_ARENA_MAX": "1"}).endswith(", MALLOC_ARENA_MAX=1")
    assert allocator({"HOME": "/"}).endswith("malloc, no MALLOC_* variables")


def test_ratios_are_to_the_fastest_right_dpo_of_trl() -> None:
    fast = Variant("TRL DPO, fast", "TRL", "dpo")
    wrong = Variant("TRL DPO, wrong", "TRL", "dpo")
    measured = results(dpo=4.0, hypo=6.0)
    measured.results |= {
        TRL_DPO: StepResult(BY_NAME[TRL_DPO], samples=[20.0], peak_bytes=1),
        fast.name: StepResult(fast, samples=[10.0]),
        wrong.name: StepResult(wrong, samples=[1.0], wrong="far off"),
    }
    assert measured.best_trl_dpo is measured.results[fast.name]
    hypo = measured.results[HYPO]
    assert (measured.times_best(hypo), measured.times(hypo, DPO), measured.extra_seconds(hypo)) == (0.6, 1.5, 2.0)


def test_missing_real_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material_module, "SMOLLM_FOLDER", tmp_path / "nowhere")
    real = cases(CPU, Grid.FULL)[0]
    with pytest.raises(Missing, match="models/SmolLM2-135M-Instruct"):
        prepare_material(real, tmp_path / "material", CPU)


class Clocked:
    def outer(self) -> None:
        time.sleep(0.02)
        self.inner()

    def inner(self) -> None:
        time.sleep(0.03)


def test_nested_phases_count_once_and_add_up_to_the_step() -> None:
    work = Clocked()
    hooks = [Hook("outer", work, "outer"), Hook("inner", work, "inner")]
    before = time.perf_counter()
    with timed_phases(hooks, CPU) as seconds:
        began = time.perf_counter()
        work.outer()
        work.inner()
        time.sleep(0.01)
        ended = time.perf_counter()
    assert ended - began <= sum(seconds.values()) <= time.perf_counter() - before
    assert seconds["outer"] >= 0.05
    assert 0.03 <= seconds["inner"] < seconds["outer"]
    assert seconds[REST] >= 0.01
    assert not vars(work)  # the hooks are removed


def results(case: Case = FULL, **seconds: float) -> MeasuredCase:
    names = {"trl_dpo": TRL_DPO, "trl_hypo": TRL_HYPO, "plain": HYPO_PLAIN, "hypo": HYPO, "dpo": DPO}
    found = {names.get(key, without(key)): value for key, value in seconds.items()}
    return MeasuredCase(
        case,
        {
            name: StepResult(Variant(name, "ours", "hypo"), samples=[value], peak_bytes=1)
            for name, value in found.items()
        },
    )


def test_the_waterfall_shows_savings_and_their_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shared = Saving("rows", off={}), Saving("trunk", off={}, tunings=("last-k",))
    monkeypatch.setattr(variants, "SAVINGS", (rows, shared))
    measured = results(trl_hypo=100.0, plain=80.0, rows=45.0, trunk=70.0, hypo=30.0)
    found = waterfall.bars(measured)
    assert [(bar.start, bar.end) for bar in found] == [(0, 100), (100, 80), (80, 65), (65, 30), (0, 30)]
    assert [bar.is_total for bar in found] == [True, False, False, False, True]
    last_k = waterfall.bars(replace(measured, case=BY_TUNING["last-k"]))
    assert [(bar.start, bar.end) for bar in last_k][3:] == [(65, 25), (25, 30), (0, 30)]
    assert all(before.end == after.start for before, after in pairwise(last_k[:-1]))


def test_without_savings_the_waterfall_has_one_bar(tmp_path: Path) -> None:
    measured = results(trl_dpo=60.0, trl_hypo=100.0, hypo=30.0)
    assert [(bar.start, bar.end) for bar in waterfall.bars(measured)] == [(0, 100), (100, 30), (0, 30)]
    assert waterfall.draw(measured, "here", tmp_path / "plots" / "picture.png") == tmp_path / "plots" / "picture.png"
    assert (tmp_path / "plots" / "picture.png").stat().st_size > 0
    assert waterfall.draw(results(hypo=30.0), "here", tmp_path / "none.png") is None


def test_savings_are_switched_off_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (Saving("rows", off={"a": 1}), Saving("trunk", off={"b": 2}, tunings=("last-k",)), Saving("later", None))
    monkeypatch.setattr(variants, "SAVINGS", table)
    settings = {v.name: dict(v.settings) for v in variants.variants(BY_TUNING["last-k"])}
    assert settings[without("rows")] == {"a": 1}
    assert settings[without("trunk")] == {"b": 2}
    assert settings[HYPO_PLAIN] == {"a": 1, "b": 2}
    assert without("later") not in settings
    assert without("trunk") not in {v.name for v in variants.variants(FULL)}


def test_a_target_is_met_or_missed_by_its_ratio() -> None:
    real = cases(CPU, Grid.FULL)[0]
    measured = results(real, trl_dpo=50.0, trl_hypo=120.0, dpo=20.0, hypo=33.0)
    measured.results[TRL_DPO].variant = BY_NAME[TRL_DPO]
    lines = report.target_lines(measured)
    assert any(line.endswith("HyPO <= 0.65 x TRL's best DPO -- measured 0.66: MISSED") for line in lines)
    measured.results[HYPO].samples = [31.0]
    lines = report.target_lines(measured)
    assert any(line.endswith("HyPO <= 1.6 x DPO -- measured 1.55: met") for line in lines)
    measured.results[HYPO].wrong = "far off"
    assert "  target   HyPO <= 1.6 x DPO -- not measured" in report.target_lines(measured)
