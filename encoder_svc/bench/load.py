"""Sends requests: a closed loop, whose clients wait for their answers, or an open loop, whose arrivals do not.

A closed loop finds the throughput at a given concurrency; it slows down with the server. An open loop is what many
independent callers are: it does not, so that it shows queues and overload.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from encoder_svc.bench.recorder import Exchange, Recorder
from encoder_svc.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encoder_svc.bench.mix import Mix
    from encoder_svc.client.aio import AsyncEncoderClient

# A load generator that has fallen so far behind its schedule stops sending what was due.
_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How much to send, and for how long.

    Attributes:
        concurrency: clients of the closed loop.
        rate: requests/s of the open loop; None: closed loop.
        max_outstanding: requests of the open loop that may run at once; beyond them one is counted as not sent.
        duration_s: what is measured, after ``warmup_s``.
        timeout_s: for each request: its deadline.
        seed: of the arrivals.
    """

    concurrency: int = 8
    rate: float | None = None
    max_outstanding: int = 1024
    duration_s: float = 10.0
    warmup_s: float = 2.0
    timeout_s: float = 60.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        recorder: what was seen.
        interrupted: by SIGINT or SIGTERM.
        wall_s: from the first request to the last answer.
        client_cpu_ratio: this process's CPU seconds per second. Near 1 it is the load generator that is full.
    """

    recorder: Recorder
    interrupted: bool
    wall_s: float
    client_cpu_ratio: float


async def run_load(client: AsyncEncoderClient, mix: Mix, options: LoadOptions) -> Run:
    """Loads the server and returns once every answer is in. SIGINT and SIGTERM end the run early, with what it has."""
    began_s, cpu_began_s = time.monotonic(), time.process_time()
    recorder = Recorder(
        began_s=began_s,
        window_starts_s=began_s + options.warmup_s,
        window_ends_s=began_s + options.warmup_s + options.duration_s,
        timeout_s=options.timeout_s,
    )
    load = asyncio.create_task(_Load(client, mix, options, recorder, began_s).run())
    interrupted = False
    with _signals_cancel(load):
        try:
            await load
        except asyncio.CancelledError:
            if not load.cancelled():
                raise
            interrupted = True
    wall_s = time.monotonic() - began_s
    return Run(
        recorder=recorder,
        interrupted=interrupted,
        wall_s=wall_s,
        client_cpu_ratio=(time.process_time() - cpu_began_s) / wall_s,
    )


class _Load:
    def __init__(
        self, client: AsyncEncoderClient, mix: Mix, options: LoadOptions, recorder: Recorder, began_s: float
    ) -> None:
        self._client = client
        self._mix = mix
        self._options = options
        self._recorder = recorder
        self._began_s = began_s
        self._ends_s = recorder.window_ends_s
        self._num_outstanding = 0

    async def run(self) -> None:
        try:
            if self._options.rate is None:
                await self._closed_loop()
            else:
                await self._open_loop(self._options.rate)
        except asyncio.CancelledError:
            self._recorder.interrupt(time.monotonic())
            raise

    async def _closed_loop(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._options.concurrency):
                clients.create_task(self._ask_again_and_again())

    async def _ask_again_and_again(self) -> None:
        while (now_s := time.monotonic()) < self._ends_s:
            await self._ask(due_s=now_s)

    async def _open_loop(self, rate: float) -> None:
        async with asyncio.TaskGroup() as requests:
            for due_s in self._arrivals(rate):
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                late = time.monotonic() >= self._ends_s + _GRACE_S
                if late or self._num_outstanding >= self._options.max_outstanding:
                    self._recorder.not_sent(due_s)
                else:
                    self._num_outstanding += 1
                    requests.create_task(self._ask(due_s=due_s)).add_done_callback(self._settled)

    def _arrivals(self, rate: float) -> Iterator[float]:
        """A Poisson process: gaps are exponential. They depend on the seed alone, never on an answer."""
        arrivals = random.Random(f"arrivals {self._options.seed}")  # noqa: S311
        due_s = self._began_s + arrivals.expovariate(rate)
        while due_s < self._ends_s:
            yield due_s
            due_s += arrivals.expovariate(rate)

    def _settled(self, _: asyncio.Task[None]) -> None:
        self._num_outstanding -= 1

    async def _ask(self, *, due_s: float) -> None:
        images = self._mix.draw()
        exchange = Exchange(due_s=due_s, sent_s=time.monotonic(), num_images=len(images))
        try:
            async for result in self._client.stream(images, timeout_s=self._options.timeout_s):
                now_s = time.monotonic()
                if isinstance(result, RequestError):
                    exchange.errors.append(result)
                    continue
                exchange.num_encoded += 1
                exchange.first_s = exchange.first_s or now_s
                self._recorder.image(result, now_s)
        except RequestError as error:
            exchange.errors.append(error)
        except asyncio.CancelledError:
            self._recorder.unfinished(exchange)
            raise
        exchange.ended_s = time.monotonic()
        self._recorder.ended(exchange)


@contextmanager
def _signals_cancel(task: asyncio.Task[None]) -> Iterator[None]:
    """SIGINT and SIGTERM cancel ``task``, where the loop takes signals (POSIX, the main thread)."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    with suppress(NotImplementedError, RuntimeError, ValueError):
        for number in numbers:
            loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        with suppress(NotImplementedError):
            for number in numbers:
                loop.remove_signal_handler(number)
