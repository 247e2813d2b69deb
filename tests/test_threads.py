"""Threads: what a machine leaves to a program, and what is fastest there, with clocks and machines of our own."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Barrier

import pytest
import torch

from vecfield_diffusion import threads
from vecfield_diffusion.pool import one_each
from vecfield_diffusion.threads import Tuner, allowed, free, quota


class Machine:
    """Cores that others share: a step takes `work / n`, or many times longer where threads outnumber the free cores."""

    def __init__(self, cores: int, work: float = 1.0) -> None:
        self.cores, self.work, self.free, self.now, self.threads = cores, work, cores, 0.0, cores

    def apply(self, n: int) -> None:
        self.threads = n

    def seconds(self, n: int) -> float:
        return self.work / n if n <= self.free else 70 * self.work

    def steps(self, tuner: Tuner, count: int) -> list[str]:
        found = []
        for _ in range(count):
            tuner.start()
            self.now += self.seconds(self.threads)
            found.append(tuner.stop())
            self.now += 0.5  # a validation between steps is not counted
        return [text for text in found if text]


def made(cores: int, **given: float) -> tuple[Machine, Tuner]:
    machine = Machine(cores, **given)
    return machine, Tuner(cores, machine.apply, lambda: machine.now)


def test_a_machine_of_its_own_is_used_whole():
    machine, tuner = made(2)
    assert machine.steps(tuner, 500) == []
    assert tuner.threads == machine.threads == 2


def test_beside_others_one_thread_is_found_in_the_first_steps():
    machine, tuner = made(2)
    machine.free = 1
    said = machine.steps(tuner, 12)
    assert machine.threads == 1 and len(said) == 1 and said[0].startswith("threads: 1 of 2")
    before = machine.now
    machine.steps(tuner, 1000)
    assert 1000 / (machine.now - 500 - before) > 0.5  # with measurements again and again, of the speed of one thread


def test_many_cores_are_halved_until_it_helps_no_more():
    machine, tuner = made(64)
    machine.free = 20
    machine.steps(tuner, 20)
    assert machine.threads == 16


def test_when_the_speed_falls_it_is_measured_again_and_when_the_others_leave_too():
    machine, tuner = made(2)
    machine.steps(tuner, 30)
    machine.free = 1
    machine.steps(tuner, 20)
    assert machine.threads == 1
    machine.free = 2
    machine.steps(tuner, 3000)
    assert machine.threads == 2


def test_of_equals_the_smaller_is_taken():
    machine, tuner = made(8)
    machine.seconds = lambda n: 1.0 if n < 8 else 0.95
    machine.steps(tuner, 30)
    assert machine.threads == 1


def test_the_quota_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "cgroup"
    own.write_text("0::/user/job\n")
    job = tmp_path / "root" / "user" / "job"
    job.mkdir(parents=True)
    assert quota(tmp_path / "root", own) == 0.0
    (job / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path / "root", own) == 0.0
    (job.parent / "cpu.max").write_text("350000 100000\n")
    assert quota(tmp_path / "root", own) == 3.5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert allowed(tmp_path / "root", own) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 7}, raising=False)
    assert allowed(tmp_path / "root", own) == 2
    (job / "cpu.max").write_text("20000 100000\n")
    assert allowed(tmp_path / "root", own) == 1


def test_the_quota_of_an_older_control_group_counts(tmp_path: Path):
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,cpuacct:/job\n3:memory:/other\n")
    job = tmp_path / "cpu" / "job"
    job.mkdir(parents=True)
    (job / "cpu.cfs_quota_us").write_text("-1\n")
    (job / "cpu.cfs_period_us").write_text("100000\n")
    assert quota(tmp_path, own) == 0.0
    (job / "cpu.cfs_quota_us").write_text("200000\n")
    assert quota(tmp_path, own) == 2.0


def test_cores_without_work_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def between(idle: int, busy: int) -> int:
        stat.write_text("cpu  100 0 0 1000 0 0 0 0 0 0\n")
        after = f"cpu  {100 + busy} 0 0 {1000 + idle} 0 0 0 0 0 0\n"
        monkeypatch.setattr(threads.time, "sleep", lambda seconds: stat.write_text(after))
        return free(8, stat=stat)

    assert [between(80, 0), between(30, 50), between(1, 79)] == [8, 3, 1]
    assert free(1, stat=tmp_path / "none") == 1
    monkeypatch.setattr(os, "getloadavg", lambda: (5.2, 0.0, 0.0))
    assert free(8, stat=tmp_path / "none") == 3


def test_items_are_worked_on_at_once_each_on_one_thread():
    """In their order, and the number of threads is as before afterwards, whatever happened."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    together = Barrier(2, timeout=5)

    def item(number: int) -> tuple[int, int]:
        together.wait()  # for another one
        return number, torch.get_num_threads()

    try:
        with one_each(2) as mapped:
            assert list(mapped(item, range(4))) == [(number, 1) for number in range(4)]
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), one_each() as mapped:
            list(mapped(lambda number: 1 // number, range(3)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
