"""infra/: every file is parsed and held to what it is for, and to the code and the pins that it repeats."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config_file import load_config
from flows.deployments import checked_configuration

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = sorted([*(INFRA / "kuberay").glob("*.yaml"), INFRA / "prefect" / "server.yaml"])
API_VERSIONS = {
    "RayCluster": "ray.io/v1",
    "RayJob": "ray.io/v1",
    "Deployment": "apps/v1",
    "Service": "v1",
    "ServiceAccount": "v1",
    "PersistentVolumeClaim": "v1",
}
ACTIONS = {
    "put_object": "s3:PutObject",
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "delete_object": "s3:DeleteObject",
    "list_objects_v2": "s3:ListBucket",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
}
"""S3's requests -> what allows them (Service Authorization Reference, Amazon S3)."""


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    (cluster,) = [d for d in documents(INFRA / "kuberay" / "raycluster.yaml") if d["kind"] == "RayCluster"]
    (job,) = documents(INFRA / "kuberay" / "rayjob.yaml")
    yield "raycluster", cluster["spec"]
    yield "rayjob", job["spec"]["rayClusterSpec"]


def claims() -> set[str]:
    return {
        d["metadata"]["name"] for path in KUBERNETES for d in documents(path) if d["kind"] == "PersistentVolumeClaim"
    }


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_every_object_has_what_kubernetes_asks_for(path: Path) -> None:
    for document in documents(path):
        assert document["apiVersion"] == API_VERSIONS[document["kind"]]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", document["metadata"]["name"])
        assert "spec" in document or document["kind"] == "ServiceAccount"


@pytest.mark.parametrize(("name", "spec"), list(clusters()), ids=lambda value: value if isinstance(value, str) else "")
def test_clusters(name: str, spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == pins()["ray"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] >= 60
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    groups = spec["workerGroupSpecs"]
    assert groups
    for group in groups:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["maxReplicas"] > 0
    for group in [spec["headGroupSpec"], *groups]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["serviceAccountName"] == "lrpq"
        assert pod["restartPolicy"] == "Never", "KubeRay replaces Ray pods itself"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests == limits, "Ray plans with the limits"
        assert group["rayStartParams"]["num-gpus"] == requests["nvidia.com/gpu"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounted) == set(volumes)
        assert mounted["local"] == "/local", "the image's TMPDIR, where kept block inputs spill"
        assert volumes["memory"]["emptyDir"]["medium"] == "Memory", "Ray's object store"
        named = [v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v]
        assert set(named) <= claims()
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"]
        for entry in environment.values():
            secret = re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", entry["name"])
            assert not secret or "value" not in entry, "no secret stands in a manifest"
        image, tag = container["image"].split(":")
        assert (image, tag) == ("lrpq", f"{version()}-cuda")


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_job_runs_what_there_is() -> None:
    (job,) = documents(INFRA / "kuberay" / "rayjob.yaml")
    spec = job["spec"]
    python, flag, module, option, path = shlex.split(spec["entrypoint"])
    assert (python, flag, option) == ("python", "-m", "--config")
    assert hasattr(import_module(module), "main")
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["backoffLimit"] >= 1, "a job that lost its driver goes on from the store"
    runtime = yaml.safe_load(spec["runtimeEnvYAML"])
    assert int(runtime["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    configured = next(v for v in pod["volumes"] if "configMap" in v)
    assert path == f"{mounts[configured['name']]}/job.toml"


def test_the_jobs_configuration_fits_its_cluster() -> None:
    config = load_config(INFRA / "kuberay" / "job.toml", {})
    (job,) = documents(INFRA / "kuberay" / "rayjob.yaml")
    spec = job["spec"]["rayClusterSpec"]
    pods = 1 + sum(group["maxReplicas"] for group in spec["workerGroupSpecs"])
    assert config.cluster.workers == pods
    assert config.run.shards is not None
    assert config.run.shards % pods == 0
    cpus = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert config.run.threads == int(cpus)
    assert config.store.startswith(f"s3://{bucket()}/{prefix()}")


def test_prefect_server() -> None:
    deployment, service, claim = documents(INFRA / "prefect" / "server.yaml")
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"lrpq:{version()}-cpu"
    assert container["readinessProbe"]["httpGet"]["path"] == "/api/health"
    assert deployment["spec"]["strategy"]["type"] == "Recreate", "SQLite has one writer"
    url = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}/api"
    for _, spec in clusters():
        (ray,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        assert {"name": "PREFECT_API_URL", "value": url} in ray["env"]
    assert claim["metadata"]["name"] == pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]


def test_prefect_deployments() -> None:
    (document,) = documents(INFRA / "prefect" / "prefect.yaml")
    assert document["prefect-version"] == pins()["prefect"]
    by_name = {deployment["name"]: deployment for deployment in document["deployments"]}
    assert by_name["by-hand"]["schedules"] == []
    assert by_name["nightly"]["schedules"][0]["cron"] == "0 3 * * *"
    for deployment in by_name.values():
        path, flow = deployment["entrypoint"].split(":")
        assert (ROOT / path).is_file()
        assert getattr(import_module(path.removesuffix(".py").replace("/", ".")), flow).name == "compress-deployed"
        assert deployment["enforce_parameter_schema"] is True
        assert deployment["work_pool"]["name"] == "lrpq"
        if "parameters" in deployment:
            checked_configuration(deployment["parameters"]["configuration"])


def bucket() -> str:
    return policy()["ListTheStore"]["Resource"].rsplit(":", 1)[1]


def prefix() -> str:
    return policy()["ObjectsOfTheStore"]["Resource"].split("/", 1)[1].removesuffix("/*")


def policy() -> dict[str, Any]:
    document = json.loads((INFRA / "s3" / "policy.json").read_text(encoding="utf-8"))
    assert document["Version"] == "2012-10-17"
    return {statement["Sid"]: statement for statement in document["Statement"]}


def test_the_policy_allows_what_the_store_asks_for_and_nothing_else() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tasks" / "store").glob("*.py")]
    asked = {name for text in sources for name in re.findall(r'call(?:_s3|_quietly)?\(\s*"([a-z_0-9]+)"', text)}
    asked |= {"get_object"}  # by fsspec
    assert asked <= set(ACTIONS), "a request whose permission nobody has looked up"
    allowed = {a for s in policy().values() if s["Effect"] == "Allow" for a in s["Action"]}
    assert allowed == {ACTIONS[name] for name in asked}
    for statement in policy().values():
        if statement["Effect"] == "Allow":
            assert "*" not in "".join(statement["Action"])
    assert policy()["NothingUnencrypted"]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_the_lifecycle_never_touches_an_object_of_a_run() -> None:
    from tasks.store.objects import is_key

    rules = json.loads((INFRA / "s3" / "lifecycle.json").read_text(encoding="utf-8"))["Rules"]
    assert len({rule["ID"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["Status"] == "Enabled"
        below = rule["Filter"]["Prefix"].removeprefix(f"{prefix()}/")
        assert below != rule["Filter"]["Prefix"], "another prefix than the policy's"
        if "Expiration" in rule:
            assert not is_key(below + "x"), "expires what may be an object of a run"
            assert rule["Expiration"]["Days"] >= 7
    assert any("AbortIncompleteMultipartUpload" in rule for rule in rules)


def instructions() -> list[tuple[str, str]]:
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def arguments() -> dict[str, str]:
    return dict(value.split("=", 1) for name, value in instructions() if name == "ARG")


def test_dockerfile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"TORCH = torch=={arguments()['TORCH']}" in makefile
    assert arguments()["INDEX_CPU"].endswith("/cpu")
    assert re.search(r"/cu\d+$", arguments()["INDEX_CUDA"])
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("VOLUME")
    requires = re.search(r'requires-python = ">=(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert requires is not None
    assert arguments()["PYTHON"] == requires[1]
    kept = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {path.removeprefix("./") for path in copied()}, "copied and ignored are the same files"


def copied() -> list[str]:
    return [part for name, value in instructions() if name == "COPY" for part in value.split()[:-1]]


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_the_images_steps_run(device: str, tmp_path: Path) -> None:
    """Every RUN of the Dockerfile in a copy of its context, but for the user's; pip gets packages from nowhere.

    torch and what lrpq requires are installed here: pip is asked for nothing but lrpq itself, into a folder.
    """
    for path in copied():
        source = ROOT / path
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / path)
    environment = {
        **arguments(),
        "DEVICE": device,
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # so it is spelled: pip takes the option's value, which is false
        "PIP_NO_INDEX": "1",
        "PIP_TARGET": str(tmp_path / "installed"),
        "PYTHONPATH": str(tmp_path / "installed"),
        "HOME": str(tmp_path),
    }
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {"-m pip " if name == "pip" else ""}"$@"\n')
        script.chmod(0o755)
    lrpq = tmp_path / "bin" / "lrpq"
    lrpq.write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli "$@"\n')
    lrpq.chmod(0o755)
    ran = []
    for name, command in instructions():
        if name != "RUN" or "useradd" in command or (device == "cuda" and "torch" not in command and ran):
            continue  # the devices differ in torch alone
        if "torch==" in command:  # which index it would take, and what from there
            command = command.replace("pip install", "echo")
        done = subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        if device == "tpu":
            assert done.returncode != 0, "an unknown device ends the build at once"
            return
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        ran.append(done.stdout)
    assert f"--index-url {arguments()['INDEX_' + device.upper()]} torch=={arguments()['TORCH']}" in ran[1]
    if device == "cpu":
        assert (tmp_path / "installed" / "tasks" / "estimate" / "gpus").is_dir(), "data files are in the package"
        assert ran[-1].strip() == f"lrpq {version()}"
