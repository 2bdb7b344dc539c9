"""Every overlay of k8s/, as kustomize renders it, holds what it promises."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fednano import __version__
from fednano.client.settings import ClientSettings
from fednano.coordinator.settings import CoordinatorSettings
from fednano.llm.settings import LlmSettings
from fednano.rest_client import RestSettings
from fednano.settings import Settings
from fednano.wire.run_config import RunConfig

from tests.deploy.manifests import ROOT, Manifests, Pod, everything

SETTINGS: dict[str, type[Settings]] = {
    "FEDNANO_LLM_": LlmSettings,
    "FEDNANO_COORDINATOR_": CoordinatorSettings,
    "FEDNANO_CLIENT_": ClientSettings,
    "FEDNANO_ADMIN_": CoordinatorSettings,  # FEDNANO_ADMIN_TOKEN, which the command line shares
    "FEDNANO_": RestSettings,
}
LISTENERS = {
    "llm": {"grpc": "port", "metrics": "metrics_port"},
    "coordinator": {"grpc": "grpc_port", "http": "http_port"},
}
VOLUMES_OF_RESTRICTED = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("FEDNANO_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {e["name"]: e["value"] for e in container.get("env", [])}


def settings_of(variable: str) -> type[Settings]:
    return next(cls for prefix, cls in SETTINGS.items() if variable.startswith(prefix))


# --- Kubernetes' own standards


def test_every_pod_meets_the_restricted_standard(manifests: Manifests) -> None:
    labels = manifests.of("Namespace")["fednano"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod, container in everything(manifests):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True, pod.owner
        assert security["runAsUser"] > 0, pod.owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, pod.owner
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, pod.owner
        kinds = {kind for v in pod.spec.get("volumes", []) for kind in v if kind != "name"}
        assert kinds <= VOLUMES_OF_RESTRICTED, pod.owner


def test_every_container_says_what_it_needs_and_may_have(manifests: Manifests) -> None:
    for pod, container in everything(manifests):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][kind].keys(), pod.owner


def test_whoever_listens_is_probed(manifests: Manifests) -> None:
    probes = {"startupProbe", "readinessProbe", "livenessProbe"}
    found = {}
    for pod in manifests.pods():
        for container in pod.spec["containers"]:
            found[pod.owner] = bool(container.get("ports"))
            assert (probes & container.keys()) == (probes if found[pod.owner] else set()), pod.owner
    assert sum(found.values()) == 3


def test_only_the_tokens_job_gets_a_key_to_the_cluster(manifests: Manifests) -> None:
    accounts = manifests.of("ServiceAccount")
    for account in accounts.values():
        assert account["automountServiceAccountToken"] is False
    for pod in manifests.pods():
        assert pod.spec["serviceAccountName"] in accounts, pod.owner
        mounted = pod.spec["automountServiceAccountToken"]
        assert mounted is (pod.owner == "Job/token"), pod.owner
    [role] = manifests.of("Role").values()
    assert role["rules"][0]["resourceNames"] == ["site-token"]


def test_images_are_pinned_and_need_not_be_pulled_again(rendered: dict[str, Manifests]) -> None:
    for overlay, manifests in rendered.items():
        ours = "ci" if overlay == "ci" else __version__
        for pod, container in everything(manifests):
            name, _, tag = container["image"].partition(":")
            assert tag == (ours if name.startswith("fednano/") else "7"), (overlay, pod.owner)
            assert container.get("imagePullPolicy", "IfNotPresent") == "IfNotPresent", pod.owner


def test_a_stop_is_obeyed_while_python_still_loads(manifests: Manifests) -> None:
    """Process 1 ignores signals that it doesn't handle yet, so ours must not be that."""
    ours = [p for p in manifests.pods() if p.labels["app.kubernetes.io/name"] != "redis"]
    assert len(ours) >= 5
    for pod in ours:
        assert pod.spec["shareProcessNamespace"] is True, pod.owner


def test_the_grace_period_covers_the_pause_and_the_draining(manifests: Manifests) -> None:
    for name, cls in (("llm", LlmSettings), ("coordinator", CoordinatorSettings)):
        [pod] = manifests.selected({"app.kubernetes.io/name": name})
        [container] = pod.spec["containers"]
        pause = re.search(
            r"sleep\D*(\d+)", " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
        )
        assert pause is not None
        drain = cls.model_fields["drain_seconds"].default
        drain = float(environment(container).get(f"FEDNANO_{name.upper()}_DRAIN_SECONDS", drain))
        assert pod.spec["terminationGracePeriodSeconds"] > int(pause[1]) + drain, name


# --- Names that must agree


def test_every_selector_finds_its_pods(manifests: Manifests) -> None:
    for kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
        for name, one in manifests.of(kind).items():
            assert manifests.selected(one["spec"]["selector"]["matchLabels"]), f"{kind}/{name}"
    for name, service in manifests.of("Service").items():
        assert manifests.selected(service["spec"]["selector"]), f"Service/{name}"
    for name, one in manifests.of("StatefulSet").items():
        assert one["spec"]["serviceName"] in manifests.of("Service"), name


def test_nothing_is_referred_to_that_is_not_there(manifests: Manifests) -> None:
    claims = set(manifests.of("PersistentVolumeClaim"))
    for pod, container in everything(manifests):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for volume in volumes.values():
            assert volume.get("configMap", {"name": None})["name"] in {
                None,
                *manifests.of("ConfigMap"),
            }, pod.owner
            secret = volume.get("secret", {"secretName": None})["secretName"]
            assert secret in {None, *manifests.of("Secret")}, pod.owner
            claim = volume.get("persistentVolumeClaim", {"claimName": None})["claimName"]
            assert claim in {None, *claims}, pod.owner
        templates = {"data"} if pod.owner == "StatefulSet/redis" else set()
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts <= volumes.keys() | templates, pod.owner
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in manifests.of("ConfigMap"), pod.owner


def test_services_and_containers_name_the_ports_that_are_bound(manifests: Manifests) -> None:
    for name, service in manifests.of("Service").items():
        for port in service["spec"].get("ports", []):
            for pod in manifests.selected(service["spec"]["selector"]):
                assert pod.ports()[port["targetPort"]] == port["port"], name
    for name, listeners in LISTENERS.items():
        [pod] = manifests.selected({"app.kubernetes.io/name": name})
        fields = settings_of(f"FEDNANO_{name.upper()}_").model_fields
        bound = {port: fields[field].default for port, field in listeners.items()}
        assert pod.ports() == bound


def test_clients_dial_what_is_served(manifests: Manifests) -> None:
    services = manifests.of("Service")
    clients = manifests.selected({"app.kubernetes.io/name": "client"})
    assert {pod.owner for pod in clients} == {"StatefulSet/clients", "Deployment/evaluator"}
    for pod in clients:
        told = environment(pod.spec["containers"][0])
        for name in ("coordinator", "llm"):
            host, _, port = told[f"FEDNANO_CLIENT_{name.upper()}"].partition(":")
            assert int(port) in [p["port"] for p in services[host]["spec"]["ports"]]
    assert services["llm"]["spec"]["clusterIP"] == "None", "clients are to see each replica"


# --- Network policies


def policies_of(manifests: Manifests, pod: Pod, direction: str) -> list[dict[str, Any]]:
    return [
        policy["spec"]
        for policy in manifests.of("NetworkPolicy").values()
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= pod.labels.items()
        and direction in policy["spec"]["policyTypes"]
    ]


def allowed(manifests: Manifests, caller: Pod, called: Pod, port: int) -> bool:
    """Whether the caller may send, and the called one receive."""

    def lets(policies: list[dict[str, Any]], way: str, side: str, other: Pod) -> bool:
        return any(
            peer["podSelector"]["matchLabels"].items() <= other.labels.items()
            and port in [p["port"] for p in rule["ports"]]
            for policy in policies
            for rule in policy.get(way, [])
            for peer in rule.get(side, [])
            if "podSelector" in peer
        )

    out = policies_of(manifests, caller, "Egress")
    into = policies_of(manifests, called, "Ingress")
    return lets(out, "egress", "to", called) and lets(into, "ingress", "from", caller)


def test_pods_reach_what_they_must_and_nothing_else(manifests: Manifests) -> None:
    """Clients: coordinator and LLM over gRPC. Coordinator: Redis. The token's Job: REST."""
    pods = manifests.pods()
    found = {
        (caller.owner, called.owner, port)
        for caller in pods
        for called in pods
        for port in called.ports().values()
        if allowed(manifests, caller, called, port)
    }
    clients = ("StatefulSet/clients", "Deployment/evaluator")
    assert found == {
        *((client, "Deployment/coordinator", 50052) for client in clients),
        *((client, "Deployment/llm", 50051) for client in clients),
        ("Deployment/coordinator", "StatefulSet/redis", 6379),
        ("Job/token", "Deployment/coordinator", 8080),
    }


def test_every_policy_finds_pods_and_every_pod_is_shut_by_default(manifests: Manifests) -> None:
    policies = manifests.of("NetworkPolicy")
    assert policies["deny-all"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        assert manifests.selected(policy["spec"]["podSelector"].get("matchLabels", {})), name
        for rule in (*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])):
            for peer in (*rule.get("from", []), *rule.get("to", [])):
                if "podSelector" in peer:
                    assert manifests.selected(peer["podSelector"]["matchLabels"]), name


# --- Settings


def test_every_variable_is_a_setting(manifests: Manifests) -> None:
    seen = set()
    for pod, container in everything(manifests):
        for variable in environment(container):
            if not variable.startswith("FEDNANO_"):
                continue
            prefix = next(prefix for prefix in SETTINGS if variable.startswith(prefix))
            name = variable.removeprefix("FEDNANO_" if "ADMIN" in prefix else prefix).lower()
            fields = SETTINGS[prefix].model_fields
            assert name in fields or name.removesuffix("_file") in fields, (pod.owner, variable)
            seen.add(variable)
    assert len(seen) > 15


def test_every_service_accepts_what_it_is_told(
    manifests: Manifests, tmp_path: Path, clean: pytest.MonkeyPatch
) -> None:
    """With the files that are mounted, where they are mounted, and what the image sets."""
    image = re.findall(r"^ENV (FEDNANO_\w+)=(\S+)", (ROOT / "docker/Dockerfile").read_text(), re.M)
    for pod, container in everything(manifests):
        told = {**dict(image), **environment(container)}
        held = manifests.mounted(pod, container)
        for path, content in held.items():
            (tmp_path / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path[1:]).write_bytes(content)
        for variable, value in told.items():
            if re.search("_FILE$", variable) and "READY" not in variable:
                assert value in held, (pod.owner, variable)
            clean.setenv(variable, str(tmp_path / value[1:]) if value in held else value)
        for cls in {settings_of(v) for v in environment(container) if v.startswith("FEDNANO_")}:
            check(cls.load({}))


def check(settings: Settings) -> None:
    if isinstance(settings, LlmSettings):
        settings.verifier()
    elif isinstance(settings, ClientSettings):
        settings.check()
    elif isinstance(settings, CoordinatorSettings):
        assert settings.session_key.get_secret_value().startswith("-----BEGIN PRIVATE KEY")
        assert settings.admin_token.get_secret_value()


def test_the_run_is_a_valid_one_for_the_clients_that_there_are(manifests: Manifests) -> None:
    [data] = [m["data"] for m in manifests.of("ConfigMap").values() if "run.yaml" in m["data"]]
    run = RunConfig.model_validate(yaml.safe_load(data["run.yaml"]))
    assert run.min_clients <= manifests.of("StatefulSet")["clients"]["spec"]["replicas"]
    assert run.name == "cluster"  # as the docs call it
