"""``encoder-svc bench serve`` against a real server, as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving import ENVIRONMENT, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.serving import ServerProcess

QUICK = ("--duration", "1.2", "--warmup-s", "0.2", "--timeout-s", "20")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("bench", "serve", *arguments), check=False, capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )


@pytest.fixture
def small_mix(tmp_path: Path) -> Path:
    path = tmp_path / "mix.json"
    path.write_text('[{"weight": 3, "size": [64, 48]}, {"size": [56, 56], "format": "raw", "images": [1, 2]}]')
    return path


def measured(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    requests = values["requests"]
    assert requests["due"] == requests["sent"] + requests["not_sent"]
    assert requests["sent"] == sum(requests[key] for key in ("succeeded", "partly_failed", "failed", "unfinished"))
    return values


@pytest.mark.alone
def test_closed_loop(server: Callable[..., ServerProcess], small_mix: Path, tmp_path: Path) -> None:
    target, out = server("qwen2_5_vl").target, tmp_path / "out.json"
    done = run("--target", target, "--concurrency", "4", "--mix", small_mix, "--json", out, *QUICK)
    assert done.returncode == 0, done.stderr
    values = measured(out)
    assert values["requests"]["succeeded"] == values["requests"]["due"] > 8
    assert values["images"]["encoded"] >= values["requests"]["succeeded"]
    assert values["errors"] == []
    assert values["load"] | {"mix": None} == {
        "loop": "closed", "concurrency": 4, "rate": None, "max_outstanding": None, "duration_s": 1.2, "warmup_s": 0.2,
        "timeout_s": 20.0, "seed": 0, "unique": True, "mix": None,
    }  # fmt: skip
    assert (values["target"]["family"], values["target"]["attn_backend"]) == ("qwen2_5_vl", "TORCH_SDPA")
    assert values["window_s"] == pytest.approx(1.2)
    latency_s, first_s = values["latency_s"], values["first_embedding_s"]
    assert 0 < latency_s["p50"] <= latency_s["p90"] <= latency_s["p95"] <= latency_s["p99"] <= latency_s["max"]
    assert first_s["mean"] <= latency_s["mean"]
    # A client has one request at a time: N = throughput × latency (Little's law).
    rates = values["rates"]
    assert rates["requests_per_s"] * latency_s["mean"] == pytest.approx(4, rel=0.35)
    assert rates["patches_per_s"] == pytest.approx(4 * rates["rows_per_s"])
    assert rates["goodput_images_per_s"] == pytest.approx(rates["images_per_s"], rel=0.2)
    assert set(values["stages"]) >= {"decode", "queue", "forward"}
    assert "closed loop, concurrency 4" in done.stdout


@pytest.mark.alone
def test_open_loop_sends_at_its_rate(server: Callable[..., ServerProcess], small_mix: Path, tmp_path: Path) -> None:
    target, out = server("qwen2_5_vl").target, tmp_path / "out.json"
    arguments = ("--target", target, "--rate", "25", "--mix", small_mix, "--json", out, *QUICK)
    counts = []
    for _ in range(2):
        assert run(*arguments).returncode == 0
        counts.append(measured(out)["requests"]["due"])
    # 30 are expected, with a standard deviation of 5.5; the same seed gives the same arrivals.
    assert counts[0] == counts[1] == pytest.approx(30, abs=22)
    assert measured(out)["send_lag_s"]["count"] == counts[0]


@pytest.mark.alone
def test_open_loop_counts_what_it_does_not_send(server, small_mix: Path, tmp_path: Path) -> None:
    target, out = server("qwen2_5_vl").target, tmp_path / "out.json"
    run("--target", target, "--rate", "2000", "--max-outstanding", "2", "--mix", small_mix, "--json", out, *QUICK)
    requests = measured(out)["requests"]
    assert requests["due"] == pytest.approx(2400, abs=250)
    assert requests["not_sent"] > requests["sent"] > 0
    assert requests["succeeded"] == requests["sent"]


def test_requests_that_are_refused_are_counted_by_reason(server, tmp_path: Path) -> None:
    target, out = server("qwen2_5_vl", "--max-images", "1").target, tmp_path / "out.json"
    mix = tmp_path / "mix.json"
    mix.write_text('[{"size": [56, 56], "images": 2}, {"size": [56, 56]}]')
    done = run("--target", target, "--concurrency", "2", "--mix", mix, "--json", out, *QUICK)
    assert done.returncode == 0, done.stderr
    values = measured(out)
    assert values["requests"]["failed"] > 0
    assert values["errors"] == [
        {"scope": "request", "code": "INVALID_ARGUMENT", "reason": "REQUEST_TOO_MANY_IMAGES",
         "count": values["requests"]["failed"]}
    ]  # fmt: skip
    assert values["images"]["failed"] == 2 * values["requests"]["failed"]
    assert values["failure_latency_s"]["count"] == values["requests"]["failed"]
    assert "REQUEST_TOO_MANY_IMAGES (INVALID_ARGUMENT, request)" in done.stdout


def test_if_nothing_succeeds_the_exit_code_is_1(server: Callable[..., ServerProcess], small_mix: Path) -> None:
    target = server("qwen2_5_vl", "--max-images", "1").target
    all_refused = (
        "--mix",
        small_mix.with_name("pairs.json"),
        "--concurrency",
        "1",
        "--duration",
        "0.3",
        "--warmup-s",
        "0",
    )
    small_mix.with_name("pairs.json").write_text('[{"size": [56, 56], "images": 2}]')
    done = run("--target", target, *all_refused)
    assert done.returncode == 1
    assert "0 succeeded" in done.stdout


def test_without_a_server_the_exit_code_is_1() -> None:
    done = run("--target", "127.0.0.1:1", *QUICK)
    assert done.returncode == 1
    assert "No encoder service answers at 127.0.0.1:1" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reports_what_was_measured(server, small_mix: Path, tmp_path: Path, number: int) -> None:
    target, out = server("qwen2_5_vl").target, tmp_path / "out.json"
    arguments = ("--target", target, "--mix", small_mix, "--duration", "600", "--warmup-s", "0", "--json", out)
    with subprocess.Popen(
        command("bench", "serve", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"Loading {target} for 600 s")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    assert "interrupted" in stdout
    values = measured(out)
    assert values["interrupted"]
    assert values["requests"]["succeeded"] > 0
    assert 0 < values["requests"]["unfinished"] <= 8
    assert 0.5 < values["window_s"] < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0"], "must be a whole number from 1"),
        (["--concurrency", "4", "--rate", "3"], "not allowed with"),
        (["--concurrency", "8", "--rate", "3"], "not allowed with"),
        (["--rate", "-1"], "must be a number above 0"),
        (["--rate", "nan"], "must be a number above 0"),
        (["--duration", "0"], "must be a number above 0"),
        (["--images-per-request", "3-2"], "the least and the most"),
        (["--seed", "-1"], "must be a whole number from 0"),
        (["--timeout-s", "0"], "--timeout-s must be"),
        (["--mix", "no-such-file.yaml"], "No such file"),
        (["--json", "no-such-folder/out.json"], "not a file in a folder that exists"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str) -> None:
    done = run("--target", "127.0.0.1:1", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
