"""The phase timer: its sums, that it does not wait for the device, and that it costs little."""

from __future__ import annotations

import time

import pytest
import torch

from hypo_train.metrics.meter import Meter
from hypo_train.metrics.timing import PHASES, PhaseTimer
from hypo_train.prepare import prepare
from hypo_train.train import train_step

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """``clock(2.0)`` lets two seconds of the host pass."""
    now = 100.0

    def wait(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr("hypo_train.metrics.timing.time.perf_counter", lambda: now)
    return wait


def test_a_phase_entered_inside_another_pauses_it(clock):
    timer = PhaseTimer(CPU)
    with timer.step(), timer.phase("forward"):
        clock(1)
        with timer.phase("loss"):
            clock(2)
            with timer.phase("data"):
                clock(4)
            clock(8)
        clock(16)
    assert timer.read() == {"time/data": 4, "time/forward": 17, "time/loss": 10, "time/other": 0, "time/step": 31}


def test_times_are_means_over_steps(clock):
    timer = PhaseTimer(CPU)
    for seconds in (1, 2):
        with timer.step():
            clock(3)
            for _ in range(2):
                with timer.phase("backward"):
                    clock(seconds)
    with timer.step():
        pass
    assert timer.steps == 3
    times = timer.read()
    assert timer.steps == 0
    assert times == {"time/backward": 2, "time/other": 2, "time/step": 4}
    assert list(times) == ["time/backward", "time/other", "time/step"]


def test_outside_of_a_step_nothing_is_timed(clock):
    timer = PhaseTimer(CPU)
    with timer.phase("sample"):
        clock(5)
    assert timer.read() == {}
    with timer.step():
        clock(1)
    clock(5)
    with timer.phase("sample"):
        clock(5)
    assert timer.read() == {"time/other": 1, "time/step": 1}


def test_reading_resets_the_timer(clock):
    timer = PhaseTimer(CPU)
    with timer.step(), timer.phase("data"):
        clock(1)
    timer.read()
    assert timer.read() == {}
    with timer.step(), timer.phase("optimizer"):
        clock(2)
    assert timer.read() == {"time/optimizer": 2, "time/other": 0, "time/step": 2}


def test_a_phase_that_fails_ends(clock):
    timer = PhaseTimer(CPU)
    with timer.step():
        with pytest.raises(KeyError), timer.phase("data"):
            {}[clock(1)]
        clock(2)
    assert timer.read() == {"time/data": 1, "time/other": 2, "time/step": 3}


def test_an_unknown_phase_and_a_step_in_a_step_are_refused():
    timer = PhaseTimer(CPU)
    with pytest.raises(ValueError, match="'forwards' is not a phase"), timer.phase("forwards"):
        pass
    with timer.step(), pytest.raises(RuntimeError, match="do not nest"), timer.step():
        pass


# Events of a device


class Device:
    """A fake CUDA stream: work is queued with its duration and done by a wait or by ``run``."""

    def __init__(self, monkeypatch):
        self.queue, self.now, self.waits, self.events = [], 0.0, 0, 0
        device = self

        class Event:
            def __init__(self, *, enable_timing):
                assert enable_timing
                device.events += 1

            def record(self, stream):
                self.moment = None
                device.queue.append(self)

            def query(self):
                return self.moment is not None

            def synchronize(self):
                device.waits += 1
                device.run()

            def elapsed_time(self, stop):
                return (stop.moment - self.moment) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")

    def launch(self, seconds):
        self.queue.append(seconds)

    def run(self):
        for work in self.queue:
            if isinstance(work, float):
                self.now += work
            else:
                work.moment = self.now
        self.queue.clear()


def test_only_reading_waits_for_the_device(monkeypatch):
    device = Device(monkeypatch)
    timer = PhaseTimer(torch.device("cuda"))
    for _ in range(3):
        with timer.step(), timer.phase("forward"):
            device.launch(1.0)
            with timer.phase("loss"):
                device.launch(0.5)
    assert (device.waits, timer.steps) == (0, 3)
    assert timer.read() == {"time/forward": 1.0, "time/loss": 0.5, "time/other": 0.0, "time/step": 1.5}
    assert device.waits == 1


def test_events_are_reused_once_the_device_passed_them(monkeypatch):
    device = Device(monkeypatch)
    timer = PhaseTimer(torch.device("cuda"))
    for _ in range(50):
        with timer.step(), timer.phase("backward"):
            device.launch(2.0)
        device.run()
    assert device.events == 4, "start and end of the step and of its phase"
    assert timer.read()["time/backward"] == 2.0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_on_a_gpu_match_its_work():
    timer = PhaseTimer(torch.device("cuda"))
    cycles = 20_000_000
    for _ in range(3):
        with timer.step():
            with timer.phase("forward"):
                torch.cuda._sleep(cycles)
            with timer.phase("backward"):
                torch.cuda._sleep(2 * cycles)
    times = timer.read()
    assert times["time/backward"] == pytest.approx(2 * times["time/forward"], rel=0.2)
    assert times["time/step"] == pytest.approx(times["time/forward"] + times["time/backward"], rel=0.2)


# Its cost


def test_the_timer_costs_under_a_hundredth_of_a_step(settings):
    run = prepare(settings(algorithm="dpo"))
    run.model.train()

    def seconds(function, repeats):
        durations = []
        for i in range(repeats):
            start = time.perf_counter()
            function(i)
            durations.append(time.perf_counter() - start)
        return sorted(durations)[repeats // 2]

    timer = PhaseTimer(CPU)

    def marks(_):
        with timer.step():
            for name in PHASES:
                with timer.phase(name):
                    pass

    meter = Meter()
    step = seconds(lambda i: train_step(run, i, meter), 15)
    assert seconds(marks, 101) < 0.01 * step
