"""The files of deploy/ agree with the server and with each other; deploy/try_failover.py tries them for real."""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
HAPROXY = (DEPLOY / "haproxy.cfg").read_text()
UNIT = (DEPLOY / "trtllm-serve@.service").read_text()
GUIDE = (ROOT / "docs" / "deploy.md").read_text()
DASHBOARD = json.loads((DEPLOY / "dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"][0]["rules"]
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
DEPLOYMENT, SERVICE, BUDGET = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENTRYPOINT = json.loads(re.findall(r"^ENTRYPOINT (.*)$", CONTAINERFILE, re.MULTILINE)[0])
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
ADDED_BY_PROMETHEUS = {"instance", "job"}


def unit(name: str) -> str:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT)
    return parser["Service"][name]


def flag(command: list[str], name: str) -> float:
    return float(command[command.index(name) + 1])


def proxy(keyword: str) -> str:
    (value,) = re.findall(rf"^ +{keyword} (.*)$", HAPROXY, re.MULTILINE)
    return str(value)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"ms": 1e-3, "s": 1, "m": 60}[unit]


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """The labels of every series that the server exposes, by their names."""
    from prometheus_client.parser import text_string_to_metric_families

    from trtllm_jax.requests.outputs import RequestOutput
    from trtllm_jax.serve.metrics import Metrics

    metrics = Metrics("model")
    metrics.record_success(1.0, [RequestOutput(1, None, [1, 2, 3], 1, lambda: None)])
    metrics.record_error(503)
    series: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            series[sample.name] |= sample.labels.keys()
    return series


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *QUERIES, *(rule["expr"] for rule in RULES)])
def test_expressions_name_series_and_labels_that_exist(expression: str, exposed: dict[str, set[str]]) -> None:
    named = re.findall(r"\b(trtllm_\w+|up|haproxy_\w+)\b(?:{([^}]*)})?", expression)
    assert named
    for name, selector in named:
        labels = set(re.findall(r"(\w+)=", selector))
        if name.startswith("trtllm_"):
            assert name in exposed
            assert labels <= exposed[name] | ADDED_BY_PROMETHEUS, name
        else:
            assert (name, labels) in [("up", {"job"}), ("haproxy_backend_active_servers", {"proxy"})]
    grouped = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
    assert grouped <= set.union(*(exposed[name] for name, _ in named)) | ADDED_BY_PROMETHEUS


def test_values_that_expressions_ask_for_occur() -> None:
    every = "\n".join([*EXPRESSIONS, *(rule["expr"] for rule in RULES)])
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert set(re.findall(r'job="(\w+)"', every)) <= set(jobs)
    assert set(re.findall(r'proxy="(\w+)"', every)) <= set(re.findall(r"^backend (\w+)$", HAPROXY, re.MULTILINE))
    from trtllm_jax.serve.app import ENDPOINTS

    assert ("GET", jobs["trtllm"]["metrics_path"]) in [(endpoint.method, endpoint.path) for endpoint in ENDPOINTS]


def test_every_alert_is_tested_and_explained() -> None:
    tests = yaml.safe_load((DEPLOY / "rules_test.yml").read_text())["tests"]
    firing = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    alerts = {rule["alert"] for rule in RULES}
    assert firing == alerts
    assert {f"`{alert}`" for alert in alerts} <= set(re.findall(r"`\w+`", GUIDE))


def test_panels_lie_beside_each_other_and_ask_the_chosen_prometheus() -> None:
    panels, variables = DASHBOARD["panels"], {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in (panel["gridPos"] for panel in panels))
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = [one[at] + one[size] <= other[at] or other[at] + other[size] <= one[at] for at, size in ("xw", "yh")]
        assert any(apart), (one, other)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} <= variables


@pytest.mark.parametrize(
    "command", [ENTRYPOINT, CONTAINER["args"], unit("ExecStart").split()], ids=["image", "kubernetes", "systemd"]
)
def test_options_exist(command: list[str]) -> None:
    from trtllm_jax.commands.serve import command as serve

    known = {name for parameter in serve.params for name in parameter.opts}
    given = {word for word in command if word.startswith("--")}
    assert given
    assert given <= known


@pytest.mark.parametrize("command", [ENTRYPOINT, unit("ExecStart").split()], ids=["image", "systemd"])
def test_proxies_wait_longer_than_an_answer_may_take(command: list[str]) -> None:
    longest = flag(command, "--request_timeout")
    assert seconds(proxy("timeout server")) > longest
    assert seconds(proxy("timeout client")) > longest
    assert seconds(proxy("hard-stop-after")) >= seconds(proxy("timeout server"))


def test_the_proxys_other_times_are_the_servers() -> None:
    from trtllm_jax.serve.processes.frontend import KEEP_ALIVE
    from trtllm_jax.serve.settings import ServeSettings

    assert seconds(proxy("timeout http-request")) == ServeSettings(model_names=("m",)).body_timeout
    assert seconds(proxy("timeout http-keep-alive")) == KEEP_ALIVE


def test_whoever_stops_a_server_waits_for_its_drain() -> None:
    from trtllm_jax.commands.serve_run import FAILURE_DRAIN_TIMEOUT

    spare = 5.0
    pause = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = POD["terminationGracePeriodSeconds"]
    assert grace >= pause + flag(ENTRYPOINT, "--drain_timeout") + FAILURE_DRAIN_TIMEOUT + spare
    drain = flag(unit("ExecStart").split(), "--drain_timeout")
    assert float(unit("TimeoutStopSec")) >= drain + FAILURE_DRAIN_TIMEOUT + spare
    assert unit("KillMode") == "mixed"


def test_checks_ask_what_needs_no_key() -> None:
    from trtllm_jax.serve.app import ENDPOINTS

    probes = {CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    (proxys,) = re.findall(r"http-check send .*uri (\S+)", HAPROXY)
    (images,) = re.findall(r"HEALTHCHECK(?:.|\n)*?:8000(/\w+)", CONTAINERFILE)
    assert {*probes, proxys, images} <= {endpoint.path for endpoint in ENDPOINTS if endpoint.public}


def test_kubernetes_objects_belong_together() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    selectors = [DEPLOYMENT["spec"]["selector"]["matchLabels"], SERVICE["spec"]["selector"]]
    assert [*selectors, BUDGET["spec"]["selector"]["matchLabels"]] == [labels] * 3
    assert BUDGET["spec"]["minAvailable"] < DEPLOYMENT["spec"]["replicas"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] >= 1
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == flag(ENTRYPOINT, "--port")
    assert SERVICE["spec"]["ports"][0]["targetPort"] == port["name"]


def test_the_key_comes_by_the_variable_that_the_server_reads() -> None:
    from trtllm_jax.commands.serve import command

    variables = {parameter.envvar for parameter in command.params if parameter.envvar}
    assert {variable["name"] for variable in CONTAINER["env"]} <= variables
    assert set(re.findall(r"TRTLLM_\w+", UNIT + GUIDE)) <= variables


def test_the_image_has_the_packages_and_the_extras_and_is_nobodys_registry() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = re.findall(r"^COPY ((?!--)[^\n]+) \S+$", CONTAINERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert all((ROOT / source).exists() for source in sources)
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= sources
    (extras,) = re.findall(r"whl\)\[([\w,]+)\]", CONTAINERFILE)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    assert set(re.findall(r"^FROM (\S+)", CONTAINERFILE, re.MULTILINE)) == {"${BASE_IMAGE}"}
    assert all("/" not in name for name in (*re.findall(r"BASE_IMAGE=(\S+)", CONTAINERFILE), CONTAINER["image"]))
    (user,) = re.findall(r"^USER (\d+)$", CONTAINERFILE, re.MULTILINE)
    assert int(user) == POD["securityContext"]["runAsUser"] != 0


def test_the_guide_names_every_file() -> None:
    files = {path.name for path in DEPLOY.iterdir() if path.is_file()}
    assert {name for name in files if f"`deploy/{name}`" not in GUIDE} == set()


def test_variables_of_haproxy_are_those_that_the_trial_sets() -> None:
    trial: Any = (DEPLOY / "failover_processes.py").read_text()
    (names,) = re.findall(r"addresses = {([^}]*)}", trial)
    assert {f"SERVE_{name}" for name in re.findall(r'"(\w+)":', names)} == set(re.findall(r"\${(\w+)-", HAPROXY))
