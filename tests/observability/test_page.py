"""The status page in a real browser."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from encoder_svc.observability.catalogue import METRICS
from encoder_svc.observability.metrics import Metrics
from encoder_svc.observability.stages import Stages
from encoder_svc.observability.web import metrics_server
from tests.browser import chromium
from tests.serving import ServerProcess
from tests.traffic import MAX_INFLIGHT_IMAGES, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

NASTY = '<img src=x onerror="alert(1)">\\"\n</script>'
# As main.js has them.
POLL_S = 2
GONE_AFTER_S = 10
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def metrics() -> Metrics:
    """Of a server that is ready."""
    metrics = Metrics()
    metrics.set_build_info(**dict.fromkeys(METRICS["encoder_build_info"].labels, "x") | {"model": NASTY})
    metrics.read_at_scrape({"encoder_ready": lambda: 1.0, "encoder_draining": lambda: 0.0})
    return metrics


def work(metrics: Metrics, num_calls: int, stages: Stages) -> None:
    duration_s = sum(seconds for _, seconds in stages.items())
    for _ in range(num_calls):
        metrics.request_ended("EncodeImages", "OK", "", duration_s)
        metrics.first_embedding("EncodeImages", duration_s)
        metrics.image_ended("encoded", stages)


@contextmanager
def opened(
    browser: Browser, port: int, *, size: dict[str, int] = DESKTOP, scheme: str = "light", broken: bool = False
) -> Iterator[Page]:
    """The page. Until it is closed it may ask nobody but its server, and unless ``broken`` complain of nothing. Its
    clock can be put forward."""
    asked: set[str] = set()
    complaints: list[str] = []
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.on("request", lambda request: asked.add(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
    page.clock.install()
    page.goto(f"http://127.0.0.1:{port}/")
    yield page
    page.close()
    assert asked == {f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/metrics"}
    assert broken or not complaints


def until_the_next_scrape(page: Page) -> None:
    page.clock.fast_forward(POLL_S * 1000)


def wait_for_state(page: Page, state: str) -> None:
    page.wait_for_selector(f"body[data-state={state}]")


def cells(page: Page, table: str) -> dict[str, list[str]]:
    """A table's rows by their first column, without the number of a stage."""
    rows = page.locator(f"#{table} tr").all()
    texts = [[cell.inner_text().replace("\u00a0", " ") for cell in row.locator("th, td").all()] for row in rows]
    return {re.sub(r"^\d+", "", name): values for name, *values in texts}


def test_it_draws_what_happens_between_two_scrapes(browser: Browser, metrics: Metrics, port: int) -> None:
    work(metrics, 50, Stages(forward_s=9.0))  # before the page is opened: not of the last minute
    with metrics_server(metrics.registry, "127.0.0.1", port), opened(browser, port) as page:
        wait_for_state(page, "ready")
        work(metrics, 30, Stages(admission_s=0.001, decode_s=0.009, forward_s=0.030))
        metrics.request_ended("EncodeImages", "RESOURCE_EXHAUSTED", "QUEUE_FULL", 0.001)
        until_the_next_scrape(page)
        page.wait_for_selector("#images >> text=encoded")
        stages = cells(page, "stages")
        assert stages["forward"][:2] == ["30 ms", "75 %"]
        assert stages["decode"][:2] == ["9.0 ms", "23 %"]
        assert stages["all"][0] == "40 ms"
        assert stages.keys() == {"stage", "admission", "decode", "forward", "all"}
        assert cells(page, "images")["encoded"][0] == "30"
        assert cells(page, "refusals")["QUEUE_FULL"] == ["calls", "1", "1"]
        p50, p95, _ = cells(page, "latency")["to the end of the answer"]
        assert (p50, p95) == ("35 ms", "39.5 ms")  # of the bucket from 30 to 40 ms


def test_it_shows_a_real_server_under_load(browser: Browser, tiny_checkpoint: Callable[[str], Path], port: int) -> None:
    options = ("--metrics-port", str(port), "--max-inflight-images", str(MAX_INFLIGHT_IMAGES))
    with (
        ServerProcess("--model", tiny_checkpoint("qwen2_5_vl"), "--device", "cpu", *options) as server,
        Traffic(server.target),
        opened(browser, port) as page,
    ):
        for table, row in (
            ("stages", "forward"),
            ("images", "cached"),
            ("images", "fetched"),
            ("refusals", "INFLIGHT_IMAGES"),
            ("refusals", "IMAGE_FORMAT"),
            ("replica", "TORCH_SDPA"),
        ):
            page.wait_for_selector(f"#{table} >> text={row}")
        figures = {
            tile.get_attribute("data-tile"): tile.locator(".value").inner_text() for tile in page.locator("li").all()
        }
        assert len(figures) == 8
        assert all(re.match(r"[\d,.]+", figure) for figure in figures.values()), figures
        used = float(page.locator("#room dt").nth(1).inner_text().split("\n")[-1].split(" of ")[0])
        assert used <= MAX_INFLIGHT_IMAGES


def test_what_the_server_says_is_text_and_never_markup(browser: Browser, metrics: Metrics, port: int) -> None:
    with metrics_server(metrics.registry, "127.0.0.1", port), opened(browser, port) as page:
        wait_for_state(page, "ready")
        until_the_next_scrape(page)
        page.wait_for_selector("#replica >> text=onerror")
        assert cells(page, "replica")["model"] == [NASTY.replace("\n", " ")]
        assert page.locator("img").count() == 0


def test_a_server_that_is_silent_then_gone_then_back(browser: Browser, metrics: Metrics, port: int) -> None:
    with metrics_server(metrics.registry, "127.0.0.1", port):
        opening = opened(browser, port, broken=True)
        page = opening.__enter__()
        wait_for_state(page, "ready")
        assert page.locator("#gone").is_hidden()
    wait_for_state(page, "stale")
    assert "no connection" in page.locator("#gone").inner_text()
    page.clock.fast_forward(GONE_AFTER_S * 1000)
    wait_for_state(page, "gone")
    assert page.locator("#gone").is_visible()
    assert "Server gone" in page.title()
    with metrics_server(metrics.registry, "127.0.0.1", port):
        until_the_next_scrape(page)
        wait_for_state(page, "ready")
        assert page.locator("#gone").is_hidden()
    opening.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"encoder_ready": 0.0}, "Not ready"),
        (
            {
                "encoder_ready": 0.0,
                "encoder_draining": 1.0,
                "encoder_draining_seconds": 12.0,
                "encoder_drain_limit_seconds": 30.0,
            },
            "Draining: 12 s of 30 s",
        ),
    ],
)
def test_it_says_when_the_replica_takes_no_requests(
    browser: Browser, metrics: Metrics, port: int, state: dict[str, float], says: str
) -> None:
    metrics.read_at_scrape({name: lambda value=value: value for name, value in state.items()})
    with metrics_server(metrics.registry, "127.0.0.1", port), opened(browser, port) as page:
        page.wait_for_selector("body[data-state]")
        assert says in page.locator("#state").inner_text().replace("\u00a0", " ")


def test_it_fits_a_phone(browser: Browser, metrics: Metrics, port: int) -> None:
    with metrics_server(metrics.registry, "127.0.0.1", port), opened(browser, port, size=PHONE) as page:
        wait_for_state(page, "ready")
        work(metrics, 3, Stages(**{f"{name}_s": 12.3456 for name, _ in Stages().items()}))
        metrics.request_ended("EncodeImages", "INVALID_ARGUMENT", "REQUEST_TOO_MANY_PATCHES", 0.1)
        until_the_next_scrape(page)
        page.wait_for_selector("#stages >> text=send_wait")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert page.evaluate("innerWidth") == PHONE["width"]


CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = rgb(getComputedStyle(at).backgroundColor);
      if (alpha > 0) return [r, g, b];
    }
  };
  const texts = [...document.querySelectorAll('body *')].filter(
    (element) => element.checkVisibility() && [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return texts.map((element) => {
    const style = getComputedStyle(element);
    const inBar = element.closest('#stages-bar') && element.previousElementSibling;
    const ground = inBar ? rgb(getComputedStyle(inBar).fill) : behind(element);
    const colour = rgb(element instanceof SVGElement ? style.fill : style.color);
    return [ratio(light(colour), light(ground)), element.textContent];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_as_wcag_asks(browser: Browser, metrics: Metrics, port: int, scheme: str) -> None:
    with metrics_server(metrics.registry, "127.0.0.1", port), opened(browser, port, scheme=scheme) as page:
        wait_for_state(page, "ready")
        work(metrics, 3, Stages(**{f"{name}_s": 0.01 for name, _ in Stages().items()}))
        until_the_next_scrape(page)
        page.wait_for_selector("#stages >> text=send_wait")
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 60
        assert [text for ratio, text in contrasts if ratio < 4.5] == []
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(245, 246, 248)"
        assert light == (scheme == "light")


FIGURES = {
    "seconds": {0: "0 ms", 4.2e-6: "4.2 µs", 0.000_099: "99 µs", 0.0099: "9.9 ms", 0.0997: "99.7 ms", 0.9999: "1.0 s"},
    "amount": {
        0: "0",
        0.001: "< 0.01",
        0.26: "0.26",
        99.7: "99.7",
        99.97: "100",
        12_345.6: "12,346",
        1_048_576: "1.05 M",
    },
    "bytes": {0: "0 B", 999: "999 B", 999.9: "1.0 kB", 99_700_000: "99.7 MB", 2**30: "1.1 GB"},
    "percent": {0: "0 %", 0.000_4: "< 0.1 %", 0.016: "1.6 %", 0.0999: "10 %", 1: "100 %"},
}


@pytest.mark.parametrize("kind", FIGURES)
def test_figures_are_short_and_have_a_unit(browser: Browser, metrics: Metrics, port: int, kind: str) -> None:
    with metrics_server(metrics.registry, "127.0.0.1", port), opened(browser, port) as page:
        page.wait_for_selector("body[data-state]")
        written = {value: page.evaluate(f"(value) => {kind}(value)", value) for value in FIGURES[kind]}
        assert {value: text.replace("\u00a0", " ") for value, text in written.items()} == FIGURES[kind]
        assert page.evaluate(f"{kind}(undefined)") == "–"


def test_quantiles_are_prometheus_own(browser: Browser, metrics: Metrics, port: int) -> None:
    """histogram_quantile's rule: straight lines inside a bucket, the highest finite bound beyond it."""
    text = """h_bucket{le="1.0"} 10\nh_bucket{le="2.0"} 30\nh_bucket{le="4.0"} 39\nh_bucket{le="+Inf"} 40\n"""
    with metrics_server(metrics.registry, "127.0.0.1", port), opened(browser, port) as page:
        found = page.evaluate(
            """(text) => {
                const [before, now] = [parseScrape('', 0), parseScrape(text, 10)];
                const nothing = quantile(0.5, now, now, 'h') ?? null;
                const rate = perSecond(before, now, 'h_bucket', ({ le }) => le === '1.0');
                return [...[0.25, 0.5, 0.75, 0.95, 1].map((q) => quantile(q, before, now, 'h')), nothing, rate];
            }""",
            text,
        )
    expected = [1.0, 1.5, 2.0, 2 + 2 * (38 - 30) / 9, 4.0]
    assert all(math.isclose(a, b) for a, b in zip(found, expected, strict=False))
    assert found[5:] == [None, 1.0]
