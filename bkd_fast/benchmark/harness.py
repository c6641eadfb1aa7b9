"""Time several providers of one result: check that they agree, then run them in turns."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bkd_fast.benchmark.memory import extra_memory, tensors
from bkd_fast.ops.backend import backend, usable

Call = Callable[[], Any]
Key = tuple[str, int]  # provider, threads
QUANTILES = (0.2, 0.5, 0.8)
MIN_CALLS = 3  # of a provider, however slow it is
CYCLES = 2e9  # of a GPU in a second, about the maximum
MAX_BUSY = 0.02  # seconds that a GPU is kept busy; calls that take longer to launch are timed with their launches
TURNS = 10  # parts of a provider's time; the others run between them
REFERENCE = "PyTorch reference"


class Case(NamedTuple):
    """One operator, or the model, at one shape.

    Attributes:
        op: name of the operator.
        shape: label and sizes, e.g. ``WRN50 N=1 C=256 H=W=64``.
        what: ``forward``, which runs without gradients, or what else belongs to it, e.g. ``forward+backward``.
        providers: name -> call. All must give the same result as the first.
        unchecked: name -> call with another result: lower bounds, and other models.
        tolerance: of the results, relative to the maximum of each.
        inputs: the tensors that the operator is given, for adding a provider.
        device: device type.
        dtype: of the tensors; ``tf32`` is float32 with products in TF32.
        queued: on a GPU, calls that are timed together on the device, without their launches; 0 times each call until
            its result is there.
    """

    op: str
    shape: str
    what: str
    providers: Mapping[str, Call]
    unchecked: Mapping[str, Call] = {}
    tolerance: float = 1e-4
    inputs: tuple[Tensor, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    queued: int = 0


class Row(NamedTuple):
    """A measurement of one provider; times in ms, ``extra`` (see ``extra_memory``) in MB.

    ``elements``: numbers in the first tensor of the inputs; 0 where there is none.
    """

    op: str
    shape: str
    what: str
    provider: str
    threads: int
    p20: float
    p50: float
    p80: float
    extra: float
    dtype: str = "float32"
    elements: int = 0


def measure(case: Case, seconds: float, *, threads: tuple[int, ...] = ()) -> list[Row]:
    """Check a case, then time its providers in turns, so that a disturbance affects all alike.

    Args:
        seconds: time for each provider; one that is too slow for it is still called three times.
        threads: numbers of threads to time each provider with; empty = torch's current number.

    Returns:
        One row per provider and number of threads.

    Raises:
        AssertionError: a provider's result differs from the first one's. Nothing has been timed then.
    """
    before = torch.get_num_threads()
    calls = {
        (name, count): call
        for count in threads or (before,)
        for name, call in {**case.providers, **case.unchecked}.items()
    }
    try:
        with torch.set_grad_enabled(case.what != "forward"):
            _check(case)
            extra = {}
            for key, call in calls.items():
                torch.set_num_threads(key[1])
                extra[key] = extra_memory(call, case.device)
            times = _in_turns(calls, seconds, case.device, case.queued)
    finally:
        torch.set_num_threads(before)
    rows = []
    elements = case.inputs[0].numel() if case.inputs else 0
    for (name, count), values in times.items():
        quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
        p20, p50, p80 = quantiles.tolist()
        measured = (p20, p50, p80, extra[name, count])
        rows.append(Row(case.op, case.shape, case.what, name, count, *measured, case.dtype, elements))
    return rows


def on_backends(operators: Sequence[str], device: str, call: Call) -> dict[str, Call]:
    """Return ``call`` on every backend that has all ``operators``, the default one first."""
    sets = [usable(name, device) for name in operators]
    return {provider(name): _on(name, call) for name in sets[0] if all(name in others for others in sets)}


def provider(name: str) -> str:
    """Return a backend's name in tables."""
    return REFERENCE if name == "reference" else f"bkd_fast {name}"


def _check(case: Case) -> None:
    where = f"{case.op}, {case.shape}, {case.what}"
    first, *others = case.providers
    expected = tensors(case.providers[first]())
    for name in others:
        actual = tensors(case.providers[name]())
        if len(actual) != len(expected):
            raise AssertionError(f"{where}: {name} gives {len(actual)} tensors, {first} {len(expected)}")
        for one, other in zip(actual, expected, strict=True):
            scale = other.abs().max().item() if other.numel() else 0.0
            message = f"{where}: {name} is not equal to {first}: "
            torch.testing.assert_close(
                one, other, rtol=0, atol=case.tolerance * scale, msg=partial(operator.add, message)
            )


def _in_turns(calls: Mapping[Key, Call], seconds: float, device: str, queued: int) -> dict[Key, list[float]]:
    """Return times in ms. In every turn a provider is called until its part of the time is over, at least once."""
    once: Callable[[Call], float] = partial(_on_the_device, queued) if device == "cuda" and queued else _waited_for
    times: dict[Key, list[float]] = {key: [] for key in calls}
    left = list(calls)
    while left:
        for key in left:
            torch.set_num_threads(key[1])
            turn = time.perf_counter() + seconds / TURNS
            while True:
                times[key].append(once(calls[key]))
                if time.perf_counter() >= turn:
                    break
        left = [key for key in left if len(times[key]) < MIN_CALLS or sum(times[key]) < seconds * 1e3]
    return times


def _waited_for(call: Call) -> float:
    """Return the ms from a call until its result is there."""
    wait: Call = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - begin) * 1e3


def _on_the_device(queued: int, call: Call) -> float:
    """Return the ms of each of several calls, launched while the device is kept busy."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    launch = time.perf_counter() - begin
    torch.cuda._sleep(int(min(1.5 * queued * launch, MAX_BUSY) * CYCLES))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(queued):
        call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / queued


def _on(name: str, call: Call) -> Call:
    def run() -> Any:
        with backend(name):
            return call()

    return run
