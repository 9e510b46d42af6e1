"""The demo: its world, its preference pairs, its table and, in miniature, the whole of it."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypo_train.cli import main
from hypo_train.demo import command, report, stages, world
from hypo_train.metrics.log import read_metrics


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    world.save_new_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(untrained):
    return AutoTokenizer.from_pretrained(untrained)


PROMPT = "a review of the cafe in york by anna :"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("the staff was friendly and the coffee was fresh .", 2),
        ("the staff was very rude but i loved the music .", 0),
        ("the price was usual , also we hated the room .", -1),
        ("the room was small and the floor was rather old .", 0),
        ("i enjoyed the view and we regretted the price and the light was dull .", -1),
    ],
)
def test_the_reward_is_kind_words_less_unkind_ones(completion, expected):
    assert world.reward(PROMPT, completion) == expected


def test_every_word_of_the_world_is_a_token_of_its_own(tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        for text in (world.prompt(rng), world.review(rng)):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)
            assert tokenizer.decode(ids) == text


def test_prompts_and_reviews_fit_in_their_limits(tokenizer):
    rng = random.Random(0)
    prompts = [world.prompt(rng) for _ in range(500)]
    reviews = [world.review(rng) for _ in range(2000)]
    assert max(len(tokenizer(text).input_ids) for text in prompts) <= world.MAX_PROMPT_TOKENS
    assert max(len(tokenizer(text).input_ids) for text in reviews) < world.MAX_COMPLETION_TOKENS, "with room for EOS"


def test_reviews_are_kind_and_unkind_and_partly_uncovered():
    rng = random.Random(0)
    reviews = [world.review(rng) for _ in range(1000)]
    rewards = [world.reward(PROMPT, review) for review in reviews]
    assert min(rewards) < -1
    assert max(rewards) > 1
    assert abs(sum(rewards) / len(rewards)) < 0.5
    assert 0.05 < sum(map(world.is_covered, reviews)) / len(reviews) < 0.95


def test_a_review_is_covered_if_it_keeps_to_the_covered_subjects():
    assert world.is_covered("the staff was rude and the coffee was great .")
    assert not world.is_covered("the staff was rude and the music was great .")


def test_the_model_has_a_million_parameters_and_fits_a_row(untrained, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(untrained)
    assert 5e5 < model.num_parameters() < 2e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= world.MAX_PROMPT_TOKENS + world.MAX_COMPLETION_TOKENS
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", -1),
        ("great great great", -1),
        ("the staff was friendly and great .", 0),  # the second clause is none
        ("the staff was friendly friendly .", -1),
        ("the staff was friendly and we loved the room", 2),  # cut before its full stop
    ],
)
def test_a_broken_clause_costs_one(completion, expected):
    assert world.reward(PROMPT, completion) == expected


def test_a_reader_takes_in_only_so_many_clauses():
    for count in range(1, world.CLAUSES_READ + 4):
        review = " and ".join(["the staff was friendly"] * count) + " ."
        assert world.reward(PROMPT, review) == min(count, world.CLAUSES_READ)


# Pairs

KIND, UNKIND = "the staff was friendly .", "the staff was rude ."


def test_pairs_are_labelled_by_bradley_terry_on_the_true_reward():
    rng, draws = random.Random(0), 8000
    # Whichever comes first: the kind one is worth 2 more.
    for texts in ([KIND, UNKIND], [UNKIND, KIND]):
        kind_is_chosen = 0
        for _ in range(draws):
            row = stages._labelled(PROMPT, texts, rng)
            assert {row["chosen"], row["rejected"]} == {f" {KIND}", f" {UNKIND}"}  # behind a prompt without a space
            assert row["prompt"] == PROMPT
            kind_is_chosen += row["chosen"] == f" {KIND}"
        expected = 1 / (1 + math.exp(-2))
        error = math.sqrt(expected * (1 - expected) / draws)
        assert abs(kind_is_chosen / draws - expected) < 4 * error


@pytest.mark.parametrize(
    "texts",
    [
        [KIND, KIND],
        [KIND, ""],
        [KIND, "the music was great ."],
        ["the view was dull .", "the music was great ."],
    ],
    ids=["the same text", "an empty text", "an uncovered text", "two uncovered texts"],
)
def test_texts_without_two_covered_ones_make_no_pair(texts):
    assert stages._labelled(PROMPT, texts, random.Random(0)) is None


# The table


def write_run(folder, *, kl, reward, accuracy, sample_rewards):
    """What a run leaves behind, as far as the table and the curves look at it."""
    (folder / "samples").mkdir(parents=True)
    lines = [{"step": 0, "eval_kl": 0.0, "eval_reward": 0.1}, {"step": 5, "loss": 0.5}]
    last = {"eval_kl": kl, "eval_kl_se": 0.25, "eval_reward": reward, "eval_rewards/accuracies": accuracy}
    lines.append({"step": 10, **last})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"row": row, "reward": value} for row, value in sample_rewards.items()]
    (folder / "samples" / "step-10.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


@pytest.fixture
def outcomes(tmp_path):
    """Two seeds, four held-out prompts each."""
    made = []
    for seed, shift in enumerate((0.0, 2.0)):
        runs = {
            "dpo": write_run(
                tmp_path / f"dpo-{seed}",
                kl=10.0 + shift,
                reward=2.0,
                accuracy=0.75,
                sample_rewards={20: 3.0, 21: 0.0, 22: -1.0, 23: 1.0},  # two wins, a tie, a loss
            ),
            "hypo": write_run(
                tmp_path / f"hypo-{seed}",
                kl=4.0 + shift,
                reward=2.5 + shift,
                accuracy=0.5,
                sample_rewards={20: 3.0, 21: 1.0, 22: 2.0, 23: 3.0},
            ),
        }
        seconds = {"dpo": 60.0 + shift, "hypo": 90.0 + shift}
        made.append(report.Outcome(seed, runs, baseline={20: 1.0, 21: 0.0, 22: 0.0, 23: -1.0}, seconds=seconds))
    return made


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_one_seed(outcomes):
    header, _, sft, dpo, hypo, blank, note, times = report.table(outcomes[:1]).splitlines()
    assert cells(header) == ["", "true reward", "win-rate against SFT", "reward accuracy", "reverse KL to SFT"]
    assert cells(sft) == ["SFT", "0.00", "", "", "0"]
    assert cells(dpo) == ["DPO", "2.00", "0.625", "0.750", "10.00 ± 0.25"]
    assert cells(hypo) == ["HyPO", "2.50", "1.000", "0.500", "4.00 ± 0.25"]
    assert blank == ""
    assert note == "4 held-out prompts, 1 seed; ± standard error over samples; KL in nats a response."
    assert times == "Training and its evaluations took: DPO 60 s, HyPO 90 s."


def test_the_table_of_several_seeds_has_means_and_their_error(outcomes):
    *_, dpo, hypo, _, note, times = report.table(outcomes).splitlines()
    # Seeds 10 and 12: mean 11, standard deviation √2, standard error 1.
    assert cells(dpo) == ["DPO", "2.00 ± 0.00", "0.625 ± 0.000", "0.750 ± 0.000", "11.00 ± 1.00"]
    assert cells(hypo)[1] == "3.50 ± 1.00"
    assert cells(hypo)[4] == "5.00 ± 1.00"
    assert "2 seeds; ± standard error over seeds" in note
    assert times.endswith("DPO 61 s, HyPO 91 s.")


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_curves_are_a_png(outcomes, tmp_path, seeds):
    path = report.draw(outcomes[:seeds], tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


# The whole of it


@pytest.mark.slow
def test_a_demo_in_miniature_ends_in_a_table_and_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SIZES", stages.Sizes(num_reviews=456, num_pairs=24, num_held_out=8))
    monkeypatch.setattr(
        command, "SETTINGS", {**command.SETTINGS, "per_device_train_batch_size": 8, "num_train_epochs": 2}
    )
    assert main(["demo", "--output_dir", str(tmp_path), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in out
    places = [out.index(text) for text in ("first result: ", "| SFT |", "[3/4] train with DPO", "| DPO |", "[4/4]")]
    assert places == sorted(places), "each result is printed before the next stage"
    rows = [cells(line) for line in table.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["SFT", "DPO", "HyPO"]
    for row in rows[3:]:
        assert re.fullmatch(r"-?\d+\.\d\d ± \d+\.\d\d", row[4])
        assert 0 <= float(row[2]) <= 1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "2 runs: dpo, hypo" in (tmp_path / "report.html").read_text(encoding="utf-8")

    folder = tmp_path / "seed-3"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 32
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"]
        assert world.is_covered(pair["chosen"])
        assert world.is_covered(pair["rejected"])
    # Both methods start from the same model, on the same data, for the same steps.
    dpo, hypo = (read_metrics(folder / name / "metrics.jsonl") for name in ("dpo", "hypo"))
    assert [line["step"] for line in dpo] == [line["step"] for line in hypo]
    assert {name: dpo[0][name] for name in ("eval_kl", "eval_reward")} == {
        name: hypo[0][name] for name in ("eval_kl", "eval_reward")
    }
    assert dpo[-1]["step"] == 6


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--seed", "-1"], ["--sed", "1"]], ids=" ".join)
def test_wrong_flags_of_the_demo_are_refused_before_it_starts(argv, tmp_path, capsys):
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), *argv]) == 2
    assert capsys.readouterr().err.startswith("hypo_train: ")
    assert not (tmp_path / "demo").exists()
