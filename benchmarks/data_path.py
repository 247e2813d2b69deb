"""How much faster batches are made than a training step uses them: `python benchmarks/data_path.py [overrides]`.

Both are measured in one process, in turns, so that a noisy machine slows both; the median ratio counts.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vecfield_diffusion.apps.train import main, prepare


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(overrides: list[str], rounds: int = 15) -> None:
    """Prints milliseconds per batch and per step, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(main.config("trainer.score_cases=0", *overrides), Path(folder))
        batch = run.batches(0).to(run.device)
        seconds(lambda: run.step(batch).item())
        pairs = [
            (seconds(lambda k=k: run.batches(k)), seconds(lambda: run.step(batch).item())) for k in range(1, rounds + 1)
        ]
    make, use = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    ratio = statistics.median(step / made for made, step in pairs)
    print(
        f"a batch of {run.trainer.batch_size}: made in {make:.1f} ms, used in {use:.1f} ms, {ratio:.1f} times as fast"
    )


if __name__ == "__main__":
    measure(sys.argv[1:])
