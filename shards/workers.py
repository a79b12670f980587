"""Processes that convert one part each, so that an input that crashes the decoder is only skipped;
and the signals that stop any program of this project.

def work(part, bad_inputs, progress):
    for number, path in enumerate(inputs_of(part)):
        progress(number)                 # before each input
        if number not in bad_inputs:     # {number: reason}, from crashes of earlier attempts
            convert(path)
    progress(None)                       # after the last input

run_parts(work, ["part-000000", "part-000001"], workers=2, bar=tqdm())
"""

import os
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import Pipe, active_children, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread, current_thread, main_thread
from time import monotonic, sleep
from types import FrameType

from tqdm import tqdm

STOPPED = 75  # exit code of a program that is to be started again: EX_TEMPFAIL of sysexits.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT = 600  # seconds for one input; a decoder that hangs is killed

Progress = Callable[[int | None], None]
Work = Callable[[str, dict[int, str], Progress], None]


def exit_on_signals(numbers: Iterable[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
    """Make signals end this program at once, with the exit code STOPPED and one line."""
    for number in numbers:
        signal.signal(number, exit_at_once)
    watch_signals()


def exit_at_once(number: int, frame: FrameType | None = None) -> None:
    """Kill the workers and exit. What is in progress is lost; what is finished is on disk."""
    kill_workers()
    name = signal.Signals(number).name
    print(f"\nstopped by {name}; run the same command again to continue", file=sys.stderr)
    sys.stderr.flush()
    os._exit(STOPPED)


@cache
def watch_signals() -> None:
    """Watch signals in a thread, in case the main thread is blocked in C++.

    Python calls a handler only when the main thread is back in Python. While ranks join a process
    group, that can take hours if one of them has ended.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # Each signal that has a handler writes its number there.
    # A forked worker must not write to the pipe of this process.
    os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
    Thread(target=exit_if_main_thread_cannot, args=(reader,), daemon=True).start()


def exit_if_main_thread_cannot(reader: int) -> None:
    """Call exit_at_once if the main thread has not exited within a second of a signal."""
    while True:
        (number,) = os.read(reader, 1)
        if signal.getsignal(number) is exit_at_once:
            sleep(1.0)
            exit_at_once(number)


def kill_workers() -> None:
    """Kill the worker processes of a program that ends."""
    if current_thread() is main_thread():
        # PyTorch's handler would raise an error for the first killed worker; the others would stay.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in active_children():
        process.kill()


@contextmanager
def without_stop_signals() -> Iterator[None]:
    """Block stop signals until the end of the block, and for good in processes started in it.

    PyTorch's workers install a handler of SIGTERM, so ignoring the signal would not be enough.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Ignore stop signals: in a worker, whose main process kills it, or in a program that ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Worker:
    """A running process and the input that it reports to be reading."""

    process: BaseProcess
    part: str
    number: int | None = None  # of the input; None before the first and after the last input
    since: float = field(default_factory=monotonic)  # time at which the input was begun
    timed_out: bool = False


def run_parts(work: Work, parts: list[str], workers: int, bar: tqdm) -> None:
    """Call work(part, bad_inputs, progress) for each part in its own process, `workers` at a time.

    If a process dies, or needs more than TIME_LIMIT for an input, its part is started again with
    the number of that input in `bad_inputs`. `bar` shows the progress in inputs.

    Raises:
        OSError: a worker raised it, or was killed from outside. The other workers are killed.
        RuntimeError: a worker raised any other exception; the message is its traceback.
    """
    waiting = parts[::-1]
    bad_inputs = defaultdict(dict)  # {part: {number: reason}}
    running = {}  # {connection: Worker}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                part = waiting.pop()
                receiver, sender = Pipe(duplex=False)
                arguments = (work, part, bad_inputs[part], sender, [*running, receiver])
                process = get_context("fork").Process(target=run_part, args=arguments)
                process.start()
                sender.close()
                running[receiver] = Worker(process, part)
            for receiver in wait(list(running), timeout=1):
                worker = running[receiver]
                try:
                    message = receiver.recv()
                except EOFError:
                    del running[receiver]
                    worker.process.join()
                    if worker.process.exitcode:
                        reason = crash_reason(worker, bad_inputs[worker.part])
                        bad_inputs[worker.part][worker.number] = reason
                        waiting.append(worker.part)
                        bar.update(-worker.number - 1)  # the inputs of the part begin again
                    continue
                if isinstance(message, Exception):
                    raise message
                worker.number = message
                worker.since = monotonic()
                bar.update(0 if message is None else 1)
            for worker in running.values():
                if worker.number is not None and monotonic() - worker.since > TIME_LIMIT:
                    worker.timed_out = True
                    worker.process.kill()
    finally:
        for worker in running.values():
            worker.process.kill()
            worker.process.join()


def crash_reason(worker: Worker, bad_inputs: dict[int, str]) -> str:
    """Return how an input killed the process of a worker; raise OSError if no input is to blame."""
    code = worker.process.exitcode
    cause = signal.Signals(-code).name if code < 0 else f"exit {code}"
    if worker.number is None or worker.number in bad_inputs or cause == "SIGTERM":
        raise OSError(f"a worker died ({cause}) at {worker.part}; run the same command again")
    if worker.timed_out and cause == "SIGKILL":
        return f"took longer than {TIME_LIMIT} s to decode"
    return f"crashed the decoder ({cause})"


def run_part(
    work: Work, part: str, bad_inputs: dict[int, str], sender: Connection, receivers: list
) -> None:
    """Do the work of a part in its own process, and send what it reports or raises."""
    ignore_stop_signals()
    # When the parent is gone, sending must fail: no other process may hold the receiving end.
    for receiver in receivers:
        receiver.close()

    def send(message: int | Exception | None) -> None:
        try:
            sender.send(message)
        except BrokenPipeError:
            os._exit(1)

    try:
        work(part, bad_inputs, send)
    except OSError as error:
        location = "" if error.filename else f" (while writing {part})"
        remedy = "finished parts are kept; run the same command again to continue"
        send(OSError(f"{error}{location}; {remedy}"))
    except Exception:
        send(RuntimeError(traceback.format_exc()))
