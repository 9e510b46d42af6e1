import io
import json
import math
import os
import sys

import pytest

from hypo_train.metrics.log import RunLog, read_metrics
from hypo_train.utils.errors import RecordError
from hypo_train.utils.safe_print import safe_print


def run_log(output_dir, **options):
    return RunLog(output_dir, 10, **{"progress": False, **options})


def lines(output_dir):
    return (output_dir / "metrics.jsonl").read_text().splitlines()


def log_steps(log, steps):
    for step in steps:
        log.log(step, {"loss": 1 / step, "kl": step * 0.1})
        log.log(step, {"eval_loss": 2 / step})  # an evaluation adds a second line to a step


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Make stderr a terminal. Not a fixture: pytest replaces the stream between setup and test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


# metrics.jsonl


def test_a_log_call_is_one_json_line(tmp_path):
    with run_log(tmp_path / "new" / "folder") as log:
        log.log(1, {"loss": 0.5, "tokens": 3})
        log.log(2, {"rewards/margins": -0.25})
    assert lines(tmp_path / "new" / "folder") == [
        '{"step": 1, "loss": 0.5, "tokens": 3}',
        '{"step": 2, "rewards/margins": -0.25}',
    ]


def test_a_line_can_be_read_while_the_run_goes_on(tmp_path):
    with run_log(tmp_path) as log:
        log.log(1, {"loss": 0.5})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_numbers_come_back_bit_for_bit(tmp_path):
    value = 0.1 + 0.2
    with run_log(tmp_path) as log:
        log.log(1, {"loss": value})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == value


def test_nan_and_infinities_stay_valid_json_and_come_back(tmp_path):
    with run_log(tmp_path) as log:
        log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (line,) = lines(tmp_path)
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (metrics,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(metrics["a"])
    assert (metrics["b"], metrics["c"]) == (math.inf, -math.inf)


def test_a_last_line_still_being_written_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", ""])
def test_a_broken_line_is_named_when_read(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        read_metrics(tmp_path / "metrics.jsonl")


# Resuming


@pytest.mark.parametrize("died_in", ["between lines", "a line", "a character", "a power cut"])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, died_in):
    with run_log(tmp_path / "whole") as log:
        log.log(0, {"eval_loss": 3.0})
        log_steps(log, range(1, 11))
    with run_log(tmp_path / "killed") as log:
        log.log(0, {"eval_loss": 3.0})
        log_steps(log, range(1, 8))
    tail = {
        "between lines": b"",
        "a line": b'{"step": 8, "lo',
        "a character": b'{"step": 8, "\xce',
        "a power cut": b'{"step": 8, "\xce\n\x00\x00\xff\n',
    }
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(tail[died_in])
    with run_log(tmp_path / "killed", resume_step=5) as log:
        log_steps(log, range(6, 11))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_an_unfinished_line_of_a_kept_step_is_dropped(tmp_path):
    # The JSON is complete but its line end is missing: the next line would be joined to it.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with run_log(tmp_path, resume_step=3) as log:
        log.log(4, {})
    assert lines(tmp_path) == ['{"step": 1}', '{"step": 4}']


def test_kept_lines_keep_their_bytes(tmp_path):
    text = '{"step": 1, "a": "NaN",   "b": 1e-07}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    run_log(tmp_path, resume_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_run_killed_while_cutting_loses_nothing(tmp_path, monkeypatch):
    with run_log(tmp_path) as log:
        log_steps(log, range(1, 4))
    before = lines(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run_log(tmp_path, resume_step=2)
    assert lines(tmp_path) == before
    run_log(tmp_path, resume_step=2).close()
    assert lines(tmp_path) == before[:4]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    with run_log(tmp_path) as log:
        log.log(0, {"loss": 1.0})
    with run_log(tmp_path) as log:
        log.log(0, {"loss": 2.0})
    assert lines(tmp_path) == ['{"step": 0, "loss": 2.0}']


def test_resuming_without_a_file_creates_one(tmp_path):
    with run_log(tmp_path, resume_step=4) as log:
        log.log(5, {"loss": 1.0})
    assert lines(tmp_path) == ['{"step": 5, "loss": 1.0}']


# The bar


def test_the_bar_shows_progress_time_left_and_metrics(tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    with run_log(tmp_path, progress=True) as log:
        for step in range(1, 6):
            log.advance(step)
        metrics = {"loss": 0.693147, "kl": 12.3456, "rewards/margins": -0.5, "tokens_per_second": 98765.4}
        metrics |= {"time/step": 2.0, "time/sample": 0.5, "time/forward": 1.2345}
        log.log(5, {**metrics, "grad_norm": 77.0})
    shown = screen.getvalue().split("\r")[-1]
    of_metrics = ("loss=0.6931", "kl=12.35", "margin=-0.5", "s/step=2", "s/sampling=0.5", "tokens/s=98,765")
    for part in ("5/10", *of_metrics, "<"):
        assert part in shown, part
    assert "grad_norm" not in shown
    assert "1.23" not in shown


def test_a_resumed_bar_starts_at_its_step(tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    with run_log(tmp_path, progress=True, resume_step=6) as log:
        assert "6/10" in screen.getvalue()
        log.advance(7)
        log.advance(7)
    assert "7/10" in screen.getvalue().split("\r")[-1]


def test_a_message_does_not_break_the_bar(tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", screen)  # a terminal shows both streams
    with run_log(tmp_path, progress=True) as log:
        log.advance(3)
        log.message("hello")
    line = next(line for line in screen.getvalue().split("\n") if "hello" in line)
    assert line.split("\r")[-1] == "hello"
    assert "/10" in screen.getvalue().split("hello\n")[1], "the bar is drawn again below"


def test_an_evaluation_gets_a_line_of_its_own_on_a_terminal(tmp_path, monkeypatch, capsys):
    terminal(monkeypatch)
    with run_log(tmp_path, progress=True) as log:
        log.log(3, {"eval_loss": 0.25, "eval_rewards/margins": 2.0})
    assert capsys.readouterr().out == "step 3/10  eval_loss 0.25  eval_margin 2\n"


def test_without_a_terminal_each_log_call_is_one_plain_line(tmp_path, capsys):
    with run_log(tmp_path, progress=True) as log:
        log.advance(5)
        log.log(5, {"loss": 0.5, "kl": 2.0})
        log.log(10, {"loss": 0.25})
    captured = capsys.readouterr()
    first, last = captured.out.splitlines()
    assert first == "step 5/10  00:00 left  loss 0.5  kl 2"
    assert last == "step 10/10  loss 0.25"
    assert captured.err == ""


def test_the_time_left_counts_steps_of_this_attempt(tmp_path, capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr("hypo_train.metrics.log.time.monotonic", lambda: now)
    with run_log(tmp_path, progress=True, resume_step=4) as log:
        now += 60.0
        log.log(6, {"loss": 1.0})
    assert "02:00 left" in capsys.readouterr().out  # 30 s a step, 4 to go


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_evaluations_do_not_distort_the_time_left(tmp_path, capsys, monkeypatch, on_a_terminal):
    now = 100.0
    monkeypatch.setattr("hypo_train.metrics.log.time.monotonic", lambda: now)
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    screen = terminal(monkeypatch) if on_a_terminal else None
    with RunLog(tmp_path, 1000, progress=True) as log:
        now += 500.0  # before the first step, which no step will wait for again
        log.log(0, {"eval_loss": 1.0})
        for step in range(1, 101):
            now += 10.0
            log.advance(step)
            log.log(step, {"loss": 1.0})
            if step == 99:
                now += 500.0
                log.log(step, {"eval_loss": 1.0})
    shown = screen.getvalue().split("\r")[-1] if on_a_terminal else capsys.readouterr().out
    assert "3:45:00" in shown  # 900 steps of 15 s each, a tenth of the way


def test_a_resumed_bar_counts_the_time_of_its_own_steps(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    screen = terminal(monkeypatch)
    with RunLog(tmp_path, 1000, progress=True, resume_step=900) as log:
        for step in range(901, 951):
            now += 60.0
            log.advance(step)
    assert "50:00<50:00" in screen.getvalue().split("\r")[-1]


def test_without_progress_only_messages_are_printed(tmp_path, capsys, monkeypatch):
    screen = terminal(monkeypatch)
    with run_log(tmp_path, progress=False) as log:
        log.advance(1)
        log.log(1, {"loss": 0.5})
        log.message("hello")
    assert capsys.readouterr().out == "hello\n"
    assert screen.getvalue() == ""


# Broken streams


def gone_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def gone_terminal():
    master, slave = os.openpty()
    os.close(master)
    return open(slave, "w")


def full_disk():
    return open("/dev/full", "w")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("why", [gone_reader, gone_terminal, full_disk], ids=lambda why: why.__name__)
def test_a_run_survives_broken_output_streams(tmp_path, monkeypatch, why, stream):
    broken = why()
    monkeypatch.setattr(sys, stream, broken)
    with run_log(tmp_path, progress=True) as log:
        for step in range(1, 4):
            log.advance(step)
            log.log(step, {"loss": 0.5})
            log.message("hello")
            safe_print("hello", sys.stderr)
    assert len(lines(tmp_path)) == 3
    if why is not full_disk:  # as at the interpreter's end, whose exit status says that this has failed
        broken.close()


# A full disk


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_an_error_with_file_and_remedy(tmp_path):
    log = run_log(tmp_path)
    with open("/dev/full", "w") as full:
        log._file = full
        with pytest.raises(
            RecordError, match=r"cannot write .*metrics\.jsonl: No space left .*auto continues from the new"
        ):
            log.log(1, {"loss": 0.5})
        with pytest.raises(RecordError, match="cannot write"):  # what is still to be written
            log.close()


# Closing


def test_a_log_is_closed_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError), run_log(tmp_path) as log:
        raise RuntimeError
    with pytest.raises(ValueError, match="closed file"):
        log.log(1, {"loss": 0.5})


def test_closing_twice_does_nothing(tmp_path, monkeypatch):
    terminal(monkeypatch)
    log = run_log(tmp_path, progress=True)
    log.close()
    log.close()
