"""What kustomize makes of k8s/, as plain objects, and how two of its results differ."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
# Overlays of the tree, and one of our own: base with the component that nobody else uses.
RENDERED = ("base", "local", "gpu", "ci", "autoscaling")
_AUTOSCALING = """\
namespace: fednano
resources: [../../base]
components: [../../components/autoscaling]
"""
_HASHED = re.compile(r"-[a-z0-9]{10}$")
_BY = ("name", "mountPath")  # what the items of a list are known by


@dataclass(frozen=True)
class Pod:
    """A pod template, and whose it is."""

    owner: str  # Kind/name
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def ports(self) -> dict[str, int]:
        """By name, those of all its containers."""
        ports = [port for c in self.containers for port in c.get("ports", [])]
        return {port["name"]: port["containerPort"] for port in ports}


@dataclass(frozen=True)
class Manifests:
    """The objects that one overlay renders to, and the YAML."""

    text: str

    @cached_property
    def objects(self) -> list[dict[str, Any]]:
        return list(yaml.safe_load_all(self.text))

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """By name."""
        return {o["metadata"]["name"]: o for o in self.objects if o["kind"] == kind}

    def pods(self) -> list[Pod]:
        found = [o for o in self.objects if "template" in o.get("spec", {})]
        return [
            Pod(
                f"{o['kind']}/{o['metadata']['name']}",
                o["spec"]["template"]["metadata"]["labels"],
                o["spec"]["template"]["spec"],
            )
            for o in found
        ]

    def selected(self, selector: dict[str, str]) -> list[Pod]:
        """The pods that bear all these labels."""
        return [pod for pod in self.pods() if selector.items() <= pod.labels.items()]

    def mounted(self, pod: Pod, container: dict[str, Any]) -> dict[str, bytes]:
        """The files that a container finds in its mounted Secrets and ConfigMaps, by path."""
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        return {
            f"{mount['mountPath']}/{name}": content
            for mount in container.get("volumeMounts", [])
            for name, content in self._files(volumes.get(mount["name"], {})).items()
        }

    def _files(self, volume: dict[str, Any]) -> dict[str, bytes]:
        if "configMap" in volume:
            data = self.of("ConfigMap")[volume["configMap"]["name"]]["data"]
            return {name: text.encode() for name, text in data.items()}
        if "secret" not in volume:
            return {}
        data = self.of("Secret")[volume["secret"]["secretName"]].get("data", {})
        files = {name: base64.b64decode(text) for name, text in data.items()}
        # Keys that are filled in later, by the Job `token`.
        awaited = {i["path"]: b"awaited" for i in volume["secret"].get("items", [])}
        return {**awaited, **files}


def everything(manifests: Manifests) -> Iterator[tuple[Pod, dict[str, Any]]]:
    pairs = [(pod, container) for pod in manifests.pods() for container in pod.containers]
    assert len(pairs) >= 6
    yield from pairs


def copy_with_secrets(where: Path) -> Path:
    """A copy of k8s/ with secrets of its own: nothing is written into the tree."""
    copy = where / "k8s"
    shutil.copytree(ROOT / "k8s", copy, ignore=lambda folder, _: _secrets(Path(folder)))
    script = ROOT / "docker" / "make-secrets.sh"
    subprocess.run(
        ["sh", script, copy / "base" / "secrets"], check=True, capture_output=True, timeout=60
    )
    own = copy / "overlays" / "autoscaling"
    own.mkdir()
    (own / "kustomization.yaml").write_text(_AUTOSCALING)
    return copy


def _secrets(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.name == "secrets" else []


def render(kubectl: str, copy: Path, overlay: str) -> Manifests:
    """Raises CalledProcessError where kustomize refuses."""
    folder = copy / "base" if overlay == "base" else copy / "overlays" / overlay
    done = subprocess.run(
        [kubectl, "kustomize", folder], check=True, capture_output=True, text=True, timeout=60
    )
    return Manifests(done.stdout)


def differences(one: Manifests, other: Manifests) -> set[str]:
    """`Kind/name path` of whatever is not the same, or is in one of them only."""
    left, right = _keyed(one), _keyed(other)
    found = set()
    for name in left.keys() | right.keys():
        if name not in left or name not in right:
            found.add(name)
        else:
            found |= {f"{name} {path}" for path in _unlike(left[name], right[name], "")}
    return {path.replace("spec.template.spec.", "spec...") for path in found}


def _keyed(manifests: Manifests) -> dict[str, Any]:
    """Objects by kind and name, without the hashes of what names of generated ones end in."""
    text = manifests.text
    for name in (*manifests.of("ConfigMap"), *manifests.of("Secret")):
        if _HASHED.search(name):
            text = text.replace(name, _HASHED.sub("", name))
    return {f"{o['kind']}/{o['metadata']['name']}": o for o in yaml.safe_load_all(text)}


def _unlike(one: Any, other: Any, path: str) -> Iterator[str]:
    left, right = _parts(one, path), _parts(other, path)
    if left is None or right is None:
        if one != other:
            yield path
        return
    for key in left.keys() | right.keys():
        here = f"{path}{key}".removeprefix(".")
        if key in left and key in right:
            yield from _unlike(left[key], right[key], here)
        else:
            yield here


def _parts(value: Any, path: str) -> dict[str, Any] | None:
    """What a value consists of, by how its parts are written in a path; None where it is one."""
    if isinstance(value, list):
        return {f"[{_known_by(item, index)}]": item for index, item in enumerate(value)}
    if isinstance(value, dict):
        return {f"[{key}]" if "." in key else f".{key}": part for key, part in value.items()}
    if path.endswith(".yaml]"):
        return _parts(yaml.safe_load(value), "")
    return None


def _known_by(item: Any, index: int) -> Any:
    keys = [key for key in _BY if isinstance(item, dict) and key in item]
    return item[keys[0]] if keys else index
