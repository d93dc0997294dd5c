"""Front ends in processes of their own: what callers get through them, and what happens when one ends."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from encoder_svc.client import AsyncEncoderClient, PixelValues
from encoder_svc.config import load_config
from encoder_svc.errors import ConfigError, NotFoundError, OverloadedError, RequestError, UnavailableError
from encoder_svc.observability.catalogue import METRICS
from encoder_svc.observability.merge import what_only_grows
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.request import Observer
from encoder_svc.server.frontends.child import FrontEnd
from encoder_svc.server.frontends.supervisor import FrontEnds
from encoder_svc.server.loading import Loader
from tests.server import in_process
from tests.server.frontends.inside import Inside, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from encoder_svc.client import ImageInput
    from encoder_svc.observability.merge import Counted
    from encoder_svc.server.loading import Loaded

# A client has so many connections, which the system deals out among the front ends.
CONNECTIONS = 12


def noise(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def client_of(inside: Inside) -> AsyncEncoderClient:
    return AsyncEncoderClient(inside.target, connections=CONNECTIONS, timeout_s=60)


async def scraped(inside: Inside, start: str) -> list[float]:
    """Values of the series whose line starts so, in the whole server."""
    lines = (await asyncio.to_thread(generate_latest, inside.metrics.scraped())).decode().splitlines()
    return [float(line.rpartition(" ")[2]) for line in lines if line.startswith(start)]


@pytest.fixture
async def inside(tiny_checkpoint: Callable[[str], Path]) -> AsyncIterator[Inside]:
    async with serving(tiny_checkpoint("qwen2_vl"), cache_bytes="64MiB") as inside:
        yield inside


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
async def test_embeddings_are_those_of_one_process(
    tiny_checkpoint: Callable[[str], Path], photos: list[Path], family: str, place: str
) -> None:
    values = np.random.default_rng(0).standard_normal((16, 1536 if family == "qwen3_vl" else 1176), np.float32)
    images: list[ImageInput] = [*photos, noise(60, 90), PixelValues(values, (1, 4, 4))]
    model = tiny_checkpoint(family)
    async with (
        serving(model, image_processing=place) as inside,
        in_process.serving(model, image_processing=place) as (_, alone),
        client_of(inside) as client,
        AsyncEncoderClient(alone) as other,
    ):
        seen, expected = await client.encode(images), await other.encode(images)
        await inside.until_idle()
    for here, there in zip(seen, expected, strict=True):
        assert here.grid_thw == there.grid_thw
        assert here.content_key == there.content_key
        np.testing.assert_array_equal(here.embeddings, there.embeddings)


async def test_a_hundred_callers_of_one_image_cost_one_forward(inside: Inside) -> None:
    [before] = await scraped(inside, "encoder_batch_images_sum")  # of the start's own image
    async with client_of(inside) as client:
        answers = await asyncio.gather(*(client.encode([noise(200, 200)]) for _ in range(100)))
    assert len({answer[0].embeddings.tobytes() for answer in answers}) == 1
    assert await scraped(inside, "encoder_batch_images_sum") == [before + 1]
    assert await scraped(inside, 'encoder_images_total{outcome="encoded"}') == [1]
    by_outcome = (scraped(inside, f'encoder_images_total{{outcome="{name}"}}') for name in ("shared", "cached"))
    outcomes = [(await values)[0] for values in by_outcome]
    assert sum(outcomes) == 99


async def test_what_one_connection_retains_every_other_fetches(inside: Inside) -> None:
    async with client_of(inside) as client:
        [retained] = await client.retain([noise(80, 80)])
        [encoded] = await client.encode([noise(80, 80)])
        for _ in range(CONNECTIONS):
            [fetched] = await client.fetch([retained.key])
            np.testing.assert_array_equal(fetched.embeddings, encoded.embeddings)
        assert await client.release([retained.key]) == 1
        with pytest.raises(NotFoundError):
            await client.fetch([retained.key])
    await inside.until_idle()


async def test_a_fetch_waits_for_what_another_front_end_retains(inside: Inside) -> None:
    async with client_of(inside) as client:
        retaining = asyncio.create_task(client.retain([noise(1000, 1000)]))
        while not (promised := list(inside.core.promises._promised)):
            assert not retaining.done()
            await asyncio.sleep(0)
        fetched = await asyncio.gather(*(client.fetch(promised) for _ in range(CONNECTIONS)))
        assert {image.content_key for [image] in fetched} == {(await retaining)[0].key}


async def test_more_than_there_is_room_for_is_refused_in_every_front_end(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    async with serving(tiny_checkpoint("qwen2_vl"), max_inflight_images=4) as inside, client_of(inside) as client:
        calls = (client.encode([noise(300, 300, seed=seed)]) for seed in range(100))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
        assert len(refused) + sum(isinstance(answer, list) for answer in answers) == 100
        assert {answer.reason for answer in refused} <= {"INFLIGHT_IMAGES", "QUEUE_FULL"}
        assert refused
        assert all(answer.retry_after_s for answer in refused)
        await inside.until_idle()


async def test_a_bad_image_fails_alone_with_its_own_reason(inside: Inside) -> None:
    async with client_of(inside) as client:
        bad, good = await client.encode([b"\xff\xd8 no jpeg", noise(60, 60)], return_errors=True)
    assert isinstance(bad, RequestError)
    assert bad.reason.startswith("IMAGE_")
    assert not isinstance(good, RequestError)
    await inside.until_idle()


async def test_half_of_the_callers_leave_and_leave_nothing(tiny_checkpoint: Callable[[str], Path]) -> None:
    chance = random.Random(1)
    async with serving(tiny_checkpoint("qwen2_5_vl")) as inside, client_of(inside) as client:
        at_once = asyncio.Semaphore(50)
        stayed: dict[int, bytes] = {}

        async def one(index: int) -> None:
            async with at_once:
                # Every image is asked for twice, so that some who lead leave others behind.
                image = noise(40 + index % 100, 60, seed=index // 2)
                call = asyncio.create_task(client.encode([image]))
                if index % 2:
                    await asyncio.sleep(chance.uniform(0, 0.3))
                    call.cancel()
                await asyncio.wait([call])
                if not call.cancelled():
                    stayed[index] = call.result()[0].embeddings.tobytes()

        await asyncio.gather(*map(one, range(400)))
        assert {index for index in range(400) if index % 2 == 0} <= stayed.keys()
        assert len(stayed) < 390
        await inside.until_idle()
        for index in chance.sample(sorted(stayed), 40):
            [again] = await client.encode([noise(40 + index % 100, 60, seed=index // 2)])
            seen = np.frombuffer(stayed[index], np.float32)
            np.testing.assert_allclose(seen, again.embeddings.ravel(), rtol=0, atol=1e-4 * np.abs(seen).max())


async def test_one_that_is_killed_gives_all_back_and_another_takes_its_place(inside: Inside) -> None:
    before = inside.pids()
    async with client_of(inside) as client:
        await asyncio.gather(*(client.encode([noise(60, 60, seed=seed)]) for seed in range(24)))
        counted = sum(await scraped(inside, 'encoder_images_total{outcome="encoded"}'))
        large = [noise(700, 700, seed=seed) for seed in range(24)]
        calls = [asyncio.create_task(client.encode([image], timeout_s=600)) for image in large]
        while inside.core.admission.num_requests < 2:
            assert not all(call.done() for call in calls)
            await asyncio.sleep(0.01)
        os.kill(before[0], signal.SIGKILL)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        lost = [answer for answer in answers if isinstance(answer, BaseException)]
        assert all(isinstance(answer, UnavailableError) for answer in lost)
        assert len(lost) < 24  # those of the other front end
        await inside.until_idle()
        while len(inside.pids()) < 2 or inside.front_ends._now()[0]._guest is None:
            await asyncio.sleep(0.05)
        assert before[1] in inside.pids()
        assert before[0] not in inside.pids()
        assert await scraped(inside, "encoder_frontend_restarts_total") == [1]
        assert sum(await scraped(inside, 'encoder_images_total{outcome="encoded"}')) >= counted
    async with client_of(inside) as client:  # of new connections, some are the new one's
        for seed in range(CONNECTIONS):
            await client.encode([noise(60, 60, seed=100 + seed)])


async def test_the_memory_of_one_that_is_killed_goes_with_it_and_waits_for_no_collector(inside: Inside) -> None:
    def mapped() -> int:
        return sum("encoder-svc-images" in line for line in Path("/proc/self/maps").read_text().splitlines())

    assert mapped() == 2
    async with client_of(inside) as client:
        await asyncio.gather(*(client.encode([noise(60, 60, seed=seed)]) for seed in range(24)))
    gc.disable()
    try:
        os.kill(inside.pids()[0], signal.SIGKILL)
        while mapped() == 2:
            await asyncio.sleep(0.01)
        while len(inside.pids()) < 2 or inside.front_ends._now()[0]._guest is None:
            await asyncio.sleep(0.05)
        assert mapped() == 2
    finally:
        gc.enable()


async def test_a_scrape_finds_every_metric(inside: Inside) -> None:
    names = {name for name in METRICS if await scraped(inside, name)}
    assert names == METRICS.keys()
    assert await scraped(inside, "encoder_decoded_bytes_limit") == [2**31]


async def test_a_scrape_never_finds_less_than_the_one_before(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    def cpu_s() -> float:
        """What the front ends say of themselves, those that are gone too."""
        return inside.front_ends.count()["process_cpu_seconds_total", ()].value

    def while_it_is_removed(samples: Counted) -> Counted:
        seen.append(cpu_s())
        return what_only_grows(samples)

    async def fail(front_end: FrontEnd, *_: object) -> None:
        await front_end.count()
        seen.append(cpu_s())
        raise ConfigError("No memory.")

    seen = [await asyncio.to_thread(cpu_s)]
    monkeypatch.setattr("encoder_svc.server.frontends.supervisor._COUNT_TIMEOUT_S", 0.01)
    monkeypatch.setattr("encoder_svc.server.frontends.supervisor.what_only_grows", while_it_is_removed)
    with monkeypatch.context() as broken:
        broken.setattr(FrontEnd, "open", fail)
        os.kill(inside.pids()[0], signal.SIGKILL)
        while inside.front_ends.num_restarts < 2:
            await asyncio.sleep(0.02)
        seen.append(cpu_s())
    assert len(seen) >= 5
    assert seen == sorted(seen)


async def test_a_process_that_cannot_be_started_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        await FrontEnd.start(0, 0)
    assert os.listdir("/proc/self/fd") == before


async def test_front_ends_that_do_not_stay_end_the_server(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder_svc.server.frontends.supervisor._PAUSE_S", 0.01)
    async with serving(tiny_checkpoint("qwen2_vl"), exit_code=5) as inside:
        while not inside.front_ends.has_failed:
            for pid in inside.pids():
                with suppress(ProcessLookupError):  # reaped already, and not yet missed
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.05)


async def test_a_broken_device_is_told_in_every_front_end(tiny_checkpoint: Callable[[str], Path]) -> None:
    async with serving(tiny_checkpoint("qwen2_vl"), exit_code=3) as inside, client_of(inside) as client:
        calls = [asyncio.create_task(client.encode([noise(900, 900, seed=seed)])) for seed in range(8)]
        while inside.core.engine.queued_images < 1:
            assert not all(call.done() for call in calls)
            await asyncio.sleep(0.01)
        inside.core.engine.give_up("by this test")
        answers = await asyncio.gather(*calls, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, RequestError)]
        assert {answer.reason for answer in failed} == {"DEVICE_BROKEN"}


async def test_a_server_whose_front_ends_do_not_start_says_so(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ConfigError, match="a front end did not start"):
        async with serving(tiny_checkpoint("qwen2_vl")):
            pass


async def test_one_that_hangs_is_ended_and_another_takes_its_place(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder_svc.server.frontends.child._ALIVE_S", 1.0)
    async with serving(tiny_checkpoint("qwen2_vl")) as inside:
        before = inside.pids()
        os.kill(before[0], signal.SIGSTOP)
        while before[0] in inside.pids() or len(inside.pids()) < 2:
            await asyncio.sleep(0.1)
        assert before[1] in inside.pids()
        async with client_of(inside) as client:
            await asyncio.gather(*(client.encode([noise(60, 60, seed=seed)]) for seed in range(CONNECTIONS)))


async def test_health_says_that_the_process_of_the_device_stands_still(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder_svc.server.frontends.child._ALIVE_S", 1.0)
    status = health_pb2.HealthCheckResponse
    async with (
        serving(tiny_checkpoint("qwen2_vl"), frontend_processes=1) as inside,
        grpc.aio.insecure_channel(inside.target) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == status.SERVING
        with monkeypatch.context() as silent:
            silent.setattr(FrontEnd, "_ask", lambda front_end, what, **fields: asyncio.sleep(0))
            assert (await watch.read()).status == status.NOT_SERVING
        assert (await watch.read()).status == status.SERVING


async def test_a_drain_does_not_wait_for_one_that_hangs(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder_svc.server.frontends.child._FAREWELL_S", 0.5)
    async with serving(tiny_checkpoint("qwen2_vl"), drain_s=0.5) as inside:
        for pid in inside.pids():
            os.kill(pid, signal.SIGSTOP)
        began_s = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began_s < 10


async def test_a_drain_asks_nothing_of_one_that_is_still_being_started(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starting = asyncio.Event()

    async def begin(*_: object) -> None:
        starting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("encoder_svc.server.frontends.supervisor._PAUSE_S", 0.01)
    async with serving(tiny_checkpoint("qwen2_vl"), frontend_processes=1) as inside:
        monkeypatch.setattr(FrontEnd, "begin", begin)
        os.kill(inside.pids()[0], signal.SIGKILL)
        await starting.wait()
        assert len(inside.pids()) == 1
    assert "did not live to drain" not in caplog.text


async def test_one_that_cannot_be_replaced_leaves_the_others_at_work(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder_svc.server.frontends.child.YOUNG_S", 0.2)
    monkeypatch.setattr("encoder_svc.server.frontends.supervisor.YOUNG_S", 0.2)
    monkeypatch.setattr("encoder_svc.server.frontends.supervisor._PAUSE_S", 0.01)
    await asyncio.sleep(0.3)
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", "/bin/false")
        os.kill(inside.pids()[0], signal.SIGKILL)
        while inside.front_ends.num_restarts < 5:
            await asyncio.sleep(0.02)
    assert not inside.front_ends.has_failed
    async with AsyncEncoderClient(inside.target, timeout_s=30) as client:
        await client.encode([noise(60, 60)])


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.6])
async def test_one_that_ends_while_the_model_loads_is_replaced(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    load = Loader.load

    async def killing(loader: Loader, *arguments: Any) -> Loaded:
        loaded = await load(loader, *arguments)
        [front_ends] = started
        os.kill(front_ends._now()[0].pid, signal.SIGKILL)
        await asyncio.sleep(after_s)
        return loaded

    started: list[FrontEnds] = []
    start = FrontEnds.start

    async def starting(front_ends: FrontEnds) -> int:
        started.append(front_ends)
        return await start(front_ends)

    monkeypatch.setattr(Loader, "load", killing)
    monkeypatch.setattr(FrontEnds, "start", starting)
    async with serving(tiny_checkpoint("qwen2_vl")) as inside:
        while len(inside.pids()) < 2 or not all(one._opened_s < 1e9 for one in inside.front_ends._now()):
            await asyncio.sleep(0.05)
        async with client_of(inside) as client:
            await asyncio.gather(*(client.encode([noise(60, 60, seed=seed)]) for seed in range(CONNECTIONS)))
        await inside.until_idle()


async def test_what_is_no_key_troubles_no_other_process(inside: Inside) -> None:
    async with client_of(inside) as client:
        with pytest.raises(NotFoundError):
            await client.fetch(["x" * 20_000_000])
        assert await client.release(["x" * 20_000_000]) == 0
    assert inside.core.engine.queued_images == 0


async def test_calls_that_are_lost_while_draining_were_cut_short(
    tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    images = [noise(700, 700, seed=seed) for seed in range(24)]
    async with serving(tiny_checkpoint("qwen2_vl"), exit_code=4) as inside:
        client = client_of(inside)
        calls = [asyncio.create_task(client.encode(images)) for _ in range(3)]
        while inside.core.admission.num_requests < 3:
            assert not all(call.done() for call in calls)
            await asyncio.sleep(0.01)
        for pid in inside.pids():  # ends none of its calls in the drain, which begins with the end of this block
            os.kill(pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(0.3, os.kill, pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    await client.close()
    assert all(isinstance(outcome, RequestError) for outcome in outcomes)
    assert "did not live to drain" in caplog.text


async def test_what_takes_long_to_import_is_left_until_it_is_needed() -> None:
    """A start's own imports come first. Calls are refused meanwhile."""

    def with_torch(pid: int) -> bool:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()

    config = load_config(flags={"port": 0, "frontend_processes": 1, "device": "cpu"}, environment={}).config
    front_ends = FrontEnds(config, Observer(Metrics()))
    port = await front_ends.start()
    try:
        [front_end] = front_ends._now()
        async with AsyncEncoderClient(f"127.0.0.1:{port}", timeout_s=30) as client:
            with pytest.raises(UnavailableError, match="STARTING"):
                await client.encode([noise(60, 60)])
            assert not with_torch(front_end.pid)
            front_ends.prepare()
            while not with_torch(front_end.pid):
                await asyncio.sleep(0.05)
            with pytest.raises(UnavailableError, match="STARTING"):
                await client.encode([noise(60, 60)])
    finally:
        await front_ends.stop(at_once=True)
