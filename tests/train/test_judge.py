"""Win-rates: by a function, by a reward model, and by a chat endpoint that a local server plays."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from hypo_train.cli import main
from hypo_train.config import ConfigError
from hypo_train.judges import chat, endpoint
from hypo_train.judges.endpoint import _seconds
from hypo_train.judges.template import Template, load_template, preferred
from hypo_train.metrics.standard_error import standard_error
from hypo_train.train import train
from hypo_train.utils.records import write_csv, write_json_lines

ROOT = Path(__file__).parents[2]
KEY = "sk-never-to-be-written-1234567890"
MESSAGE = re.compile(
    r"### Post:\n(.*?)\n\n### Summary A:\n(.*?)\n\n### Summary B:\n(.*?)\n\n### Instructions", re.DOTALL
)


def length(prompt, completion):
    """A judge that a command line can name."""
    return len(completion)


def no_number(prompt, completion):
    return None


def samples(count=6):
    """Every third is shorter than its reference, longer, and the same."""
    texts = [("short", "much longer"), ("much longer", "short"), ("the same", " the same ")]
    return [
        {"row": 10 + i, "prompt": f"post {i}", "completion": texts[i % 3][0], "reference": texts[i % 3][1]}
        for i in range(count)
    ]


@pytest.fixture
def written(tmp_path):
    """``written(rows)`` is a file of these samples."""

    def write(rows=None, name="samples.jsonl"):
        return tiny.write_rows(tmp_path / name, samples() if rows is None else rows)

    return write


@pytest.fixture
def judged(capsys):
    """``judged(file, "--flag", ...)``: what the summary and the verdicts hold afterwards, and the screen."""

    def judge(path, *flags, status=0):
        capsys.readouterr()
        assert main(["judge", str(path), *map(str, flags)]) == status
        out, err = capsys.readouterr()
        assert err == ""
        folder = Path(out.splitlines()[-1].removeprefix("written to "))
        verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text("utf-8").splitlines()]
        return json.loads((folder / "summary.json").read_text("utf-8")), verdicts, out

    return judge


def refusal(capsys, *argv):
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert main(["judge", *map(str, argv)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err.removeprefix("hypo_train: ").strip()


# By a score


def test_the_higher_score_wins_and_a_tie_is_one_half(written, judged):
    rows = [*samples(), {"row": 16, "prompt": "p", "completion": "longest of them", "reference": "short"}]
    rows[2]["reference"] = rows[5]["reference"] = "the same"
    found, verdicts, out = judged(written(rows), "--judge", "test_judge:length")
    assert [verdict["outcome"] for verdict in verdicts] == ["loss", "win", "tie"] * 2 + ["win"]
    assert (found["win"], found["tie"], found["loss"], found["failed"]) == (3, 2, 2, 0)
    scores = [0, 1, 0.5, 0, 1, 0.5, 1]
    assert found["win_rate"] == pytest.approx(4 / 7)
    assert found["win_rate_se"] == pytest.approx(statistics.stdev(scores) / math.sqrt(7))
    assert (verdicts[0]["score"], verdicts[0]["score_other"]) == (5, 11)
    assert found["length"] == statistics.fmean(len(row["completion"]) for row in rows)
    assert re.search(r"win-rate +0\.5714 ± 0\.17", out)
    assert "3 / 2 / 2" in out


def test_a_reward_model_judge_adds_an_eos_where_a_text_ended(settings, tmp_path, written, judged):
    config = settings(algorithm="reward", output_dir=str(tmp_path / "rm"))
    train(config, progress=False)
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected"], "reference": row["chosen"], "ended": i % 2 == 0}
        for i, row in enumerate(tiny.pair_rows(5))
    ]
    found, verdicts, _ = judged(written(rows), "--judge_model", tmp_path / "rm" / "final", "--judge_batch_size", 2)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "final").eval()
    tokenizer = tiny.word_tokenizer()

    def score(prompt, text, ended):
        ids = tokenizer(f"{prompt} {text}").input_ids + [tiny.EOS] * ended
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits)

    for row, verdict in zip(rows, verdicts, strict=True):
        # Padding ends what a classifier reads; without it, its last token does.
        expected = score(row["prompt"], row["completion"], row["ended"]), score(row["prompt"], row["reference"], True)
        assert (verdict["score"], verdict["score_other"]) == pytest.approx(expected, abs=1e-5)
        assert verdict["outcome"] == ("win" if expected[0] > expected[1] else "loss")
    assert found["judge"] == str(tmp_path / "rm" / "final")


def test_samples_are_compared_with_others_of_the_same_row(written, judged):
    mine = [
        {"row": row, "prompt": f"post {row}", "completion": text} for row, text in ((4, "aaa"), (4, "b"), (7, "cc"))
    ]
    other = [
        {"row": row, "prompt": f"post {row}", "completion": text}
        for row, text in ((7, "c"), (4, "aa"), (4, "bb"), (9, "not asked for"))
    ]
    path, against = written(mine), written(other, "other.jsonl")
    found, verdicts, _ = judged(path, "--against", against, "--judge", "test_judge:length")
    assert [(v["row"], v["sample"], v["outcome"]) for v in verdicts] == [(4, 0, "win"), (4, 1, "loss"), (7, 0, "win")]
    assert found["against"] == str(against)


def test_two_samples_of_one_row_do_not_count_as_two_rows():
    assert standard_error([1, 1, 0, 0], [0, 0, 1, 1]) == pytest.approx(0.5)
    assert standard_error([1, 0], [0, 1]) == pytest.approx(0.5)
    assert standard_error([1, 0, 0.5], [0, 1, 2]) == pytest.approx(statistics.stdev([1, 0, 0.5]) / math.sqrt(3))
    assert standard_error([1, 0], [3, 3]) is None


# By an endpoint


class Endpoint:
    """A chat endpoint on a port of its own. ``reply(a, b)`` gives an answer's text, or (status, headers, text)."""

    def __init__(self, reply):
        self.reply, self.asked, self.authorized, self.times = reply, [], [], []
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.handle(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle(self, http):
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        _, a, b = MESSAGE.search(body["messages"][0]["content"]).groups()
        with self.lock:
            self.asked.append(body)
            self.authorized.append(http.headers.get("Authorization"))
            self.times.append(time.monotonic())
        reply = self.reply(a, b)
        status, headers, content = reply if isinstance(reply, tuple) else (200, {}, completion(reply))
        try:
            http.send_response(status)
            for name, value in {"Content-Length": str(len(content.encode())), **headers}.items():
                http.send_header(name, value)
            http.end_headers()
            http.wfile.write(content.encode())
        except OSError:
            pass  # who asked did not wait

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def completion(text):
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


def prefers_longer(a, b):
    return f"Comparison: one is longer.\nPreferred: {'A' if len(a) > len(b) else 'B'}"


def then_prefers_longer(*first):
    """The ``first`` replies, then good ones."""
    left, lock = list(first), threading.Lock()

    def reply(a, b):
        with lock:
            odd = left.pop(0) if left else None
        return prefers_longer(a, b) if odd is None else odd

    return reply


@pytest.fixture
def served(monkeypatch):
    """``served(reply)`` is an endpoint with such replies; attempts follow each other at once."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    started = []

    def start(reply=prefers_longer):
        started.append(Endpoint(reply))
        return started[-1]

    yield start
    for one in started:
        one.close()


def asking(server, *flags):
    return ("--judge_url", server.url, "--judge_model_name", "tiny-judge", *flags)


def test_both_orders_are_asked_and_equal_responses_tie_unasked(written, judged, served):
    server = served()
    found, verdicts, out = judged(
        written(), *asking(server, "--judge_price_input", 2, "--judge_price_output", 8, "--judge_workers", 3)
    )
    assert [verdict["outcome"] for verdict in verdicts] == ["loss", "win", "tie"] * 2
    assert (found["win_rate"], found["inconsistent"], found["failed"]) == (0.5, 0, 0)
    assert len(server.asked) == 8, "four comparisons in two orders; two of equal responses"
    pairs = [MESSAGE.search(body["messages"][0]["content"]).groups() for body in server.asked]
    assert {pair for pair in pairs if pair[0] == "post 0"} == {
        ("post 0", "short", "much longer"),
        ("post 0", "much longer", "short"),
    }
    assert all(
        (body["model"], body["temperature"], body["max_tokens"]) == ("tiny-judge", 0, 300) for body in server.asked
    )
    assert server.authorized == [None] * 8
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (800, 80)
    assert found["cost_usd"] == pytest.approx((800 * 2 + 80 * 8) / 1e6)
    bound = float(re.search(r"8 requests .* at most ([\d.]+) USD", out)[1])
    assert bound > found["cost_usd"]
    assert verdicts[0]["answer"].endswith("Preferred: B")
    assert verdicts[0]["answer_swapped"].endswith("Preferred: A")


def test_a_verdict_that_changes_with_the_order_is_a_tie(written, judged, served):
    found, verdicts, out = judged(written(), *asking(served(lambda a, b: "Preferred: A")))
    assert {verdict["outcome"] for verdict in verdicts} == {"tie"}
    assert [verdict["consistent"] for verdict in verdicts] == [False, False, True] * 2
    assert (found["win_rate"], found["inconsistent"]) == (0.5, pytest.approx(4 / 6))
    assert "66.7% of the verdicts changed with the order" in out


def test_a_busy_endpoint_is_asked_again_when_it_says(written, judged, served):
    server = served(then_prefers_longer((429, {"Retry-After": "1"}, "slow down")))
    found, _, _ = judged(written(samples(2)), *asking(server, "--judge_workers", 1))
    assert (found["failed"], len(server.asked)) == (0, 5)
    assert server.times[1] - server.times[0] >= 0.99


def test_while_one_request_has_to_wait_no_other_is_sent(written, judged, served):
    answers = then_prefers_longer((429, {"Retry-After": "2"}, "slow down"))
    under_way = iter([0.8])  # seconds: whoever sent the refused request has read so when the other one's is answered

    def reply(a, b):
        answer = answers(a, b)
        if isinstance(answer, str):
            time.sleep(next(under_way, 0))
        return answer

    server = served(reply)
    judged(written(samples(12)), *asking(server, "--judge_workers", 2))
    late = sorted(server.times)
    assert sum(t < late[0] + 1.8 for t in late) <= 2, "the one refused, and what was under way"
    assert len(late) == 17, "eight comparisons in two orders, one of them asked twice"


def test_a_passing_failure_is_tried_again(written, judged, served):
    troubles = [
        (500, {}, "oops"),
        (503, {"Retry-After": "0"}, ""),
        "no verdict in this one",
        (200, {}, "<html>not JSON"),
        (200, {}, '{"choices": []}'),
    ]
    server = served(then_prefers_longer(*troubles))
    found, verdicts, _ = judged(written(samples(2)), *asking(server, "--judge_workers", 1))
    assert [verdict["outcome"] for verdict in verdicts] == ["loss", "win"]
    assert found["failed"] == 0
    assert len(server.asked) == len(troubles) + 4
    assert found["usage"]["prompt_tokens"] == 500, "an answer without a verdict is paid as well"


def test_a_request_that_times_out_is_tried_again(written, judged, served):
    slow, over = threading.Event(), threading.Event()

    def reply(a, b):
        if not slow.is_set():
            slow.set()
            over.wait()
        return prefers_longer(a, b)

    server = served(reply)
    found, _, _ = judged(written(samples(2)), *asking(server, "--judge_timeout", 2, "--judge_workers", 1))
    over.set()
    assert (found["failed"], len(server.asked)) == (0, 5)


def test_failed_comparisons_are_tried_again_by_the_same_command(written, judged, served):
    broken = {"on": True}

    def reply(a, b):
        if broken["on"] and "short" in (a, b) and "much longer" in (a, b) and len(a) < len(b):
            return "I like both."
        return prefers_longer(a, b)

    server = served(reply)
    path, flags = written(), asking(server, "--judge_retries", 1)
    found, verdicts, out = judged(path, *flags, status=1)
    assert (found["win"], found["tie"], found["loss"], found["failed"]) == (0, 2, 0, 4)
    assert found["win_rate"] == 0.5, "of the two that have a verdict"
    assert verdicts[0]["outcome"] is None
    assert verdicts[0]["error"] == "an answer without a verdict: 'I like both.' (2 attempts)"
    assert "4 of 6 comparisons, left out above: 4 with an answer without a verdict" in out

    broken["on"] = False
    asked = len(server.asked)
    found, _, out = judged(path, *flags)
    assert (found["win"], found["tie"], found["loss"], found["failed"]) == (2, 2, 2, 0)
    # Of each comparison one order was answered; the other failed, or was asked first and the rest never.
    assert len(server.asked) - asked == 8 - found["usage_from_cache"]["answers"]
    assert found["usage_from_cache"]["answers"] == 2


def test_ten_failures_in_a_row_end_the_judging(written, served, capsys, monkeypatch):
    server = served(lambda a, b: (500, {}, "down"))
    rows = [row for row in samples(90) if row["completion"] != "the same"]
    line = refusal(capsys, written(rows), *asking(server, "--judge_retries", 0, "--judge_workers", 2))
    assert line.startswith("10 comparisons in a row failed, the last with HTTP 500: down (1 attempts)")
    assert len(server.asked) < 30


def test_without_a_single_verdict_there_is_no_win_rate(written, served, capsys):
    server = served(lambda a, b: (400, {}, "too long"))
    assert refusal(capsys, written(samples(2)), *asking(server)) == "all 2 comparisons failed: HTTP 400: too long"
    assert len(server.asked) == 2, "what the endpoint refuses for good is not asked again"


def test_an_endpoint_that_is_not_there_is_one_line(written, served, capsys):
    server = served()
    server.close()
    line = refusal(capsys, written(samples(2)), *asking(server, "--judge_retries", 1))
    assert "all 2 comparisons failed" in line
    assert "Connection refused" in line


def test_a_long_wait_is_not_waited_for(written, served, capsys):
    server = served(lambda a, b: (429, {"Retry-After": "7200"}, "tomorrow"))
    assert refusal(capsys, written(samples(1)), *asking(server)).endswith("tomorrow (it asks to wait 7200 s)")


def test_a_retry_after_is_seconds_or_a_date():
    assert _seconds(None) == _seconds("soon") == _seconds("-3") == _seconds("nan") == 0
    assert _seconds("2.5") == 2.5
    at = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 25 < _seconds(format_datetime(at, usegmt=True)) <= 30


# The cache


def test_a_killed_judging_goes_on_without_paying_twice(written, judged, served):
    first = threading.Event()

    def reply(a, b):
        time.sleep(0.1)
        if len(server.asked) >= 6:
            first.set()
        return prefers_longer(a, b)

    server = served(reply)
    rows = [row for row in samples(30) if row["completion"] != "the same"]
    path, flags = written(rows), asking(server, "--judge_workers", 2)
    command = [sys.executable, "-m", "hypo_train", "judge", str(path), *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert first.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answers = path.parent / "judge" / "answers.jsonl"
    kept = len(answers.read_text("utf-8").splitlines())
    assert 3 <= kept < 40
    assert not (path.parent / "judge" / "verdicts.jsonl").exists()
    with answers.open("a", encoding="utf-8") as file:
        file.write('{"key": "torn')

    found, verdicts, _ = judged(path, *flags)
    assert [verdict["outcome"] for verdict in verdicts] == ["loss", "win"] * 10
    assert (found["usage_from_cache"]["answers"], found["usage"]["answers"]) == (kept, 40 - kept)
    asked = len(server.asked)
    prices = ("--judge_price_input", 10, "--judge_price_output", 10)
    found, _, out = judged(path, *flags, *prices)
    assert (found["cost_usd"], found["cost_usd_from_cache"]) == (0, pytest.approx(40 * 110 * 10 / 1e6))
    assert "known before" in out
    assert len(server.asked) == asked, "all are known by now"


def test_another_model_template_or_text_is_asked_anew(written, judged, served, tmp_path):
    server = served()
    path, cache = written(samples(1)), tmp_path / "answers.jsonl"
    variants = [
        [],
        ["--judge_template", tmp_path / "mine.txt"],
        ["--judge_temperature", "none"],
        ["--judge_max_tokens", 20],
    ]
    (tmp_path / "mine.txt").write_text(load_template("tldr").text.replace("Judge based on", "Decide by"))
    for number, flags in enumerate(variants):
        judged(path, *asking(server, *flags, "--judge_cache", cache, "--output_dir", tmp_path / str(number)))
        assert len(server.asked) == 2 * (number + 1)
    assert "temperature" not in server.asked[4]
    other = written([{**samples(1)[0], "prompt": "another post"}], "other.jsonl")
    judged(other, *asking(server, "--judge_cache", cache, "--output_dir", tmp_path / "other"))
    assert len(server.asked) == 10
    judged(path, *asking(server, "--judge_cache", cache, "--output_dir", tmp_path / "again"))
    assert len(server.asked) == 10


# The key


def test_the_key_is_sent_and_is_in_no_file_and_on_no_screen(written, served, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    server = served(then_prefers_longer((500, {}, f"bad key {KEY}"), (400, {}, f"bad key {KEY}")))
    flags = asking(server, "--judge_workers", 1, "--judge_api_key_variable", "MY_KEY")
    assert main(["judge", str(written()), *map(str, flags)]) == 1
    out, err = capsys.readouterr()
    assert set(server.authorized) == {f"Bearer {KEY}"}
    assert "HTTP 400: bad key ***" in out
    assert KEY not in out + err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_refused_key_ends_judging_without_being_shown(written, served, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    server = served(lambda a, b: (401, {}, f"Incorrect API key provided: {KEY}"))
    line = refusal(capsys, written(samples(60)), *asking(server, "--judge_workers", 2))
    assert line == f"judge_url='{server.url}' refuses the model 'tiny-judge': HTTP 401: Incorrect API key provided: ***"
    assert len(server.asked) < 60  # of 120: how many are under way depends on how busy the machine is


def test_the_key_does_not_follow_a_redirect(written, served, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    elsewhere = served()
    server = served(lambda a, b: (307, {"Location": f"{elsewhere.url}/chat/completions"}, ""))
    assert "answers with a redirect to" in refusal(capsys, written(samples(1)), *asking(server))
    assert elsewhere.asked == []


def test_a_key_that_is_missing_or_no_key_is_one_line(written, served, capsys, monkeypatch):
    server = served()
    flags = asking(server, "--judge_api_key_variable", "NO_SUCH_KEY")
    assert "there is no such environment variable" in refusal(capsys, written(), *flags)
    monkeypatch.setenv("JUDGE_API_KEY", "two\nlines")
    line = refusal(capsys, written(), *asking(server))
    assert line.startswith("the environment variable JUDGE_API_KEY is not an API key")
    assert "two" not in line
    assert server.asked == []


# What is asked, and what an answer says


@pytest.mark.parametrize("name", ["tldr", "tldr-concise"])
def test_our_templates_have_their_places_and_ask_for_a_verdict(name):
    message = load_template(name).message(" the post ", " one", "two\n")
    assert "\nthe post\n" in message
    assert message.index("Summary A:\none\n") < message.index("Summary B:\ntwo\n")
    assert message.endswith('Preferred: <"A" or "B">')


def test_a_placeholder_inside_a_text_is_text():
    message = Template("x", "{prompt}|{response0}|{response1}").message("{response1}", "{prompt}", "a {b} c")
    assert message == "{response1}|{prompt}|a {b} c"


def test_a_wrong_template_is_noticed_before_the_first_request(written, served, capsys, tmp_path):
    server, path = served(), tmp_path / "mine.txt"
    for text, problem in (
        ("{prompt} {response0}", "lacks {response1}"),
        ("{prompt} {response0} {response1} {post}", "has an unknown {post}"),
    ):
        path.write_text(text)
        assert problem in refusal(capsys, written(), *asking(server, "--judge_template", path))
    assert "(a file, or one of tldr, tldr-concise)" in refusal(
        capsys, written(), *asking(server, "--judge_template", "tdlr")
    )
    assert server.asked == []
    with pytest.raises(ConfigError, match="Is a directory"):
        load_template(str(tmp_path))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Comparison: A is better.\nPreferred: A", "A"),
        ('Comparison: x\nPreferred: "B"', "B"),
        ("**Preferred:** B", "B"),
        ("Preferred: **A**.", "A"),
        ("preferred: Summary B", "B"),
        ("Preferred: <A>\n", "A"),
        ("Preferred: A\nPreferred: A", "A"),
        ("Preferred: A\nPreferred: B", None),
        ('Preferred: <"A" or "B">', None),
        ("Preferred: a better summary", None),
        ("Preferred: A better one is B", None),
        ("Preferred: neither", None),
        ("A", None),
        ("", None),
    ],
)
def test_an_answer_prefers_a_b_or_nothing(answer, letter):
    assert preferred(answer) == letter


# Files


def test_a_csv_keeps_texts_and_runs_no_formula(tmp_path):
    texts = [
        '=HYPERLINK("http://x","y")',
        "+1",
        "-2",
        "@x",
        "\tx",
        'a "quote", a comma',
        "two\nlines\r\nor three",
        "café 日本 🙂",
    ]
    records = [{"completion": text, "kl": -0.5} for text in texts]
    write_csv(tmp_path / "x.csv", records)
    write_json_lines(tmp_path / "x.jsonl", records)
    assert (tmp_path / "x.csv").read_bytes().startswith(b"\xef\xbb\xbfcompletion,kl\r\n")
    with (tmp_path / "x.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["completion"] for row in rows] == [*(f"'{text}" for text in texts[:5]), *texts[5:]]
    assert {row["kl"] for row in rows} == {"-0.5"}, "a number stays a number"
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == records


def test_records_that_lack_a_column_leave_it_empty(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1}, {"b": None, "c": "\0x"}])
    with (tmp_path / "x.csv").open(encoding="utf-8-sig", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b", "c"], ["1", "", ""], ["", "", "\ufffdx"]]


def test_verdicts_of_another_judge_are_not_written_over(written, judged, capsys):
    path = written()
    judged(path, "--judge", "test_judge:length")
    judged(path, "--judge", "test_judge:length", "--num_comparisons", 3)
    line = refusal(capsys, path, "--judge", "tiny:reward_of_length")
    assert line.endswith("holds verdicts with another judge ('test_judge:length'): choose another --output_dir")


# Mistakes


def test_a_read_only_folder_is_refused_before_any_request(written, served, capsys, tmp_path):
    server, taken = served(), tmp_path / "taken"
    taken.write_text("")
    line = refusal(capsys, written(), *asking(server, "--output_dir", taken))
    assert line == f"output_dir='{taken}' cannot be written to: File exists"
    line = refusal(capsys, written(), *asking(server, "--judge_cache", taken / "answers.jsonl"))
    assert line.startswith(f"judge_cache='{taken}' cannot be written to")
    assert server.asked == []


def test_samples_that_cannot_be_compared_are_one_line(written, capsys, tmp_path):
    judge = ("--judge", "test_judge:length")
    assert refusal(capsys, tmp_path / "no.jsonl", *judge) == f"{tmp_path}/no.jsonl: No such file or directory"
    bare = [{name: value for name, value in row.items() if name != "reference"} for row in samples()]
    path = written(bare)
    assert "the sample of row 10 has no 'reference' response" in refusal(capsys, path, *judge)
    other = written(bare[1:], "other.jsonl")
    assert "other.jsonl has no sample 0 of row 10" in refusal(capsys, path, "--against", other, *judge)
    other = written([{**row, "prompt": "?"} for row in bare], "other.jsonl")
    assert "has another prompt for row 10" in refusal(capsys, path, "--against", other, *judge)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x"}\n')
    assert refusal(capsys, broken, *judge).endswith("line 1: 'completion' should be str, got None")
    broken.write_text("{\n")
    assert "line 1 is not JSON" in refusal(capsys, broken, *judge)
    broken.write_text("\n")
    assert refusal(capsys, broken, *judge).endswith("there are no samples")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("", "no judge given: name one of --judge, --judge_model and --judge_url"),
        ("--judge a:b --judge_model x", "--judge and --judge_model given: name one of"),
        ("--judge no_such_module:x", "judge='no_such_module:x': No module named"),
        ("--judge json", "judge='json': write it as package.module:function"),
        ("--judge test_judge:no_number", "judge='test_judge:no_number' gave None for 'short': it must give a finite"),
        ("--judge_model ./missing", "judge_model: there is no folder './missing'"),
        ("--judge_url localhost:80 --judge_model_name x", "judge_url: write it as http://host:port/v1"),
        ("--judge_url http://x/v1?key=abc --judge_model_name x", "without keys, passwords or a question mark"),
        ("--judge_url http://x/v1", "judge_model_name is missing"),
        ("--judge_url http://x/v1 --judge_model_name x --judge_price_input 1", "give both or none"),
        ("--judge_workers 0", "judge_workers='0': should be greater than 0"),
        ("--judge a:b --juge x", "unknown flag --juge: did you mean --judge?"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(written, capsys, flags, problem):
    assert problem in refusal(capsys, written(), *flags.split())


def test_help_is_readable_and_an_endpoint_needs_no_torch(written, served, capsys):
    assert main(["judge", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--judge_template" in out
    assert "JUDGE_API_KEY" in out
    command = [sys.executable, "-X", "importtime", "-m", "hypo_train", "judge", str(written()), *asking(served())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hypo_train.judges.chat" in imported
    assert not {"torch", "transformers", "datasets", "numpy"} & imported
    assert chat.FAILURES_IN_A_ROW > 1
