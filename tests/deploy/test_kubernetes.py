"""The manifests as kustomize builds them, against the schemas of Kubernetes, Prometheus' operator and KEDA."""

import importlib
import os
import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from batching.types import DEFAULT_ROWS
from server.settings import PREFIX, Settings, parse
from tests.deploy.dockerfile import stages
from tests.live import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
KUBERNETES = ("1.30", "1.37")
"""The versions whose schemas the manifests must fit: the oldest and the newest that are asked for."""
OPERATOR = "cloudcoil.models.prometheus_operator.v1"
CUSTOM = {"ScaledObject": "cloudcoil.models.keda.v1alpha1", "ServiceMonitor": OPERATOR, "PrometheusRule": OPERATOR}
"""Modules of the operators' kinds. They take seconds, which every process that collects tests would wait for."""
CLOSING_SECONDS = 5


def built(overlay: str) -> dict[str, Any]:
    """What is applied, by kind."""
    kubectl = shutil.which("kubectl")
    if kubectl is None and not os.environ.get("CI"):
        pytest.skip("kubectl is not installed")
    assert kubectl, "kubectl is not installed"
    done = subprocess.run([kubectl, "kustomize", FOLDER / overlay], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


@pytest.fixture(scope="module", params=["base", "gpu"])
def manifests(request: pytest.FixtureRequest) -> dict[str, Any]:
    return built(request.param)


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return built("gpu")


def check_custom(manifest: dict[str, Any]) -> None:
    """Raises unless a resource of an operator fits its schema, with no field that the schema lacks."""
    kind: Any = getattr(importlib.import_module(CUSTOM[manifest["kind"]]), manifest["kind"])
    read = kind.model_validate(manifest)
    assert read.model_dump(mode="json", by_alias=True, exclude_none=True) == manifest


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_manifest_fits_its_schema(version: str, manifests: dict[str, Any]) -> None:
    assert {"Deployment", "Service", "PodDisruptionBudget", "ConfigMap"} <= set(manifests)
    for kind, manifest in manifests.items():
        if kind in CUSTOM:
            check_custom(manifest)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_a_schema_lacks_is_found(gpu: dict[str, Any]) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(gpu["Service"] | {"nope": 1}, KUBERNETES[0], strict=True)
    for kind in ("ScaledObject", "ServiceMonitor"):
        with pytest.raises(AssertionError):
            check_custom(gpu[kind] | {"spec": gpu[kind]["spec"] | {"nope": 1}})


def test_the_kubelet_waits_longer_than_a_pod_may_take_to_stop(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    drain = Settings.model_fields["drain_timeout_s"].default
    assert pod["terminationGracePeriodSeconds"] > float(pause) + drain + CLOSING_SECONDS


def test_service_budget_monitor_and_scaler_mean_the_deployment(gpu: dict[str, Any]) -> None:
    deployment = gpu["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert gpu["Service"]["spec"]["selector"] == labels
    assert gpu["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert gpu["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == gpu["Service"]["metadata"]["labels"]
    ports = {port["name"] for port in gpu["Service"]["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in gpu["ServiceMonitor"]["spec"]["endpoints"]} <= ports
    assert gpu["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    [trigger] = gpu["ScaledObject"]["spec"]["triggers"]
    assert int(trigger["metadata"]["threshold"]) == DEFAULT_ROWS
    assert "microbatch_queue_depth" in trigger["metadata"]["query"]


def test_a_pod_s_environment_is_settings_alone(manifests: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    name = manifests["Service"]["metadata"]["name"]
    assert f"{name.upper()}_" == PREFIX
    assert pod["enableServiceLinks"] is False  # or MICROBATCH_PORT would be the service's address
    assert pod["containers"][0]["envFrom"][0]["configMapRef"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    for variable, value in manifests["ConfigMap"]["data"].items():
        monkeypatch.setenv(variable, value)
    assert parse([]).log_format == "json"


def test_a_pod_runs_without_rights_on_what_the_image_has(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    image = {stage.name: stage for stage in stages(ROOT / "deploy" / "docker" / "Dockerfile")}["runtime"]
    assert str(pod["securityContext"]["runAsUser"]) == image.last("USER")
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {image.last("VOLUME"), image.last("WORKDIR"), "/tmp"}
    assert {port["containerPort"] for port in container["ports"]} == {int(image.last("EXPOSE"))}


def test_the_alerts_fit_the_operator_s_schema_as_the_guide_makes_them() -> None:
    guide = (FOLDER / "README.md").read_text()
    found = re.search(r"^\{ (printf.*?)\| kubectl apply -f -$", guide, re.MULTILINE | re.DOTALL)
    assert found
    made = subprocess.run(["bash", "-c", "{ " + found[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    check_custom(yaml.safe_load(made.stdout))
