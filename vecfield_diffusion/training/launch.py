"""Training by several processes: joining those that torchrun started, or starting them.

`launched` starts N processes on this machine with the environment that torchrun would give them. They end with the one
that started them, however that ends, and what the first of them to fail says is what it says.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vecfield_diffusion import ranks, threads
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.signals import interruptible, stoppable
from vecfield_diffusion.training.distributed import DataParallel, SingleProcess

#: The class of each strategy; that of sharded weights is imported where it is used, for it takes its time.
STRATEGIES = {"ddp": "distributed.DataParallel", "fsdp": "sharded.ShardedDataParallel"}
#: How a process is started: anew, for what torch has begun in this one cannot be gone on with in another.
CONTEXT = "spawn"
#: Seconds that the others have to say why they failed, when one has.
GRACE = 5.0
#: The way in which a process ended, the most telling first.
DONE, REFUSED, EXIT, FAILED, DIED = "done", "refused", "exit", "failed", "died"
TELLING = (EXIT, REFUSED, DIED, FAILED)


class Outcome(NamedTuple):
    """How a process ended: `kind`, and what it returned, said or ended with."""

    kind: str
    value: Any = None


@contextlib.contextmanager
def joined(strategy: str) -> Iterator[SingleProcess]:
    """The processes of this training, of which this one is one. Those that are not the first are silent.

    Arguments:
        strategy: `ddp` or `fsdp`.
    """
    if ranks.world_size() == 1:
        yield SingleProcess()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    processes = _strategy(strategy)()
    with contextlib.ExitStack() as stack:
        if not processes.first:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield processes
    dist.destroy_process_group()  # after an error the others may no longer be there to agree


def _strategy(name: str) -> type[DataParallel]:
    """Returns the class of a strategy."""
    module, _, kind = STRATEGIES[name].partition(".")
    return getattr(import_module(f"vecfield_diffusion.training.{module}"), kind)


def launched(job: Callable[..., Any], *arguments: Any, devices: int) -> Any:
    """Returns what `job(*arguments)` returns in the first of `devices` processes.

    Arguments:
        job: A function of a module that can be imported.
        arguments: What can be pickled.
        devices: How many processes to start. With one, or where torchrun has started them, the job runs in this one.

    Raises:
        UserError: Another number than torchrun started; a process was killed; or what a process raised.
        SystemExit: A signal stopped them.
    """
    if ranks.world_size() > 1 and devices not in (1, ranks.world_size()):
        raise UserError(
            f"trainer.devices={devices}, but torchrun has started {ranks.world_size()} processes: leave it out"
        )
    if devices <= 1 or ranks.world_size() > 1:  # a number below is refused with all others that are out of range
        return job(*arguments)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context(CONTEXT)
    pipes = [context.Pipe(duplex=False) for _ in range(devices)]
    workers = []
    for number, (_, end) in enumerate(pipes):
        environment = environment_of(number, devices, store.port)
        workers.append(context.Process(target=_work, args=(environment, end, job, arguments), name=f"rank {number}"))
    try:
        with stoppable(lambda: "the last checkpoint is kept"):  # asked a second time
            return _watched(workers, pipes)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()


def environment_of(number: int, count: int, port: int) -> dict[str, str]:
    """Returns the environment of process `number` of `count`, as torchrun sets it; cores are shared out."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    numbers = {ranks.RANK: str(number), ranks.LOCAL_RANK: str(number), ranks.WORLD_SIZE: str(count)}
    cores = {} if threads.chosen() else {"OMP_NUM_THREADS": str(max(1, threads.allowed() // count))}
    return {ranks.LAUNCH: "devices", **address, **numbers, **cores}


def _work(environment: dict[str, str], end: Connection, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """What a started process does: the job, and a word on how it ended."""
    os.setpgrp()  # Ctrl-C goes to the process that started this one, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not threads.chosen():
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.environ |= environment
    sys.stdout.reconfigure(line_buffering=True)
    try:
        outcome = Outcome(DONE, job(*arguments))
    except UserError as error:
        outcome = Outcome(REFUSED, str(error))
    except SystemExit as error:
        outcome = Outcome(EXIT, error.code)
    except BaseException:
        outcome = Outcome(FAILED, traceback.format_exc())
    end.send(outcome)
    end.close()
    sys.stdout.flush()
    os._exit(0)  # after an error communication may hang


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _watched(workers: list[BaseProcess], pipes: list[tuple[Connection, Connection]]) -> Any:
    """Starts the processes, passes signals on, and returns what the first one returns; raises as `launched`."""
    sent: list[int] = []

    def pass_on(number: int) -> None:
        sent.append(number)
        for worker in workers:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, number)

    with interruptible(pass_on):
        for worker, (_, end) in zip(workers, pipes, strict=True):
            worker.start()
            end.close()
        outcomes = _outcomes({number: pipe for number, (pipe, _) in enumerate(pipes)}, workers)
    if sent and any(outcome.kind != DONE for outcome in outcomes.values()):
        raise SystemExit(128 + sent[0])
    return _result(outcomes)


def _outcomes(pipes: dict[int, Connection], workers: list[BaseProcess]) -> dict[int, Outcome]:
    """Returns how the processes ended: all of them, or those that did shortly after the first to fail."""
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(pipes):
        failed = any(outcome.kind != DONE for outcome in outcomes.values())
        left = [number for number in pipes if number not in outcomes]
        signs = {sign: number for number in left for sign in (pipes[number], workers[number].sentinel)}
        ready = wait(list(signs), timeout=GRACE if failed else None)
        if not ready:
            break
        outcomes |= {number: _outcome(pipes[number], workers[number]) for number in {signs[sign] for sign in ready}}
    return outcomes


def _outcome(pipe: Connection, worker: BaseProcess) -> Outcome:
    """Returns what a process said, or how it ended without a word."""
    try:
        if pipe.poll():
            return pipe.recv()
    except EOFError:
        pass
    worker.join()
    return Outcome(DIED, worker.exitcode)


def _result(outcomes: dict[int, Outcome]) -> Any:
    """Returns what the first process returned, or raises the most telling failure."""
    for kind in TELLING:
        for number in sorted(outcomes):
            if outcomes[number].kind == kind:
                _raise(number, outcomes[number])
    return outcomes[0].value


def _raise(number: int, outcome: Outcome) -> None:
    """Raises what a process ended with."""
    if outcome.kind == EXIT:
        raise SystemExit(outcome.value)
    if outcome.kind == REFUSED:
        raise UserError(outcome.value)
    if outcome.kind == FAILED:
        raise RuntimeError(f"process {number} failed:\n{outcome.value}")
    code = outcome.value or 0
    reason = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    raise UserError(
        f"process {number} of the training was ended {reason}, as where memory is full: the others were stopped, and "
        "the same command goes on from the last checkpoint"
    )
