"""Processes that take turns, so that whatever else the machine does falls on all of them alike: used by other benchmarks."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

Worker = subprocess.Popen[str]


def race(
    script: str, specs: dict[str, dict[str, Any]], rounds: int, warm_up: int = 0, partial: bool = False
) -> dict[str, dict[str, Any]]:
    """Median seconds of a turn of each, and what it says of itself at its end.

    Args:
        script: run as `script --one SPEC`; it makes a `Turns` once it is set up, and takes its turns.
        specs: of each process; `turns`, how many it is to take, is added.
        rounds: turns that count.
        warm_up: turns before them.
        partial: leave out one whose process ends, where else all ends.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    workers = {
        name: subprocess.Popen(
            [sys.executable, script, "--one", json.dumps({**spec, "turns": rounds + warm_up})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for name, spec in specs.items()
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in specs}
    found: dict[str, dict[str, Any]] = {}
    try:
        for name, worker in list(workers.items()):
            _take(workers, name, _answer(worker))  # they are set up one beside the other, and measured one by one
        for _ in range(rounds + warm_up):
            for name, worker in list(workers.items()):
                if (taken := _take(workers, name, _go(worker))) is not None:
                    seconds[name].append(taken[0])
        for name, worker in list(workers.items()):
            if (said := _take(workers, name, _go(worker))) is not None:  # the last turn is waited for too
                found[name] = {"seconds": statistics.median(seconds[name][warm_up:]), **said[0]}
                worker.wait()
    finally:
        for worker in workers.values():
            worker.kill()
    if not partial and len(found) < len(specs):
        raise SystemExit(1)
    return found


def _go(worker: Worker) -> list[Any] | None:
    assert worker.stdin is not None
    try:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    return _answer(worker)


def _answer(worker: Worker) -> list[Any] | None:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    return [json.loads(line)] if line else None


def _take(workers: dict[str, Worker], name: str, answer: list[Any] | None) -> list[Any] | None:
    if answer is None:
        print(f"{name}: its process ended", flush=True)
        workers.pop(name).kill()
    return answer


class Turns:
    """In a worker: waits to be told to go, and tells how long it took."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print goes to the other stream
        self.say(None)

    def say(self, what: Any) -> None:
        print(json.dumps(what), file=self.out, flush=True)

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(1)  # nobody listens any more
        self.start = clock()

    def done(self) -> None:
        self.say(clock() - self.start)


def train_in_turns(trainer: Any) -> None:
    """In a worker: train, a step a turn; ends with what the trainer logged and the peak memory in GB."""
    from transformers import TrainerCallback

    quiet(trainer)
    turns = Turns()

    class Wait(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.done()
            turns.wait()

    trainer.add_callback(Wait())
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {"memory": peak_gb(), "loss": history[0]["loss"], "losses": [entry["loss"] for entry in history]}
    turns.say({**found, "parts": {name: history[0].get(name) for name in ("ce", "kl")}})


def quiet(trainer: Any) -> None:
    """Keep a trainer from printing what it logs."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def clock() -> float:
    """Seconds: of one processor thread on a CPU, those that pass on a GPU."""
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb() -> float:
    """Of this process so far."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
