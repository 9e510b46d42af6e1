"""The content of report.html, for complete runs and for broken ones."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import recorded

import hypo_train.train
from hypo_train.cli import main
from hypo_train.metrics.environment import Attempt
from hypo_train.metrics.log import read_metrics
from hypo_train.report.page import page, write_report
from hypo_train.report.runs import read_runs
from hypo_train.report.series import MOST_POINTS, read_series
from hypo_train.report.text import duration, short, visible, with_error
from hypo_train.train import train
from hypo_train.utils.errors import NotFiniteError, RecordError, Stopped
from hypo_train.utils.redact import redacted


class Parsed(HTMLParser):
    """The elements of a page and its visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._silent = [], "", 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, {name for name, _ in attributes}))
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")

    def handle_data(self, found):
        if not self._silent:
            self.text += f" {found}"


def text_of(html):
    """Return the visible text of a page, with single spaces."""
    return re.sub(r"\s+", " ", Parsed(html).text)


def shown(*folders):
    return text_of(page(read_runs(list(folders))))


# The content


def test_a_report_has_all_parts_of_a_run(tmp_path):
    said = shown(recorded.write_run(tmp_path / "one"))
    for part in (
        "HyPO of Small on pairs.jsonl",
        "finished · step 20 of 20 · 12.5 s",
        "reverse KL 10.00 ± 0.21",
        "Reverse KL to the reference, nats a response",
        "training evaluation",
        "Seconds a step, by phase",
        "forward 33% backward 67%",
        "Row 0 one thing ? in the data one thing ! one KL 1.5",
        "KL 2.5 · reward -0.25 · tokens 5",
        "KL 1.5 · reward -0.25 · tokens 5 · cut off",
        "What differs from the defaults",
        "learning_rate 1e-06",
        "torch 2.13.0",
        "2026-01-01 00:00:00 UTC",
    ):
        assert part in said, part


def test_several_runs_share_one_report(tmp_path):
    runs = [
        recorded.write_run(tmp_path / "dpo", algorithm="dpo", config={"beta": 0.3}),
        recorded.write_run(tmp_path / "hypo", offset=0.5),
    ]
    said = shown(*runs)
    assert "2 runs: dpo, hypo" in said
    assert re.search(r"Where the runs differ dpo hypo algorithm dpo hypo beta 0.3 0.1 Every setting", said)
    assert said.count("one thing ?") == 1, "a prompt once"
    assert said.count("in the data one thing !") == 1
    assert said.count("KL 1.5 ·") == 2
    table = said[said.index("Last evaluation") + 15 :]
    assert re.search(r"dpo 20 10.00 ± 0.21 .* hypo 20 10.00 ± 0.21", table)


def test_a_policy_that_equals_its_reference_has_no_accuracy(tmp_path):
    run = recorded.write_run(tmp_path / "one")
    first = '{"step": 0, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 4e-8}\n'
    (run / "metrics.jsonl").write_text(first + (run / "metrics.jsonl").read_text())
    (read,) = read_runs([run])
    assert [line["step"] for line in read.evaluated if "eval_rewards/accuracies" in line] == [10, 20]
    assert read.evaluated[0]["eval_rewards/margins"] == 4e-8


def test_losses_of_different_algorithms_share_no_chart(tmp_path):
    runs = [recorded.write_run(tmp_path / name, algorithm=name) for name in ("hypo", "dpo")]
    assert "Loss, KL term included" in shown(runs[0])
    both = shown(*runs)
    assert "Loss of HyPO, KL term included" in both
    assert "Loss of DPO" in both
    table = both[both.index("Last evaluation run step") : both.index("Curves")]
    assert "loss" not in table


def test_runs_with_equal_names_get_longer_names(tmp_path):
    runs = [recorded.write_run(tmp_path / seed / "hypo") for seed in ("seed-0", "seed-1")]
    assert [run.name for run in read_runs(runs)] == ["seed-0/hypo", "seed-1/hypo"]


def test_a_chart_has_a_description_for_screen_readers(tmp_path):
    html = str(page(read_runs([recorded.write_run(tmp_path / "one")])))
    assert (
        'aria-label="Reverse KL to the reference, nats a response. training: from 0.5 ± 0.1 in step 1 to 10 ± 0.1 in '
        'step 20. evaluation: from 5 ± 0.21 in step 10 to 10 ± 0.21 in step 20."'
    ) in html


def test_the_title_names_the_first_of_many_runs(tmp_path):
    runs = [recorded.write_run(tmp_path / name) for name in "abcde"]
    assert "5 runs: a, b, c, … " in shown(*runs)


def test_only_a_single_run_shows_the_range_of_its_values(tmp_path):
    runs = [recorded.write_run(tmp_path / name, steps=2 * MOST_POINTS) for name in "ab"]
    band = 'class="band c0"'
    alone, together = (str(page(read_runs(some))) for some in (runs[:1], runs))
    assert "Each point is the mean of 2 logged values; bands: smallest to largest." in alone
    assert "Each point is the mean of 2 logged values." in together
    assert "smallest to largest" not in together
    assert alone.count(band) > together.count(band) == 1, "the KL's standard error"


def test_a_later_evaluation_is_in_the_table(tmp_path):
    run = recorded.write_run(tmp_path / "one")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "metrics.json").write_text(json.dumps({"metrics": {"eval_kl": 7.25, "eval_kl_se": 0.5}}))
    assert "one, evaluate final 7.25 ± 0.50" in shown(run)
    (run / "evaluation" / "metrics.json").write_text("{")
    assert "evaluation/metrics.json cannot be read" in shown(run)


def test_every_metric_has_a_curve(tmp_path):
    run = recorded.write_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "my/metric": 1.0}\n{"step": 21, "my/metric": 2.0, "eval_other": 3}\n')
    said = shown(run)
    assert "Every metric without a curve above" in said
    assert "my/metric" in said
    assert "other" in said


# Incomplete and broken runs


def test_a_run_without_metrics_yet_is_shown(tmp_path):
    run = recorded.write_run(tmp_path / "one", ended=None)
    (run / "metrics.jsonl").write_text("")
    (run / "samples" / "step-20.jsonl").unlink()
    said = shown(run)
    assert "no end recorded: it is running, or was killed" in said
    assert "no metrics yet" in said
    (run / "metrics.jsonl").unlink()
    assert "no metrics yet" in shown(run)


def test_broken_lines_are_named_and_an_unfinished_one_ignored(tmp_path):
    run = recorded.write_run(tmp_path / "one")
    content = (run / "metrics.jsonl").read_bytes()
    lines = content.split(b"\n")
    lines[2] = b'{"step": 3, \xff'
    lines[4] = b"[1]"
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'{"step": 21, "lo')
    with (run / "samples" / "step-20.jsonl").open("a") as file:
        file.write('["no sample"]\n{"row": 1}\n{"completion": 3}\n{"ro')
    said = shown(run)
    assert "metrics.jsonl: lines 3, 5 are left out" in said
    assert "samples/step-20.jsonl: line 3 is not a JSON object and is left out" in said
    assert "step 20 of 20" in said


@pytest.mark.parametrize("content", [b"", b"- a\n- b", b"{a: [", b"\xff\xfe", b"algorithm: !!python/name:os.system"])
def test_settings_that_cannot_be_read_are_named(tmp_path, content):
    run = recorded.write_run(tmp_path / "one")
    (run / "config.yaml").write_bytes(content)
    (run / "environment.json").write_bytes(content)
    said = shown(run)
    assert re.search(r"config.yaml (is not valid YAML|holds no settings)", said)
    assert "environment.json cannot be read" in said


def test_invalid_values_leave_the_other_points(tmp_path):
    run = recorded.write_run(tmp_path / "one")
    odd = ['"NaN"', '"Infinity"', '"a <b>"', "true", "null", "1e308", "[1]", "12345678901234567890" * 20]
    with (run / "metrics.jsonl").open("a") as file:
        for i, value in enumerate(odd):
            file.write(
                f'{{"step": {21 + i}, "loss": {value}, "kl": {value}, "kl_se": {value}, "time/forward": {value}}}\n'
            )
        file.write('{"step": "x", "loss": 1}\n{"step": 1e99}\n{"loss": 1}\n')
    said = shown(run)
    assert "not finite in step 21, 22, 26, 28" in said
    assert "inf" not in re.findall(r'points="([^"]*)"', page(read_runs([run])))


def test_the_last_attempt_decides_how_a_run_ended(tmp_path):
    run = recorded.write_run(tmp_path / "one", ended=None)
    (run / "not-finite-step-7.jsonl").write_text("")
    (attempt,) = json.loads((run / "environment.json").read_text())["attempts"]
    assert "no end recorded" in shown(run)
    attempts = [attempt, {**attempt, "first_step": 10, "ended": "finished", "seconds": 5}]
    (run / "environment.json").write_text(json.dumps({"attempts": attempts}))
    assert "finished · step 20 of 20 · more than 5.0 s in 2 attempts" in shown(run)


def test_the_report_says_how_a_run_ended(tmp_path):
    run = recorded.write_run(tmp_path / "one", ended="stopped by SIGTERM")
    assert "stopped by SIGTERM · step 20 of 20" in shown(run)
    recorded.write_run(tmp_path / "two", ended="not finite")
    (tmp_path / "two" / "not-finite-step-7.jsonl").write_text("")
    assert "not finite in step 7" in shown(tmp_path / "two")
    (tmp_path / "two" / "environment.json").unlink()
    assert "not finite in step 7" in shown(tmp_path / "two")
    recorded.write_run(tmp_path / "three")
    (tmp_path / "three" / "environment.json").unlink()
    assert "no end recorded" in shown(tmp_path / "three")
    (tmp_path / "three" / "final").mkdir()
    assert "finished" in shown(tmp_path / "three")


# Escaping


def test_foreign_text_never_becomes_markup(tmp_path):
    texts = [f"{i}" for i in range(len(recorded.HOSTILE))]
    harmless = {f"name {i}": text for i, text in enumerate(texts)}
    hostile = {text: text for text in recorded.HOSTILE}
    calm = recorded.write_run(tmp_path / "calm", texts=texts, config=harmless)
    wild = recorded.write_run(tmp_path / "<script>alert(1)", texts=recorded.HOSTILE, config=hostile)
    with (wild / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "loss": 0.5, "</script><script>alert(2)</script>": 1.0}) + "\n")
    pages = [page(read_runs([run])) for run in (calm, wild)]
    tags = [{(tag, frozenset(names)) for tag, names in Parsed(html).tags} for html in pages]
    assert tags[1] - tags[0] <= {("span", frozenset({"class"}))}, "code points"
    assert [html.count("<script") for html in pages] == [1, 1]
    pages[1].encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", pages[1])


def test_invisible_characters_show_their_code_points():
    assert visible("a\u202e<b>\0\n👩‍👧") == (
        "a<span class=code-point>U+202E</span>&lt;b&gt;<span class=code-point>U+0000</span>\n👩‍👧"
    )


def test_credentials_in_addresses_are_not_shown(tmp_path):
    address = "https://me:s3cret@host/data?rows=3&access_token=abc123&x=1"
    key = "hf_" + "a1B2" * 8
    run = recorded.write_run(tmp_path / "one", config={"dataset_name": address, "reward_model_path": f"a/{key}"})
    html = page(read_runs([run]))
    assert "https://***@host/data?rows=3&amp;access_token=***&amp;x=1" in html
    for secret in ("s3cret", "abc123", key):
        assert secret not in html
    assert redacted("org/hf_model-sk-learn, keys=[1]") == "org/hf_model-sk-learn, keys=[1]"
    assert redacted({"a": ["ftp://u@h"]}) == {"a": ["ftp://***@h"]}


# The environment


def test_a_full_disk_hides_no_other_error(tmp_path, monkeypatch, capsys):
    def in_no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail():
        monkeypatch.setattr(os, "replace", in_no_room)
        raise RuntimeError("the cause")

    with pytest.raises(RuntimeError, match="the cause"), Attempt(tmp_path, first_step=0, total_steps=9, device="cpu"):
        fail()
    assert "environment.json does not say how the run ended: [Errno 28] No space left" in capsys.readouterr().err
    with (
        pytest.raises(RecordError, match=r"cannot write .*environment\.json: No space left"),
        Attempt(tmp_path, first_step=0, total_steps=9, device="cpu"),
    ):
        pass


def test_environment_json_names_no_person_and_no_host(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setattr(sys, "argv", ["train.py", "--password", "s3cret"])
    with Attempt(tmp_path, first_step=0, total_steps=9, device="cpu: x"):
        running = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert [attempt["ended"] for attempt in running] == [None]
    (attempt,) = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert (attempt["ended"], attempt["total_steps"], attempt["device"]) == ("finished", 9, "cpu: x")
    assert attempt["torch"]
    import getpass
    import platform

    content = (tmp_path / "environment.json").read_text()
    for private in (platform.node(), f'"{getpass.getuser()}', "/home", "/root", str(tmp_path), "s3cret", "hf_x"):
        assert private not in content


def test_a_failed_attempt_records_the_type_of_the_error(tmp_path):
    for step in (0, 5):
        with pytest.raises(RuntimeError), Attempt(tmp_path, first_step=step, total_steps=9, device="cpu"):
            raise RuntimeError("of the customer's data")
    content = (tmp_path / "environment.json").read_text()
    assert [attempt["ended"] for attempt in json.loads(content)["attempts"]] == ["failed: RuntimeError"] * 2
    assert "customer" not in content


# Written by runs


def attempts(config):
    return json.loads((Path(config.output_dir) / "environment.json").read_text())["attempts"]


def stop_in_step(patch, number):
    """Send SIGTERM in step ``number`` of a run."""
    count, one = 0, hypo_train.train.train_step

    def step(*arguments):
        nonlocal count
        one(*arguments)
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(hypo_train.train, "train_step", step)


def test_stopped_and_resumed_runs_write_their_report(settings, monkeypatch):
    config = settings(num_eval_rows=4, reward="tiny:reward_of_length", max_steps=4)
    folder = Path(config.output_dir)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(Stopped):
            train(config, progress=False)
    assert "stopped by SIGTERM · step 2 of 4" in text_of((folder / "report.html").read_text())
    train(config.model_copy(update={"resume_from_checkpoint": "auto"}), progress=False)
    said = text_of((folder / "report.html").read_text())
    assert re.search(r"finished · step 4 of 4 · [\d.]+ s in 2 attempts", said)
    assert [(a["first_step"], a["ended"]) for a in attempts(config)] == [(0, "stopped by SIGTERM"), (2, "finished")]
    samples = [json.loads(line) for line in (folder / "samples" / "step-4.jsonl").read_text().splitlines()]
    assert all(sample["completion"] in said for sample in samples)


def test_a_run_that_ends_at_a_nan_writes_its_report(settings):
    config = settings(algorithm="dpo", learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(NotFiniteError):
        train(config, progress=False)
    assert re.search(r"not finite in step [23]", text_of((Path(config.output_dir) / "report.html").read_text()))


def test_a_run_survives_a_failing_report(settings, monkeypatch, capsys):
    config = settings(algorithm="sft", max_steps=1)
    monkeypatch.setattr("hypo_train.report.page.page", lambda runs: 1 / 0)
    assert train(config, progress=False).model_dir.is_dir()
    assert "the report was not written (ZeroDivisionError: division by zero)" in capsys.readouterr().err


# The command


def test_where_the_report_is_written(tmp_path, capsys, monkeypatch):
    runs = [recorded.write_run(tmp_path / name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a"]) == 0
    assert main(["report", *map(str, runs)]) == 0
    assert main(["report", "a", "--output", "other.html"]) == 0
    assert main(["report", "a"]) == 0, "a report is written over"
    assert capsys.readouterr().out.splitlines()[:2] == [
        "report written to a/report.html",
        "report written to report.html",
    ]
    assert "2 runs: a, b" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "other.html", "report.html"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run is missing: name a run's folder"),
        (["missing"], "'missing' is not a run: there is no such folder"),
        (["."], "'.' is not a run: it has neither config.yaml nor metrics.jsonl; name a run's output_dir"),
        (["a", "./a"], "'a' is named twice"),
        (["a", "--output", "a/config.yaml"], "'a/config.yaml' exists and is not a report: name another file"),
        (["a", "--output", "a"], "'a' is a folder: name a file, such as 'a/report.html'"),
        (["a", "--output", "no/x.html"], "there is no folder 'no'"),
        (["a", "--outptu", "x"], "unknown flag --outptu: did you mean --output?"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(tmp_path, capsys, monkeypatch, arguments, said):
    recorded.write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_report_of_a_long_run_is_quick_and_small(tmp_path):
    run = recorded.write_run(tmp_path / "long", steps=20_000)
    code = "import sys, time; from hypo_train.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "report", str(run)], check=True, capture_output=True)
    size = (run / "report.html").stat().st_size
    assert size < 300_000
    began = time.process_time()
    read_metrics(run / "metrics.jsonl")
    unit = time.process_time() - began
    write_report([run], run / "report.html")
    assert time.process_time() - began < 12 * unit, "a multiple of the time to read the metrics"


# Numbers


def test_points_of_a_long_curve_are_means_with_errors():
    lines = [{"step": step, "kl": float(step % 2), "kl_se": 0.3} for step in range(1, 10 * MOST_POINTS + 1)]
    found = read_series("kl", lines, "kl")
    assert (len(found.points), found.per_point) == (MOST_POINTS, 10)
    assert {point.value for point in found.points} == {0.5}
    assert found.points[0].high - 0.5 == pytest.approx(0.3 / 10**0.5)
    spread = read_series("loss", [{"step": line["step"], "loss": line["kl"]} for line in lines], "loss")
    assert (spread.points[0].low, spread.points[0].high) == (0, 1)
    assert read_series("kl", lines, "reward") is None


def test_numbers_have_few_digits():
    assert [short(v) for v in (0, 0.69314, 1e-6, 12345.6, 2.5e9, float("nan"))] == [
        "0", "0.6931", "1e-06", "12.35k", "2.5G", "NaN",
    ]  # fmt: skip
    assert with_error(12.34567, 0.4123) == "12.35 ± 0.41"
    assert with_error(1234.5, 37.0) == "1234 ± 37"
    assert with_error(0.5, None) == with_error(0.5, 0.0) == with_error(0.5, float("nan")) == "0.5"
    assert [duration(s) for s in (1.25, 65, 7500, 2 * 86400 + 3600 * 5)] == [
        "1.2 s",
        "1 min 05 s",
        "2 h 05 min",
        "2 d 5 h",
    ]


@pytest.mark.parametrize("peak", [1.5e-3, 1.5e-6, 0.5, 12_345.0, 4e9])
def test_tick_labels_fit_the_margin(tmp_path, peak):
    lines = [{"step": step, "learning_rate": peak * step / 7} for step in range(1, 8)]
    run = recorded.write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = re.findall(r'text-anchor="end">([^<]*)<', str(page(read_runs([run]))))
    assert texts
    assert max(map(len, texts)) <= 7
