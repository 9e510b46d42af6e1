"""The reference's log-probs of the pairs: those of the step, computed once, read again, and never trusted blindly."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from resumed import INTERVALS, Killed, assert_same_run, die, metrics_of
from safetensors.torch import load_file, safe_open, save_file
from short_runs import LAST_LAYER, LORA, LORA_HEAD, recorded, slow_unless, steps
from torch.testing import assert_close

import hypo_train.model.reference_cache as cache
import hypo_train.train as loop
from hypo_train.build import precompute_ref_logps
from hypo_train.checkpoint.lock import LOCK_FILE
from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.data.rows import Pair
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.policy import Policy
from hypo_train.model.reference_cache import cache_key, pair_reference_logps, precompute_pays, splits_to_precompute
from hypo_train.model.tree_model import ModelError
from hypo_train.prepare import prepare
from hypo_train.train import train
from hypo_train.utils.hashing import tensor_digest

WAYS = {"full": {}, "lora": LORA, "lora, head": LORA_HEAD, "last layer": LAST_LAYER}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "logps"
    path.mkdir()
    return path


@pytest.fixture
def cached(settings, folder):
    """``cached(algorithm="dpo")`` is a config whose reference log-probs are precomputed, in a folder of its own."""
    return lambda **changes: settings(
        **{"algorithm": "dpo", "precompute_ref_log_probs": True, "ref_logps_cache_dir": str(folder), **changes}
    )


@pytest.fixture
def passes(monkeypatch):
    """The shapes of the trees that go through the reference from now on."""
    seen, original = [], Policy.reference

    def counted(self, tree, function, **keywords):
        seen.append(tuple(tree.input_ids.shape))
        return original(self, tree, function, **keywords)

    monkeypatch.setattr(Policy, "reference", counted)
    return seen


def logps_of(run, folder, *, rows=None, autocast=False, config=None):
    return pair_reference_logps(
        run.policy,
        run.plan.train_rows if rows is None else rows,
        config or run.config,
        batcher=run.batcher,
        device=run.accelerator.device,
        processes=run.processes,
        autocast=autocast,
        folder=folder,
        split="train",
        progress=False,
    )


def in_step(run, rows):
    """(rows, 2) as a step asks the reference for them."""
    tree = run.batcher.pairs(rows, []).to(run.accelerator.device)
    return run.policy.reference(tree, sequence_logprobs_call(tree, run.config)).view(2, -1).T


# The values


@pytest.mark.parametrize("way", WAYS)
def test_they_are_the_steps_own_in_the_order_of_the_rows(cached, folder, way):
    run = prepare(cached(**WAYS[way]))
    tiny.perturb(run.policy.trained_parameters().values())
    found = logps_of(run, folder)
    assert found.dtype == torch.float32
    assert len({row.num_tokens for row in run.plan.train_rows}) > 1, "batches by length mix the rows up"
    assert_close(found, in_step(run, run.plan.train_rows), rtol=1e-6, atol=1e-6)
    plain = [tiny.plain_logprob(tiny.new_model("llama"), row.prompt, row.chosen) for row in run.plan.train_rows]
    assert_close(found[:, 0].cpu(), torch.stack(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_on_one_batch_they_are_the_steps_own_bit_for_bit(cached, folder, bf16):
    run = prepare(cached(bf16=bf16, per_device_eval_batch_size=24))
    rows = sorted(run.plan.train_rows, key=lambda row: -row.num_tokens)
    with run.accelerator.autocast():
        expected = in_step(run, rows)
    assert torch.equal(logps_of(run, folder, rows=rows, autocast=bf16), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", slow_unless(["hypo"], ["dpo", "ipo", "hypo"]))
def test_cached_log_probs_keep_the_loss_and_gradients(cached, algorithm, way):
    # With a small epsilon, AdamW would blow the rounding of gradients near zero up to whole updates.
    shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-2}
    results = []
    for precompute in (True, False):
        config = cached(algorithm=algorithm, precompute_ref_log_probs=precompute, learning_rate=1e-2, **shape)
        run = recorded(config.model_copy(update=WAYS[way]))
        precompute_ref_logps(run, progress=False)
        assert (run.train_ref_logps is not None) is precompute
        steps(run, 1)  # away from the reference, where every margin is 0
        results.append((steps(run, 1, first=1), run.optimizer.gradients[1]))
    (metrics, gradients), (expected, others) = results
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, gradient in others.items():
        assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5)
    assert max(gradient.abs().max() for gradient in others.values()) > 1e-3


def test_cached_log_probs_keep_an_evaluations_metrics(cached):
    found = [
        train(
            cached(
                num_eval_rows=6, precompute_ref_log_probs=precompute, output_dir=f"{cached().output_dir}-{precompute}"
            ),
            progress=False,
        ).evaluation.metrics
        for precompute in (True, False)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5)
    assert found[0]["eval_rewards/margins"] != 0


@pytest.mark.parametrize("algorithm", ["dpo", "ipo"])
@pytest.mark.parametrize("way", WAYS)
def test_dpo_and_ipo_ask_the_reference_nothing_while_they_train(cached, passes, algorithm, way):
    run = recorded(cached(algorithm=algorithm, **WAYS[way]))
    precompute_ref_logps(run, progress=False)
    assert len(passes) == 6, "24 rows, 4 at a time"
    assert passes[0] == max(passes), "the longest first"
    steps(run, 3)
    assert len(passes) == 6


def test_hypo_asks_the_reference_for_its_samples_alone(cached, passes):
    run = recorded(cached(algorithm="hypo", num_generations=2))
    precompute_ref_logps(run, progress=False)
    del passes[:]
    trees, original = [], run.policy.reference
    run.policy.reference = lambda tree, *args, **kwargs: trees.append(tree) or original(tree, *args, **kwargs)
    steps(run, 1)
    assert [len(tree.cu_seqlens) - 1 for tree in trees] == [8], "4 prompts, 2 samples each, no pair"


# Weights that nothing needs any more


def test_without_held_out_rows_the_reference_is_freed(cached):
    run = prepare(cached())
    precompute_ref_logps(run, progress=False)
    assert run.policy.reference_parameters == {}
    with pytest.raises(RuntimeError, match="the reference was dropped"):
        in_step(run, run.plan.train_rows)


def test_with_held_out_rows_the_reference_is_kept(cached):
    config = cached(num_eval_rows=4, max_steps=6)
    assert train(config, progress=False).evaluation.metrics["eval_kl"] != 0
    run = prepare(config.model_copy(update={"output_dir": "unused"}))
    precompute_ref_logps(run, progress=False)
    assert {p.device for p in run.policy.reference_parameters.values()} == {CPU}


@pytest.mark.parametrize("changes", [{"algorithm": "hypo"}, {"precompute_ref_log_probs": False}], ids=str)
def test_a_reference_that_steps_ask_stays_where_they_are(cached, changes):
    run = prepare(cached(**changes))
    precompute_ref_logps(run, progress=False)
    assert {p.device for p in run.policy.reference_parameters.values()} == {run.accelerator.device}
    in_step(run, run.plan.train_rows)


# The file


def test_a_second_run_reads_the_same_bits_without_a_pass(cached, folder, passes, capsys):
    first = logps_of(prepare(cached()), folder)
    assert passes
    del passes[:]
    assert "reference log-probs of 24 pairs computed in" in capsys.readouterr().out
    again = logps_of(prepare(cached()), folder)
    assert not passes
    assert torch.equal(again, first)
    [file] = folder.iterdir()
    assert capsys.readouterr().out == f"train: reference log-probs of 24 pairs read from {file}\n"


def test_the_file_says_what_it_holds(cached, folder, saved_model):
    logps_of(prepare(cached()), folder)
    [file] = folder.iterdir()
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    assert metadata["key"] == file.stem
    assert (metadata["model"], metadata["rows"]) == (str(saved_model()), "24")
    assert metadata["torch"] == torch.__version__


@pytest.mark.parametrize("way", WAYS)
def test_what_training_moves_does_not_count(cached, way):
    run = prepare(cached(**WAYS[way]))
    before = cache_key(run.policy, run.plan.train_rows, run.config, autocast=False)
    tiny.perturb(run.policy.trained_parameters().values())
    assert cache_key(run.policy, run.plan.train_rows, run.config, autocast=False) == before


@pytest.mark.parametrize("way", WAYS)
def test_every_weight_and_buffer_of_the_reference_counts(cached, way):
    run = prepare(cached(**WAYS[way]))
    adapters = set(run.policy.trained_parameters()) if run.policy.is_peft else set()
    state = {name: tensor for name, tensor in run.policy.named_parameters() if name not in adapters}
    state |= dict(run.policy.named_buffers())
    state |= run.policy.reference_parameters
    assert any("inv_freq" in name for name in state), "a buffer that is saved nowhere"
    keys = {cache_key(run.policy, run.plan.train_rows, run.config, autocast=False)}
    for tensor in state.values():
        flat = tensor.detach().view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.full_like(kept, 9.0))
        keys.add(cache_key(run.policy, run.plan.train_rows, run.config, autocast=False))
        flat[-1] = kept
    assert len(keys) == 1 + len(state)
    assert cache_key(run.policy, run.plan.train_rows, run.config, autocast=False) in keys


def changed(pair, **parts):
    return replace(pair, **parts)


OTHER_ROWS = {
    "another token": lambda rows: [changed(rows[0], chosen=(*rows[0].chosen[:-2], 7, tiny.EOS)), *rows[1:]],
    "chosen and rejected exchanged": lambda rows: [
        changed(rows[0], chosen=rows[0].rejected, rejected=rows[0].chosen),
        *rows[1:],
    ],
    "a token moved over a border": lambda rows: [
        changed(rows[0], prompt=rows[0].prompt[:-1], chosen=(rows[0].prompt[-1], *rows[0].chosen)),
        *rows[1:],
    ],
    "another order": lambda rows: [rows[1], rows[0], *rows[2:]],
    "a row less": lambda rows: rows[:-1],
}


@pytest.mark.parametrize("change", OTHER_ROWS)
def test_other_tokens_are_computed_anew(cached, folder, passes, change):
    run = prepare(cached())
    rows = list(run.plan.train_rows)
    first = logps_of(run, folder, rows=rows)
    del passes[:]
    other = OTHER_ROWS[change](rows)
    assert rows[0].prompt != rows[1].prompt or rows[0].chosen != rows[1].chosen
    found = logps_of(run, folder, rows=other)
    assert passes
    assert not torch.equal(found, first[: len(found)]) or change == "a row less"
    assert_close(found, in_step(run, other), rtol=1e-6, atol=1e-6)


def test_the_place_of_a_row_in_its_split_does_not_count(cached, folder, passes):
    run = prepare(cached())
    logps_of(run, folder)
    del passes[:]
    logps_of(run, folder, rows=[replace(row, row=row.row + 100) for row in run.plan.train_rows])
    assert not passes


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"temperature": 0.7}, True),
        ({"bf16": True}, True),
        ({"bf16": True, "dtype": "bfloat16", **LAST_LAYER}, True),
        ({"beta": 0.5, "seed": 7, "learning_rate": 1.0, "algorithm": "ipo"}, False),
        ({"per_device_eval_batch_size": 3, "impl": "reference", "max_chunk_bytes": 60_000}, False),
    ],
    ids=str,
)
def test_settings_that_change_the_values_count_and_others_do_not(cached, changes, counts):
    keys = set()
    for settings in ({}, changes):
        run = prepare(cached(**settings))
        autocast = run.accelerator.mixed_precision == "bf16"
        keys.add(cache_key(run.policy, run.plan.train_rows, run.config, autocast=autocast))
        _reset_precision()
    assert len(keys) == 1 + counts


def _reset_precision():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-4}, {"seed": 1}, {"rope_theta": 500.0}], ids=str)
def test_another_model_counts_whatever_its_folder_is_called(cached, tmp_path, changes):
    keys = []
    for model in (tiny.new_model("llama"), tiny.new_model("llama"), tiny.new_model("llama", **changes)):
        run = prepare(cached(model=tiny.save(model, tmp_path / f"model-{len(keys)}")))
        keys.append(cache_key(run.policy, run.plan.train_rows, run.config, autocast=False))
    assert keys[0] == keys[1] != keys[2]


def torn(file):
    os.truncate(file, file.stat().st_size - 5)


def emptied(file):
    file.write_bytes(b"")


def a_byte_changed(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def text(file):
    file.write_text("not a tensor in sight, but longer than eight bytes")


def another_key(file):
    with safe_open(file, framework="pt") as content:
        metadata = {**content.metadata(), "key": "0" * 64}
    save_file({"logps": load_file(file)["logps"].clone()}, file, metadata)


def another_model(file):
    save_file({"weight": torch.zeros(3)}, file)


def too_few_rows(file):
    logps = load_file(file)["logps"][1:].clone()
    save_file({"logps": logps}, file, {"key": file.stem, "sha256": cache._digest(logps)})


def not_finite(file):
    logps = load_file(file)["logps"].clone()
    logps[3, 1] = torch.nan
    save_file({"logps": logps}, file, {"key": file.stem, "sha256": cache._digest(logps)})


@pytest.mark.parametrize(
    "damage", [torn, emptied, a_byte_changed, text, another_key, another_model, too_few_rows, not_finite]
)
def test_a_damaged_cache_file_is_named_and_replaced(cached, folder, passes, capsys, damage):
    run = prepare(cached())
    first = logps_of(run, folder)
    [file] = folder.iterdir()
    damage(file)
    capsys.readouterr()
    del passes[:]
    assert torch.equal(logps_of(run, folder), first)
    assert passes
    assert f"{file} is not used, and is computed anew: " in capsys.readouterr().out.splitlines()[0]
    assert torch.equal(load_file(file)["logps"], first.cpu())
    assert list(folder.iterdir()) == [file]


def test_log_probs_that_are_not_finite_are_refused_and_not_kept(cached, folder):
    run = prepare(cached())
    run.policy.reference_parameters["model.lm_head.weight"][7] = torch.nan
    with pytest.raises(ModelError, match=r"not finite in \d+ of 24 pairs, the first of them row \d+"):
        logps_of(run, folder)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_does_not_lose_the_pass(cached, folder, monkeypatch, capsys):
    run = prepare(cached())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_close(logps_of(run, folder), in_step(run, run.plan.train_rows), rtol=1e-6, atol=1e-6)
    assert "not kept: [Errno 28] No space left on device" in capsys.readouterr().out
    assert list(folder.iterdir()) == []


def test_runs_that_write_the_same_file_at_once_leave_a_whole_one(cached, folder):
    policy, path = prepare(cached()).policy, folder / f"{'a' * 64}.safetensors"

    def write(value):
        for _ in range(30):
            cache._write(path, torch.full((50_000, 2), value), policy)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, float(value)) for value in range(2)]
        seen = set()
        while not all(writer.done() for writer in writers):
            if path.exists():
                [value] = cache._read(path, 50_000).unique().tolist()
                seen.add(value)
        assert [writer.result() for writer in writers] == [None, None]
    assert seen == {0.0, 1.0}
    assert list(folder.iterdir()) == [path]


# The folder


def test_the_default_folder_is_the_users_cache(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder(settings()) == tmp_path / "xdg" / "hypo_train" / "reference_logps"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder(settings()) == Path.home() / ".cache" / "hypo_train" / "reference_logps"
    assert cache.cache_folder(settings(ref_logps_cache_dir="~/x")) == Path.home() / "x"


def test_a_read_only_folder_is_refused_before_loading(cached, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("hypo_train.build.load_policy", None)
    with pytest.raises(ConfigError, match=r"cannot be kept in '.*/file/logps' \(.*\): set ref_logps_cache_dir"):
        train(cached(ref_logps_cache_dir=str(tmp_path / "file" / "logps")), progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(cached, folder):
    folder.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        prepare(cached())


def test_a_run_that_keeps_nothing_needs_no_folder(cached, tmp_path):
    (tmp_path / "file").write_text("in the way")
    prepare(cached(ref_logps_cache_dir=str(tmp_path / "file" / "logps"), precompute_ref_log_probs=False))


# When it pays


def pairs(prompt, completion, count=3):
    return [Pair(i, (5,) * prompt, (6,) * completion, (7,) * completion) for i in range(count)]


@pytest.mark.parametrize(
    ("prompt", "completion", "passes", "shared", "pays"),
    [
        (100, 50, 0.5, 0, False),
        (100, 50, 1, 0, True),
        (100, 50, 1.9, 1, False),  # once 200, in the steps 100 an epoch
        (100, 50, 2, 1, True),
        (250, 48, 3.7, 1, True),
        (250, 48, 3.6, 1, False),
        (250, 48, 1, 0, True),
        (100, 50, 1.1, 0.25, False),  # once 200, in the steps 175 an epoch
        (100, 50, 1.2, 0.25, True),
    ],
)
def test_precomputing_pays_if_it_saves_tokens(prompt, completion, passes, shared, pays):
    assert precompute_pays(pairs(prompt, completion), passes, shared_prompts=shared) is pays


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        ({"algorithm": "dpo"}, 12, ["eval", "train"]),
        ({"algorithm": "ipo"}, 12, ["eval", "train"]),
        ({"algorithm": "dpo"}, 6, ["eval"]),  # half an epoch
        ({"algorithm": "hypo"}, 23, ["eval"]),
        ({"algorithm": "hypo"}, 24, ["eval", "train"]),
        ({"algorithm": "hypo", "kl_estimator": "exact"}, 24, []),
        ({"algorithm": "sft"}, 24, []),
        ({"algorithm": "hypo", "precompute_ref_log_probs": True}, 1, ["eval", "train"]),
        ({"algorithm": "dpo", "precompute_ref_log_probs": False}, 24, []),
    ],
    ids=str,
)
def test_each_split_is_precomputed_where_it_pays(changes, steps, expected):
    config = Config(
        model_name_or_path="m",
        dataset_name="d",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=steps,
        **changes,
    )
    assert splits_to_precompute(Plan(config, pairs(100, 50, 48), pairs(100, 50, 4))) == set(expected)
    assert splits_to_precompute(Plan(config, pairs(100, 50, 48), [])) == set(expected) - {"eval"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": "sft"},
            "precompute_ref_log_probs=true with algorithm=sft: its loss uses no reference log-probs",
        ),
        ({"kl_estimator": "exact"}, "precompute_ref_log_probs=true with kl_estimator=exact: that needs the reference"),
    ],
    ids=str,
)
def test_settings_that_cannot_use_it_conflict(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(model_name_or_path="m", dataset_name="d", precompute_ref_log_probs=True, **changes)


# Runs


RUN = {**INTERVALS, "algorithm": "dpo"}


def resumed(config):
    train(config.model_copy(update={"resume_from_checkpoint": "auto"}), progress=False)
    return config


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (Policy, "reference", 3),
        (os, "fsync", 1),
        pytest.param(os, "replace", 1, marks=pytest.mark.slow),
        pytest.param(Policy, "reference", 6, marks=pytest.mark.slow),
        (os, "replace", 2),
    ],
    ids=["in the pass", "in the write", "before the rename", "in the second pass", "before the second rename"],
)
@pytest.mark.parametrize("way", slow_unless(["lora"], ["full", "lora"]))
def test_a_run_killed_before_its_first_step_starts_again(cached, folder, monkeypatch, way, owner, name, nth):
    whole, killed = (cached(**RUN, **WAYS[way], output_dir=f"{cached().output_dir}-{n}") for n in ("whole", "killed"))
    train(whole, progress=False)
    for file in folder.iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        die(patch, owner, name, nth)
        with pytest.raises(Killed):
            train(killed, progress=False)
    left = [file.name for file in Path(killed.output_dir).iterdir()]
    assert left == [LOCK_FILE], "nothing that keeps the command from being given again"
    assert len(list(folder.iterdir())) == (1 if nth in (2, 6) else 0)
    train(killed, progress=False)
    assert_same_run(killed, whole)


@pytest.mark.parametrize("keep", [True, False], ids=["the files read", "another folder"])
@pytest.mark.parametrize("way", slow_unless(["last layer"], WAYS))
def test_a_run_killed_later_goes_on_with_the_same_bits(cached, folder, monkeypatch, way, keep):
    whole, killed = (cached(**RUN, **WAYS[way], output_dir=f"{cached().output_dir}-{n}") for n in ("whole", "killed"))
    train(whole, progress=False)
    with monkeypatch.context() as patch:
        die(patch, loop, "train_step", 9)
        with pytest.raises(Killed):
            train(killed, progress=False)
    assert metrics_of(killed)
    if not keep:
        folder = folder.with_name("another")
    resumed(killed.model_copy(update={"ref_logps_cache_dir": str(folder)}))
    assert len(list(folder.iterdir())) == 2, "one of each split: the weights that moved made no other key"
    assert_same_run(killed, whole)


def test_progress_is_printed_without_a_terminal(cached, folder, monkeypatch, capsys):
    monkeypatch.setattr(cache, "_SECONDS_PER_LINE", 0.0)
    train(cached(), progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" left") and "reference" in line]
    assert len(lines) == 6
    assert lines[1].startswith("train: reference log-probs  8/24 pairs  00:0")


# The fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 5, 2**14 - 1, 2**14, 2**20 + 2**14 + 3])
def test_a_fingerprint_sees_every_bit_and_where_it_is(dtype, size):
    values = torch.arange(size).mul(2654435761).bitwise_and(255)
    tensor = values.to(dtype) if dtype != torch.bool else values > 127
    found = {tensor_digest(tensor)}
    assert found == {tensor_digest(tensor.clone())}
    raw = tensor.view(torch.uint8)
    places = sorted({0, len(raw) // 2, len(raw) - 1}) if size else []
    for place in places:
        for bit in (1, 128):
            raw[place] ^= bit
            found.add(tensor_digest(tensor))
            raw[place] ^= bit
    assert len(found) == 1 + 2 * len(places)
    if size > 2**14:  # within a block, and from block to block
        for i, j in ((0, 1), (1, 2**14 + 5)):
            exchanged = tensor.clone()
            exchanged[i], exchanged[j] = tensor[j], tensor[i]
            assert (tensor_digest(exchanged) in found) is bool(tensor[i] == tensor[j])


def test_a_digest_does_not_depend_on_strides():
    tensor = torch.arange(12.0).view(3, 4)
    assert tensor_digest(tensor.T) == tensor_digest(tensor.T.contiguous()) != tensor_digest(tensor)
    assert tensor_digest(torch.zeros(3)) != tensor_digest(torch.zeros(4))


def test_a_fingerprint_does_not_change_between_versions():
    expected = "82d03c15e4869164feda87a4421a744435bb8c4ad52f1992b3b83f0627357374"
    assert tensor_digest(torch.arange(20_000)) == expected
