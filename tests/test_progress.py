"""A line a minute where there is no terminal: how far, how fast, how long still."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from vecfield_diffusion.progress import Progress, bar, over
from vecfield_diffusion.signals import Interrupted, interruptible, stoppable


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says that somebody looks at it."""

    def isatty(self) -> bool:
        return True


def test_a_line_says_how_far_how_fast_and_how_long_still() -> None:
    clock = Clock()
    work = Progress(120, "fields", "block, OI", clock=clock)
    clock.now = 60.0
    work.update(30)
    assert work.line() == "block, OI: 30 of 120 fields (25%), 0.5 per s, 3 min left"
    clock.now = 120.0
    work.update(6)
    # 36 of 120 in 120 s leave 84 for 280 s; the speed is that of the last minute.
    assert work.line() == "block, OI: 36 of 120 fields (30%), 0.1 per s, 5 min left"
    clock.now = 180.0
    work.update(3)
    assert ", 20 s each, " in work.line()


def test_what_was_done_before_counts_as_done_and_not_as_speed() -> None:
    clock = Clock()
    work = Progress(100, "steps", done=40, clock=clock)
    clock.now = 10.0
    work.update(20, loss="0.5")
    assert work.line() == "60 of 100 steps (60%), loss 0.5, 2 per s, 20 s left"


def test_a_limit_in_minutes_may_say_the_share() -> None:
    clock = Clock()
    work = Progress(1000, "steps", clock=clock)
    clock.now = 30.0
    work.update(10, share=0.5)
    assert work.line() == "10 of about 20 steps (50%), 0.333 per s, 30 s left"
    clock.now = 60.0
    work.update(10, share=1.06)
    assert work.line() == "20 of about 20 steps (100%), 0.333 per s, 0 s left"
    unknown = Progress(None, "evaluations", clock=clock)
    clock.now = 61.0
    unknown.update(3)
    assert unknown.line() == "3 evaluations, 3 per s"


def test_lines_come_also_while_nothing_is_finished_and_end_with_the_work() -> None:
    stream = io.StringIO()
    with Progress(4, "fields", stream=stream, every=0.05) as work:
        time.sleep(0.3)
        work.update(1)
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3 and lines[0].startswith("0 of 4 fields (0%), 0 per s")
    assert any(re.fullmatch(r"1 of 4 fields \(25%\), .* left", line) for line in lines)
    time.sleep(0.2)
    assert stream.getvalue().splitlines() == lines


def test_short_work_says_nothing_and_a_terminal_has_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(2, "fields") as work:
        work.update(2)
    assert capsys.readouterr() == ("", "")
    stream = Terminal()
    with Progress(2, "fields", "block", stream=stream) as work:
        work.update(2, loss="0.5")
    assert "block: 100%" in stream.getvalue() and "loss=0.5" in stream.getvalue()


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_is_an_exception_within_the_block_alone(number: signal.Signals, code: int, name: str) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"^stopped by {name}$") as stop, interruptible():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert stop.value.code == code
    assert signal.getsignal(number) == before


def test_signals_of_a_thread_are_left_alone() -> None:
    code = "import threading\nfrom vecfield_diffusion.signals import interruptible\ndef work():\n"
    code += "    with interruptible(): print('done')\nt = threading.Thread(target=work); t.start(); t.join()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_step_under_way_may_end_but_a_second_ctrl_c_does_not_wait() -> None:
    before, asked = signal.getsignal(signal.SIGINT), []
    with pytest.raises(Interrupted) as stop, interruptible(asked.append):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
    assert asked == [signal.SIGTERM, signal.SIGTERM] and stop.value.code == 130
    assert signal.getsignal(signal.SIGINT) == before


def test_a_program_that_is_stopped_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[int] = []
    with pytest.raises(SystemExit) as stop, stoppable(lambda: f"{len(kept)} of 5 are kept"):
        kept += [1, 2]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert stop.value.code == 143
    assert capsys.readouterr() == ("", "stopped by SIGTERM: 2 of 5 are kept; the same command goes on\n")


def test_parts_are_counted_and_lines_are_written_above(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(over(["a", "b"], "blocks", "reading")) == ["a", "b"]
    for stream in (Terminal(), io.StringIO()):
        with Progress(2, "steps", stream=stream) as work:
            work.write("validation loss 0.5")
        assert "validation" not in stream.getvalue()
    assert capsys.readouterr() == ("validation loss 0.5\n" * 2, "")
