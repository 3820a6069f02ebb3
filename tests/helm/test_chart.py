"""The chart: what real helm renders from its sets of values, and what it refuses."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from fastapi.routing import iter_route_contexts

from api.app import create_app
from farm.config import Settings
from farm.pipelines.catalog import load_catalog
from tests.helm.charts import (
    CASES,
    CHART,
    HELMS,
    NEWEST,
    OLDEST,
    OPERATORS,
    Object,
    by_kind,
    helm,
    objects,
    pods,
    refusal,
    template,
    variables,
)

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
EXTENSIONS = ("keda.sh/", "monitoring.coreos.com/", "gateway.networking.k8s.io/")
"""API groups that are not part of Kubernetes. test_extensions.py checks them."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", [pytest.param("helm3", marks=pytest.mark.slow), "helm4"])
def test_helm_finds_nothing_wrong(case: str, version: str) -> None:
    done = helm("lint", "--strict", str(CHART), f"--values={CHART}/ci/{case}.yaml", version=version)
    assert done.returncode == 0, done.stdout
    assert objects(case, version=version) == objects(case)


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_objects_have_the_form_that_kubernetes_demands(case: str, kubernetes: str) -> None:
    if case == "weights-image" and kubernetes == OLDEST:
        assert "image volumes need Kubernetes 1.33" in refusal(case, kubernetes=OLDEST)
        return
    for each in objects(case, kubernetes=kubernetes):
        if not each["apiVersion"].startswith(EXTENSIONS):
            kubernetes_validate.validate(each, kubernetes.removesuffix(".0"), strict=True)


def test_the_check_of_forms_sees_a_wrong_type() -> None:
    [api] = [each for each in objects("minimal") if each["metadata"]["name"] == "farm-api"][:1]
    wrong = {**api, "spec": {**api["spec"], "maxUnavailable": [1]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


@pytest.mark.parametrize("case", CASES)
def test_every_pod_passes_the_restricted_profile(case: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    for name, pod in pods(objects(case)):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        for volume in pod.get("volumes", []):
            assert "hostPath" not in volume, name
        for container in every_container(pod):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert own["readOnlyRootFilesystem"] is True, name


@pytest.mark.parametrize("case", CASES)
def test_every_container_says_what_it_needs(case: str) -> None:
    for name, pod in pods(objects(case)):
        for container in every_container(pod):
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name
            assert "cpu" not in container["resources"]["limits"], name
            assert not container["image"].endswith(":latest"), name
            assert re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]), name
            assert all(count == 1 for count in names_of(container).values()), name
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            declared = {volume["name"] for volume in pod["volumes"]}
            assert declared <= mounted <= declared | {"data"}, name  # data: a claim template's


def every_container(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def names_of(container: Object) -> Counter[str]:
    return Counter(each["name"] for each in container.get("env", []))


@pytest.mark.parametrize("case", CASES)
def test_no_outage_of_a_server_restarts_a_process(case: str) -> None:
    """Probes ask the process alone: its files, or an answer that needs no server."""
    for name, each in by_kind(objects(case), "Deployment").items():
        [container] = each["spec"]["template"]["spec"]["containers"]
        probes = [container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")]
        for probe in probes:
            if "httpGet" in probe:
                assert probe["httpGet"]["path"] in {"/healthz", "/readyz?only=schema"}, name
            else:
                assert probe["exec"]["command"][0] in {"test", "sh"}, name


@pytest.mark.parametrize("case", CASES)
def test_names_are_those_that_kubernetes_allows(case: str) -> None:
    seen: set[tuple[str, str]] = set()
    for each in objects(case):
        name = each["metadata"]["name"]
        assert len(name) <= 63, name
        assert NAME.fullmatch(name), name
        assert (each["kind"], name) not in seen
        seen.add((each["kind"], name))
        for key, value in {**each["metadata"].get("labels", {})}.items():
            assert len(value) <= 63, (key, value)
            assert re.fullmatch(r"([A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?", value), (key, value)


def test_each_pipeline_has_a_deployment_whatever_its_name() -> None:
    deployments = by_kind(objects("names"), "Deployment")
    found = [
        each["metadata"].get("annotations", {}).get("farm/pipeline")
        for each in deployments.values()
    ]
    assert sorted(filter(None, found)) == [
        "My_SDXL.v2",
        "my-sdxl-v2",
        "stable-diffusion-xl-base-of-april",
        "stable-diffusion-xl-base-of-march",
    ]
    selectors = [json.dumps(each["spec"]["selector"]) for each in deployments.values()]
    assert len({*selectors}) == len(selectors)


def workers(of: list[Object]) -> dict[str, Object]:
    return {
        each["metadata"]["annotations"]["farm/pipeline"]: each
        for each in by_kind(of, "Deployment").values()
        if each["metadata"]["labels"]["app.kubernetes.io/component"] == "worker"
    }


@pytest.mark.parametrize("case", CASES)
def test_a_rollout_of_workers_needs_no_further_device(case: str) -> None:
    for each in workers(objects(case)).values():
        rolling = each["spec"]["strategy"]["rollingUpdate"]
        assert (rolling["maxSurge"], rolling["maxUnavailable"]) == (0, "25%")


@pytest.mark.parametrize(
    ("case", "seconds"), [("minimal", 60), ("production", 90), ("cloud-roles", 20)]
)
def test_the_pod_outlives_the_grace_of_its_worker(case: str, seconds: int) -> None:
    for each in workers(objects(case)).values():
        assert each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == seconds + 15
        assert variables(each)["FARM_GRACE_SECONDS"] == str(seconds)


def test_what_is_scaled_has_no_number_of_replicas() -> None:
    found = objects("production")
    scaled = by_kind(found, "ScaledObject")
    assert {*scaled} == {"farm-worker-sd15", "farm-worker-sdxl"}
    deployments = by_kind(found, "Deployment")
    for name in (*scaled, "farm-api"):
        assert "replicas" not in deployments[name]["spec"]
    assert deployments["farm-janitor"]["spec"]["replicas"] == 2


def test_a_scaler_asks_for_the_waiting_work_of_its_lane() -> None:
    scaled = by_kind(objects("production"), "ScaledObject")
    [trigger] = scaled["farm-worker-sdxl"]["spec"]["triggers"]
    assert trigger["metadata"] == {
        "targetQueryValue": "1",
        "query": "SELECT coalesce(max(greatest(busy, ceil(seconds / 30.0))), 0) FROM scaling "
        "WHERE pipeline = 'sdxl'",
    }
    [auth] = by_kind(objects("production"), "TriggerAuthentication").values()
    assert auth["spec"]["secretTargetRef"] == [
        {"parameter": "connection", "name": "farm-scaler", "key": "url"}
    ]


def test_a_change_of_one_pipeline_restarts_its_worker_alone() -> None:
    """All but the other workers follow too: they read the whole catalog."""
    more = ("--set-json", 'pipelines.sdxl.catalog.defaults={"steps": 20}')
    before = by_kind(objects("production"), "Deployment")
    after = by_kind(objects("production", more=more), "Deployment")
    changed = {name for name in before if before[name] != after[name]}
    others = {"farm-api", "farm-janitor", "farm-exporter", "farm-courier"}
    assert changed == {"farm-worker-sdxl", *others}


def test_two_files_of_values_are_merged_by_pipeline(tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text(
        yaml.safe_dump(
            {
                "pipelines": {
                    "sd15": {"worker": {"replicas": 3}},
                    "sdxl": {"catalog": {"source": "owner/sdxl"}},
                }
            }
        )
    )
    found = workers(objects("minimal", more=(f"--values={second}",)))
    assert {name: each["spec"]["replicas"] for name, each in found.items()} == {
        "sd15": 3,
        "sdxl": 1,
    }


def test_the_defaults_of_workers_stay_as_they_are_for_the_next_pipeline() -> None:
    found = workers(objects("mig"))
    limits = [
        each["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        for each in found.values()
    ]
    assert limits == [
        {"nvidia.com/mig-1g.10gb": 1, "memory": "16Gi"},
        {"nvidia.com/mig-3g.40gb": 1, "memory": "16Gi"},
    ]
    classes = [each["spec"]["template"]["spec"].get("runtimeClassName") for each in found.values()]
    assert classes == ["nvidia", None]


@pytest.mark.parametrize("version", HELMS)
def test_the_rendered_catalog_is_read_by_the_farm(tmp_path: Path, version: str) -> None:
    maps = by_kind(objects("production", version=version), "ConfigMap")
    file = tmp_path / "catalog.json"
    file.write_text(maps["farm-catalog"]["data"]["catalog.json"])
    catalog = load_catalog(file)
    assert {*catalog.pipelines} == {"sd15", "sdxl"}
    entry = catalog.pipelines["sd15"]
    assert (entry.max_pixels, entry.defaults["steps"]) == (589824, 30)
    assert isinstance(entry.defaults["steps"], int)
    file.write_text(maps["farm-worker-sdxl"]["data"]["catalog.json"])
    assert {*load_catalog(file).pipelines} == {"sdxl"}


SECRETS = {
    "FARM_DATABASE_URL": "postgresql://farm@postgres/farm",
    "FARM_REDIS_URL": "redis://redis:6379/0",
}


@pytest.mark.parametrize("version", HELMS)
def test_the_rendered_environment_is_read_by_the_farm(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    for each in by_kind(objects("production", version=version), "Deployment").values():
        with monkeypatch.context() as patch:
            for name, value in variables(each).items():
                patch.setenv(name, SECRETS.get(name, "x") if value is None else value)
            settings = Settings()
        assert settings.max_job_frames == 10_000_000
        assert settings.spool_bytes == 2 * 2**30
        assert settings.preempt is False
        assert settings.grace_seconds == 90
        assert settings.s3_public_url == "https://images.example.com"
        assert settings.retention_days == 30


def test_no_password_is_in_a_pod() -> None:
    text = json.dumps([each for each in objects("cpu") if each["kind"] != "Secret"])
    assert "secret@" not in text
    secret = by_kind(objects("cpu"), "Secret")["farm-servers"]
    assert secret["stringData"]["database"] == "postgresql://farm:secret@postgres:5432/farm"


MISSPELT = [
    "api.replica=3",
    "pipelines.sd15.worker.gpus.count=1",
    "settings.leaseSecond=3",
    "workerDefaults.pod.nodeSelectors.a=b",
    "databse.url=x",
]


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("word", MISSPELT)
def test_a_misspelt_value_is_refused_by_name(word: str, version: str) -> None:
    done = template("minimal", more=("--set", word), version=version)
    assert done.returncode != 0
    path = word.partition("=")[0].split(".")
    assert any(part in done.stderr for part in path[-2:]), done.stderr


WRONG = {
    "graceSeconds=5": "graceSeconds",
    "image.tag=latest": "tag",
    "s3.endpoint=minio:9000": "endpoint",
    "api.replicas=two": "replicas",
    "database.existingSecret=": "database: set database.existingSecret to the name of a Secret",
    "database.url=postgresql://x": "database: set only one of",
    "trial.enabled=true": "set only one of",
    "pipelines.sd15.worker.scaling.enabled=true": "set scaler.existingSecret",
    "pipelines.sd15.worker.weights.mode=pvc": "pipelines.sd15.worker.weights.claim",
    "pipelines.sd15.worker.weights.mode=image": "pipelines.sd15.worker.weights.image",
    "pipelines.sd15.worker.weights.mode=floppy": "mode",
    "pipelines.sd15.worker.gpu.count=2": "a worker uses one device",
    "pipelines.sd15.worker.gpu.count=0": "at least 1",
    "pipelines.sd16.worker.replicas=2": "pipelines.sd16.catalog: set at least `source`",
    "pipelines.sd15.enabled=false": "pipelines",
    "api.route.enabled=true": "api.route.parentRefs",
    "api.ingress.enabled=true": "api.ingress.host",
}


@pytest.mark.parametrize(("word", "told"), WRONG.items(), ids=WRONG)
def test_what_cannot_work_is_refused_with_what_to_do(word: str, told: str) -> None:
    assert told in refusal("minimal", more=("--set", word))


def test_scaling_without_keda_is_refused() -> None:
    done = helm("template", "farm", str(CHART), f"--values={CHART}/ci/production.yaml")
    assert "KEDA is not installed on this cluster" in done.stderr


def test_the_schema_has_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert keys_of(values) == keys_of_schema(schema, schema) - {"global"}


OPEN = {"podSecurityContext", "settings", "pipelines", "extraObjects"}
"""Values whose keys are not listed in values.yaml."""


def keys_of(values: dict[str, Any], at: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in values.items():
        path = f"{at}{key}"
        found.add(path)
        if isinstance(value, dict) and path not in OPEN and key not in ENDS:
            found |= keys_of(value, f"{path}.")
    return found


ENDS = {"resources", "labels", "annotations", "pod"}
"""Keys whose value is passed on, or described in another place."""


def keys_of_schema(schema: dict[str, Any], whole: dict[str, Any], at: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in schema.get("properties", {}).items():
        path = f"{at}{key}"
        found.add(path)
        if path in OPEN or key in ENDS:
            continue
        name = value.get("$ref", "").rpartition("/")[2]
        found |= keys_of_schema(whole["definitions"][name] if name else value, whole, f"{path}.")
    return found


MANAGED = {
    "database_url", "redis_url", "s3_endpoint_url", "s3_public_url", "s3_addressing", "s3_bucket",
    "pipelines", "scratch_dir", "run_dir", "cache_dir", "grace_seconds",
}  # fmt: skip
"""Settings that the chart sets itself."""
OTHERS = {
    "api_url", "api_key", "environment", "failpoints", "simulated_gpus", "discard_images",
}  # fmt: skip
"""Settings of the command line, and those for development."""


def test_every_setting_can_be_set() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    words = schema["properties"]["settings"]["properties"]
    named = {re.sub("([A-Z])", r"_\1", word).lower() for word in words}
    assert named == Settings.model_fields.keys() - MANAGED - OTHERS


def test_a_route_has_every_page_and_call_but_no_metrics() -> None:
    [route] = by_kind(objects("production"), "HTTPRoute").values()
    [rule] = route["spec"]["rules"]
    served = [match["path"] for match in rule["matches"]]
    [ingress] = by_kind(objects("openshift"), "Ingress").values()
    [host] = ingress["spec"]["rules"]
    assert [each["path"] for each in host["http"]["paths"]] == [each["value"] for each in served]
    inside = {"/healthz", "/readyz", "/metrics"}
    for path in paths_of_the_api():
        matches = any(reaches(match, path) for match in served)
        assert matches is (path not in inside), path


def paths_of_the_api() -> set[str]:
    found = {str(context.path) for context in iter_route_contexts(create_app().routes)}
    assert {"/v1/jobs", "/p/{name}", "/static"} <= found
    return found


def reaches(match: dict[str, str], path: str) -> bool:
    if match["type"] == "Exact":
        return path == match["value"]
    return path == match["value"] or path.startswith(match["value"] + "/")


def test_migrations_come_before_everything_and_need_nothing_of_the_release() -> None:
    jobs = by_kind(objects("production"), "Job")
    job = jobs["farm-migrate"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "default"
    [container] = pod["containers"]
    assert container["args"] == ["migrate", "--wait-database", "300", "--pre"]
    assert container["env"] == [
        {
            "name": "FARM_DATABASE_URL",
            "valueFrom": {"secretKeyRef": {"name": "farm-postgres", "key": "uri"}},
        }
    ]
    assert [each["name"] for each in pod["volumes"]] == ["tmp"]


def test_a_url_in_the_values_reaches_the_migration_by_a_secret_that_is_a_hook() -> None:
    found = objects("cpu")
    [container] = by_kind(found, "Job")["farm-migrate"]["spec"]["template"]["spec"]["containers"]
    [url] = container["env"]
    secret = by_kind(found, "Secret")[url["valueFrom"]["secretKeyRef"]["name"]]
    assert secret["stringData"] == {"url": "postgresql://farm:secret@postgres:5432/farm"}
    weights = [
        int(each["metadata"]["annotations"]["helm.sh/hook-weight"])
        for each in (secret, by_kind(found, "Job")["farm-migrate"])
    ]
    assert weights == sorted(weights)


def test_post_steps_are_run_only_if_they_are_asked_for() -> None:
    assert {*by_kind(objects("production"), "Job")} == {"farm-migrate", weights_job()}
    jobs = by_kind(objects("argocd"), "Job")
    hooks = {
        name: job["metadata"]["annotations"]["argocd.argoproj.io/hook"]
        for name, job in jobs.items()
    }
    assert hooks == {"farm-migrate": "PreSync", "farm-migrate-post": "PostSync"}


def weights_job() -> str:
    [name] = [name for name in by_kind(objects("production"), "Job") if "worker" in name]
    return name


def test_weights_are_downloaded_once_for_each_version_of_an_entry() -> None:
    job = by_kind(objects("production"), "Job")[weights_job()]
    [container] = job["spec"]["template"]["spec"]["containers"]
    [marker] = re.findall(r"farm fetch sdxl && touch (\S+)$", container["args"][0])
    worker = by_kind(objects("production"), "Deployment")["farm-worker-sdxl"]
    own = {each["name"]: each.get("value") for each in container["env"]}
    for name in ("HF_HOME", "FARM_PIPELINES"):
        assert own[name] == variables(worker)[name]
    assert variables(worker)["HF_HUB_OFFLINE"] == "1"
    [wait] = worker["spec"]["template"]["spec"]["initContainers"]
    assert f"test -e {marker};" in wait["command"][2]
    assert {"name": "weights", "mountPath": "/hub", "readOnly": True} in wait["volumeMounts"]
    more = ("--set", "pipelines.sdxl.catalog.revision=0000000000000000000000000000000000000000")
    other = by_kind(objects("production", more=more), "Job")
    assert weights_job() not in other


def test_a_job_that_cannot_be_changed_has_another_name_for_each_content() -> None:
    names = set()
    for word in ("image.tag=v1", "image.tag=v2", "podDefaults.priorityClassName=x"):
        jobs = by_kind(objects("names", more=("--set", word)), "Job")
        names |= {name for name in jobs if "worker" in name}
    assert len(names) == 3


def test_disk_for_pictures_follows_the_setting() -> None:
    """The kubelet evicts a pod above its limit, and the pictures on its disk are gone."""
    more = ("--set", "settings.spoolBytes=10737418240")
    for case, expected in ((objects("minimal"), 3), (objects("minimal", more=more), 11)):
        [pod] = [each["spec"]["template"]["spec"] for each in workers(case).values()]
        [scratch] = [each for each in pod["volumes"] if each["name"] == "scratch"]
        assert int(scratch["emptyDir"]["sizeLimit"]) == expected * 2**30


def test_network_policies_open_two_ports_and_no_others() -> None:
    policies = by_kind(objects("production"), "NetworkPolicy")
    ports = {
        name: [port["port"] for rule in each["spec"]["ingress"] for port in rule["ports"]]
        for name, each in policies.items()
    }
    assert {name: found for name, found in ports.items() if found} == {
        "farm-api": ["http"],
        "farm-janitor": ["metrics"],
    }
    components = {
        each["metadata"]["labels"]["app.kubernetes.io/component"]
        for each in objects("production")
        if each["kind"] in ("Deployment", "Job")
    }
    selected = {
        each["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for each in policies.values()
    }
    assert components <= selected


def test_rules_and_dashboard_are_the_files_of_the_chart() -> None:
    [rules] = by_kind(objects("production"), "PrometheusRule").values()
    file = yaml.safe_load((CHART / "rules/farm.rules.yaml").read_text())
    for group in file["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                url = f"https://runbooks.example.com/farm#{rule['alert'].lower()}"
                rule["annotations"]["runbook_url"] = url
    assert rules["spec"]["groups"] == file["groups"]
    board = by_kind(objects("production"), "ConfigMap")["farm-dashboard"]
    assert board["data"]["farm.json"] == (CHART / "dashboards/farm.json").read_text()


def test_operators_are_named_where_they_are_missing() -> None:
    assert OPERATORS == ("keda.sh/v1alpha1", "monitoring.coreos.com/v1")
    done = helm(
        "template", "farm", str(CHART), f"--values={CHART}/ci/minimal.yaml",
        "--set", "monitoring.rules.enabled=true",
    )  # fmt: skip
    assert "the Prometheus operator (monitoring.coreos.com/v1) is not installed" in done.stderr


def test_the_trial_brings_its_servers() -> None:
    found = objects("trial")
    assert {*by_kind(found, "StatefulSet")} == {"farm-postgres", "farm-valkey", "farm-s3"}
    [job] = by_kind(found, "Job").values()
    assert job["metadata"]["name"] == "farm-migrate-1"
    assert "annotations" not in job["metadata"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["migrate", "--wait-database", "300", "--create-bucket"]
    worker = by_kind(found, "Deployment")["farm-worker-demo"]
    assert "FARM_PIPELINES" not in variables(worker)
    limits = worker["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.keys() == {"memory"}
    assert variables(worker)["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_versions_of_chart_and_package_are_equal() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (CHART.parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{chart["appVersion"]}"\n' in project
    assert chart["version"] == chart["appVersion"]
