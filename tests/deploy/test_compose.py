"""deploy/compose.yaml: the format's own rules, and that what it names is there. No engine runs it here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from encoder_svc import __version__

DEPLOY = Path(__file__).parents[2] / "deploy"
TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def bind_mounts() -> list[tuple[str, Path]]:
    return [
        (name, DEPLOY / volume.split(":")[0])
        for name, service in SERVICES.items()
        for volume in service["volumes"]
        if volume.startswith(".")
    ]


def test_it_is_what_the_compose_specification_allows() -> None:
    # The parser takes a tag or a digest; engines take both.
    PyCompose.from_yaml(re.sub(r"@sha256:[0-9a-f]{64}", "", TEXT)).validate()


@pytest.mark.parametrize("wrong", ["reed_only: true", "read_only: maybe"])
def test_the_parser_does_refuse_what_is_wrong(wrong: str) -> None:
    with pytest.raises(ValueError, match="encoder-svc"):
        PyCompose.from_yaml(f"services: {{encoder-svc: {{image: encoder-svc, {wrong}}}}}")


def test_every_mounted_file_is_there() -> None:
    assert len(bind_mounts()) >= 4
    assert [(name, path) for name, path in bind_mounts() if not path.exists()] == []


def test_every_named_volume_is_declared() -> None:
    named = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert {name for name in named if not name.startswith(".")} == set(COMPOSE["volumes"])


def test_images_are_pinned_by_digest_and_ours_by_version() -> None:
    images = {name: service["image"] for name, service in SERVICES.items()}
    assert images.pop("encoder-svc") == f"encoder-svc:{__version__}-cpu"
    assert all(re.search(r":v?\d+\.\d+\.\d+@sha256:[0-9a-f]{64}$", image) for image in images.values())


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_read_only_and_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_every_service_has_a_health_check() -> None:
    """The server's comes with its image."""
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"encoder-svc"}
    assert "HEALTHCHECK" in (DEPLOY.parent / "Dockerfile").read_text()


def test_the_server_is_given_longer_to_stop_than_it_drains() -> None:
    server = yaml.safe_load((DEPLOY.parent / "configs" / "server.yaml").read_text())
    assert int(SERVICES["encoder-svc"]["stop_grace_period"].removesuffix("s")) > server["drain_s"] + 15


def test_prometheus_finds_the_server_by_its_name_and_port() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    [target] = config["scrape_configs"][0]["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert any(published.endswith(f":{port}") for published in SERVICES[name]["ports"])


def test_grafana_is_provisioned_with_the_dashboard_and_its_data_source() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "encoder-svc.yaml").read_text())["providers"]
    grafana = SERVICES["grafana"]
    assert source["url"] == "http://prometheus:9090"
    dashboard = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert dashboard == f"{provider['options']['path']}/encoder-latency.json"
    assert f"./grafana/encoder-latency.json:{dashboard}:ro" in grafana["volumes"]


def test_the_data_source_scrapes_as_often_as_prometheus_does() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    source = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
