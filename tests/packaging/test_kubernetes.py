"""`deploy/kubernetes/`: against the schemas of Kubernetes, and against the service that it runs."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from service.routers import ops
from service.settings import PREFIX, Settings, load_settings
from tests.packaging.deployments import ROOT, services

BASE = ROOT / "deploy" / "kubernetes"
KSERVE = BASE / "kserve"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GUIDE = (ROOT / "deploy" / "README.md").read_text()
KUBERNETES = ("1.30", kubernetes_validate.latest_version())  # the oldest that the manifests are for, and the newest

# Fields of a ServingRuntime's spec: `ServingRuntimeSpec` and `ServingRuntimePodSpec` of KServe's serving/v1alpha1.
RUNTIME_SPEC = {
    "supportedModelFormats", "multiModel", "disabled", "protocolVersions", "workerSpec", "grpcEndpoint",
    "grpcDataEndpoint", "httpDataEndpoint", "replicas", "storageHelper", "builtInAdapter",
}  # fmt: skip
RUNTIME_POD = {
    "containers", "volumes", "nodeSelector", "affinity", "tolerations", "labels", "annotations", "imagePullSecrets",
    "hostIPC",
}  # fmt: skip
MODEL_FORMAT = {"name", "version", "autoSelect", "priority"}


def kustomization(folder: Path) -> dict[str, Any]:
    """What a folder is put together from."""
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


def manifests(folder: Path = BASE) -> list[dict[str, Any]]:
    """Every object of a folder, as it is written."""
    return [
        document
        for name in kustomization(folder)["resources"]
        for document in yaml.safe_load_all((folder / name).read_text())
    ]


def of_kind(kind: str) -> list[dict[str, Any]]:
    """The objects of a kind."""
    return [document for document in manifests() if document["kind"] == kind]


def the(kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    (document,) = of_kind(kind)
    return document


def pod() -> dict[str, Any]:
    """What the Deployment makes."""
    return the("Deployment")["spec"]["template"]


def container() -> dict[str, Any]:
    """The one container of it."""
    (only,) = pod()["spec"]["containers"]
    return only


def runtime() -> dict[str, Any]:
    """KServe's ServingRuntime."""
    (only,) = manifests(KSERVE)
    return only


def containers() -> list[dict[str, Any]]:
    """Every container that runs the service."""
    return [container(), *runtime()["spec"]["containers"]]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("document", manifests(), ids=lambda d: f"{d['kind']}/{d['metadata']['name']}")
def test_every_manifest_fits_its_schema(document: dict[str, Any], version: str) -> None:
    """No field that Kubernetes does not know, none that it misses, in the oldest and the newest version."""
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("folder", [BASE, KSERVE], ids=lambda folder: folder.name)
def test_the_kustomization_lists_every_file(folder: Path) -> None:
    """A manifest that nobody applies is a manifest that lies."""
    assert set(kustomization(folder)["resources"]) == {
        path.name for path in folder.glob("*.yaml") if path.name != "kustomization.yaml"
    }


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl (on Debian: apt install kubernetes-client)")
@pytest.mark.parametrize("folder", [BASE, KSERVE], ids=lambda folder: folder.name)
def test_kustomize_builds_what_is_written(folder: Path) -> None:
    """Nothing is lost on the way, the image gets its tag and the settings their ConfigMap."""
    built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=True)
    documents = list(yaml.safe_load_all(built.stdout))
    generated = [document for document in documents if document["kind"] == "ConfigMap"]
    rest = [document for document in documents if document["kind"] != "ConfigMap"]
    names = [(document["kind"], document["metadata"]["name"]) for document in rest]
    assert sorted(names) == sorted((written["kind"], written["metadata"]["name"]) for written in manifests(folder))
    assert re.findall(r"image: (\S+)", built.stdout) == [services()["service"]["image"]]
    for settings in generated:
        assert f"name: {settings['metadata']['name']}" in yaml.safe_dump(rest)
        kubernetes_validate.validate(settings, KUBERNETES[-1], strict=True)


def test_the_serving_runtime_has_the_fields_that_kserve_reads() -> None:
    """Its spec by the fields of KServe's own types; its containers and volumes as those of any pod."""
    spec = runtime()["spec"]
    assert runtime()["apiVersion"] == "serving.kserve.io/v1alpha1"
    assert runtime()["kind"] == "ServingRuntime"
    assert set(spec) <= RUNTIME_SPEC | RUNTIME_POD
    assert all(set(known) <= MODEL_FORMAT for known in spec["supportedModelFormats"])
    assert [each["name"] for each in spec["containers"]] == ["kserve-container"]
    assert "lifecycle" not in spec["containers"][0]
    own = {name: value for name, value in spec.items() if name in RUNTIME_POD}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "latch"}, "spec": own}, KUBERNETES[-1], strict=True
    )


def test_everything_selects_the_pods_of_the_deployment() -> None:
    """Services, the budget, the policy, the spread and the Deployment mean the same pods; the autoscaler means it."""
    labels = pod()["metadata"]["labels"]
    selectors = [
        the("Deployment")["spec"]["selector"]["matchLabels"],
        the("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        the("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(service["spec"]["selector"] for service in of_kind("Service")),
        *(spread["labelSelector"]["matchLabels"] for spread in pod()["spec"]["topologySpreadConstraints"]),
    ]
    assert all(selector == labels for selector in selectors)
    assert all(document["metadata"]["labels"] == labels for document in [*manifests(), runtime()])
    target = the("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {name: the("Deployment")[name] for name in ("apiVersion", "kind")} | {"name": "latch"}


def test_every_port_leads_to_the_one_that_the_image_listens_on() -> None:
    """From Ingress to Service to container to LATCH_PORT; probes and Prometheus ask there as well."""
    listens = int(next(word for word in DOCKERFILE.split() if word.startswith("LATCH_PORT=")).partition("=")[2])
    (port,) = container()["ports"]
    assert port["containerPort"] == listens
    assert pod()["metadata"]["annotations"]["prometheus.io/port"] == str(listens)
    ports = {service["metadata"]["name"]: service["spec"]["ports"] for service in of_kind("Service")}
    assert all(own == [{"name": "http", "port": listens, "targetPort": port["name"]}] for own in ports.values())
    backends = [
        path["backend"]["service"]
        for ingress in of_kind("Ingress")
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    assert {backend["name"] for backend in backends} == set(ports)
    assert all(backend["port"] == {"name": "http"} for backend in backends)
    (incoming,) = the("NetworkPolicy")["spec"]["ingress"]
    assert incoming["ports"] == [{"protocol": "TCP", "port": port["name"]}]
    for each in containers():
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert each.get(probe, {}).get("httpGet", {}).get("port", listens) in (listens, port["name"])


def test_probes_ask_what_the_service_answers() -> None:
    """Starting and living is /health/live, taking sessions is /health/ready, figures are at /metrics."""
    paths = {route.path for route in ops.router.routes}
    for each in containers():
        assert each["readinessProbe"]["httpGet"]["path"] == "/health/ready"
        assert each["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container()["startupProbe"]["httpGet"]["path"] == "/health/live"
    assert {"/health/ready", "/health/live", pod()["metadata"]["annotations"]["prometheus.io/path"]} <= paths


def test_every_setting_is_known_and_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service starts with the ConfigMap's settings and the containers'."""
    (generated,) = kustomization(BASE)["configMapGenerator"]
    assert container()["envFrom"] == [{"configMapRef": {"name": generated["name"]}}]
    values = dict(literal.split("=", 1) for literal in generated["literals"])
    for each in containers():
        values |= {variable["name"]: variable.get("value", "redis://redis") for variable in each["env"]}
    assert all(name.startswith(PREFIX) for name in values)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert load_settings().store_url == "redis://redis"


def test_kubernetes_sets_no_setting_behind_our_back() -> None:
    """A Service named `latch` would set LATCH_PORT, which is a setting, in every pod of its namespace."""
    assert f"{the('Deployment')['metadata']['name']}_port" == f"{PREFIX}port".lower()
    assert "port" in Settings.model_fields
    assert pod()["spec"]["enableServiceLinks"] is False
    assert "enableServiceLinks: false" in GUIDE.partition("kind: InferenceService")[2]


def test_the_autoscaler_looks_at_figures_that_there_are() -> None:
    """Its metrics are gauges of the service; the adapter's rule in the guide names the same."""
    gauges = {family.name for family in Metrics(CollectorRegistry()).registry.collect() if family.type == "gauge"}
    asked = {m["pods"]["metric"]["name"] for m in the("HorizontalPodAutoscaler")["spec"]["metrics"] if "pods" in m}
    assert asked == {"latch_queue_depth", "latch_sessions"}
    assert asked <= gauges
    (series,) = re.findall(r'__name__=~"(.*?)"', GUIDE)
    assert set(series.split("|")) == asked
    assert "replicas" not in the("Deployment")["spec"]


def test_a_pod_has_the_time_to_drain() -> None:
    """Kubernetes kills after the wait for the endpoints and the service's own stop, not before."""
    command, seconds = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    settings = load_settings()
    drain = (settings.drain_delay_ms + settings.drain_ms) / 1000
    assert pod()["spec"]["terminationGracePeriodSeconds"] > int(seconds) + 2 * drain  # stores have time limits, too


def test_pods_have_no_privilege_and_write_to_tmp_alone() -> None:
    """The image's own user, no capability, a read-only root; models are mounted read-only."""
    user = int(re.findall(r"^USER (\d+)", DOCKERFILE, re.MULTILINE)[0])
    for each, inherited in ((container(), pod()["spec"]["securityContext"]), (runtime()["spec"]["containers"][0], {})):
        context = inherited | each["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == user
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {mount["mountPath"] for mount in each["volumeMounts"] if not mount.get("readOnly")} == {"/tmp"}  # noqa: S108
    assert pod()["spec"]["automountServiceAccountToken"] is False
    mounted = {mount["name"] for mount in container()["volumeMounts"]}
    assert {volume["name"] for volume in pod()["spec"]["volumes"]} == mounted


def test_what_comes_from_outside_is_told_in_the_guide() -> None:
    """A Secret with the store's URL and a claim with the models, under the names that the guide makes them by."""
    refs = [variable["valueFrom"]["secretKeyRef"] for each in containers() for variable in each["env"][-1:]]
    assert all(ref == {"name": "latch-store", "key": "url"} for ref in refs)
    assert "secret generic latch-store --from-literal=url=" in GUIDE
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod()["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert claims == ["latch-models"]
    assert "kind: PersistentVolumeClaim\nmetadata: {name: latch-models}" in GUIDE


def test_the_ingress_hashes_as_haproxy_does() -> None:
    """By the id in the path, which wins over the header; by the header, where there is one; or not at all."""
    keys = {}
    for ingress in of_kind("Ingress"):
        annotations = {
            name.partition("/")[2]: value
            for name, value in ingress["metadata"]["annotations"].items()
            if name.startswith("nginx.ingress.kubernetes.io/")
        }
        assert len(annotations) == len(ingress["metadata"]["annotations"])
        (rule,) = ingress["spec"]["rules"]
        (path,) = rule["http"]["paths"]
        keys[ingress["metadata"]["name"]] = annotations.get("upstream-hash-by"), path["path"]
        assert path["backend"]["service"]["name"] == ingress["metadata"]["name"]
    assert keys == {
        "latch": (None, "/"),
        "latch-by-path": ("$1", "/v1/sessions/([^/]+)"),
        "latch-by-header": ("$http_x_session_id", "/"),
    }
    found = re.match(keys["latch-by-path"][1], "/v1/sessions/motor-7/steps")
    assert found is not None
    assert found[1] == "motor-7"
    assert "hdr(X-Session-ID)" in (ROOT / "deploy" / "haproxy.cfg").read_text()


def test_a_body_that_the_service_takes_passes_the_ingress() -> None:
    """The proxy's limit is the service's."""
    limits = [
        ingress["metadata"]["annotations"].get("nginx.ingress.kubernetes.io/proxy-body-size")
        for ingress in of_kind("Ingress")
        if "nginx.ingress.kubernetes.io/canary" not in ingress["metadata"]["annotations"]
    ]
    assert {int(str(limit).removesuffix("m")) * 2**20 for limit in limits} == {Settings().max_body_bytes}


def test_images_are_those_of_compose() -> None:
    """`latch`, with the tag that compose and `make image` build."""
    name, tag = services()["service"]["image"].split(":")
    assert [each["image"] for each in containers()] == [name, name]
    for folder in (BASE, KSERVE):
        assert kustomization(folder)["images"] == [{"name": name, "newTag": tag}]
