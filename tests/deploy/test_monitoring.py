"""Rules and dashboard against a real Prometheus that scrapes the real service under load."""

import math
import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from batching.events import State
from deploy.grafana.preview import DASHBOARD, Prometheus, draw, expression, panels
from tests.deploy.prometheus import FOLDER, found, prometheus
from tests.live import SMALL, eventually, process
from tests.server.test_app import CONTRACT, LABELS

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
SELECTOR = re.compile(r"(?:microbatch[\w:]*|process_\w+|ALERTS|up)(?:\{[^}]*\})?(?![\w(])")
QUERIES = [target["expr"] for panel in panels() for target in panel["targets"]]


def has_data(prometheus: Prometheus, query: str) -> bool:
    """Whether a query answers with a number."""
    return any(map(math.isfinite, prometheus.values(query)))


def promtool(*arguments: str) -> str:
    done = subprocess.run([found("promtool"), *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.deploy
def test_configuration_and_rules_are_valid() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "config", "prometheus.yml")


@pytest.mark.deploy
def test_each_alert_fires_and_stays_quiet_when_it_should() -> None:
    promtool("test", "rules", "rules_test.yml")
    tested = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    told = {
        (case["alertname"], bool(case["exp_alerts"])) for test in tested for case in test.get("alert_rule_test", [])
    }
    alerts = [rule["alert"] for rule in RULES if "alert" in rule]
    assert told == {(alert, fires) for alert in alerts for fires in (True, False)}


def test_rules_and_panels_use_no_metric_or_label_outside_the_contract() -> None:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    series = {name + suffix: LABELS.get(name, set()) for name, kind in CONTRACT.items() for suffix in suffixes[kind]}
    series |= {rule["record"]: set() for rule in RULES if "record" in rule}
    series |= {"up": set(), "ALERTS": {"alertname", "alertstate"}}
    for query in [*QUERIES, *(rule["expr"] for rule in RULES)]:
        for selector in SELECTOR.findall(query):
            name, _, matchers = selector.partition("{")
            assert name in series, query
            assert set(re.findall(r"(\w+)[=!]", matchers)) <= series[name] | {"job", "instance"}, query


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_what_every_exporter_has_is_asked_of_these_servers_alone(query: str) -> None:
    """With all instances chosen, `instance=~".*"` is any job's that the same Prometheus scrapes."""
    for selector in SELECTOR.findall(query):
        if selector.startswith(("process_", "up")):
            assert 'job=~".*microbatch.*"' in selector


def test_every_panel_is_complete_and_has_its_own_place() -> None:
    places: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "heatmap"
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & places
        assert all(x < 24 for x, _ in cells)
        places |= cells
    dashboard = orjson.loads(DASHBOARD.read_bytes())
    uid = dashboard["uid"]
    assert all(f"/d/{uid}?" in rule["annotations"]["dashboard"] for rule in RULES if "alert" in rule)


def test_all_instances_are_those_of_the_chosen_model() -> None:
    """A value of its own for all of them would be any instance, whatever the list holds."""
    variables = {one["name"]: one for one in orjson.loads(DASHBOARD.read_bytes())["templating"]["list"]}
    assert 'model=~"$model"' in variables["instance"]["definition"]
    assert variables["instance"]["includeAll"]
    assert not variables["instance"].get("allValue")


@pytest.mark.parametrize("state", [state for state in State if state is not State.READY])
def test_a_server_that_takes_no_requests_is_not_green(state: State) -> None:
    [shown] = [panel for panel in panels() if panel["title"] == "State"]
    colors = [
        override["properties"][0]["value"]["fixedColor"]
        for override in shown["fieldConfig"]["overrides"]
        if re.search(override["matcher"]["options"].strip("/"), f"10.0.0.1:21010 {state}")
    ]
    assert colors == ["red" if state in (State.FAILED, State.STOPPED) else "orange"]


UNTYPED = {"definition", "titleFormat", "textFormat", "mode"}
"""Fields that Grafana itself reads and writes, and that its published types lack."""


def lost(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """Where a document has what another one lacks or has otherwise."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            if value not in (None, {}, [], ""):
                yield from lost(value, read.get(key), f"{path}.{key}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for place, pair in enumerate(zip(written, read, strict=True)):
            yield from lost(*pair, f"{path}[{place}]")
    elif written != read:
        yield path


def test_grafana_s_own_types_hold_the_whole_dashboard() -> None:
    register_default_plugins()
    written = orjson.loads(DASHBOARD.read_bytes())
    read = orjson.loads(JSONEncoder().encode(Dashboard.from_json(written)))
    assert {path.rpartition(".")[2] for path in lost(written, read)} <= UNTYPED
    written["panels"][1]["nope"] = 1
    read = orjson.loads(JSONEncoder().encode(Dashboard.from_json(written)))
    assert ".panels[1].nope" in lost(written, read)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus beside a service that is asked more than it can queue, until the tests are over."""
    over = threading.Event()
    # Padded batches, because some panels are of their sizes, their padding and how long each takes.
    flags = *SMALL, "--engine", "generate", "--max-batch-size", "4", "--queue-size", "2", "--watchdog-s", "60"
    with process(*flags) as service:
        service.wait_ready()

        def ask() -> None:
            while not over.is_set():
                assert service.chat(max_tokens=12).status_code in (200, 429)

        with prometheus(tmp_path_factory.mktemp("prometheus"), service.url) as found, ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(ask) for _ in range(8)]
            try:
                yield found
            finally:
                over.set()
                for client in clients:
                    client.result()


@pytest.mark.deploy
@pytest.mark.model
@pytest.mark.parametrize("query", sorted(set(QUERIES)))
def test_every_query_of_the_dashboard_finds_data(query: str, scraped: Prometheus) -> None:
    eventually(partial(has_data, scraped, expression(query)), f"data for {query}")


@pytest.mark.deploy
@pytest.mark.model
def test_reasons_that_refused_nothing_are_in_no_legend(scraped: Prometheus) -> None:
    [panel] = [panel for panel in panels() if panel["title"] == "Refused"]
    query = expression(panel["targets"][0]["expr"])
    eventually(partial(has_data, scraped, query), "data for the refused")
    shown = {series["metric"]["reason"] for series in scraped.get("query", query=query)["result"]}
    assert shown <= {"queue_full", "too_busy"}


@pytest.mark.deploy
@pytest.mark.model
def test_the_dashboard_s_variables_offer_the_server_and_its_model(scraped: Prometheus) -> None:
    offered = {}
    for variable in orjson.loads(DASHBOARD.read_bytes())["templating"]["list"][1:]:
        series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        offered[label] = scraped.get(f"label/{label}/values", **{"match[]": expression(series)})
    assert offered["model"] == ["smollm2-135m-instruct"]
    assert len(offered["instance"]) == 1


@pytest.mark.deploy
@pytest.mark.model
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_every_rule_works_on_data(rule: dict[str, Any], scraped: Prometheus) -> None:
    def state() -> Any:
        loaded = [one for group in scraped.get("rules")["groups"] for one in group["rules"]]
        [found] = [one for one in loaded if one["name"] == (rule.get("record") or rule["alert"])]
        return found

    eventually(lambda: state()["health"] != "unknown", "it was evaluated")
    assert state()["health"] == "ok", state()
    wanted = [rule["record"]] if "record" in rule else SELECTOR.findall(rule["expr"])
    assert wanted
    for series in wanted:
        eventually(partial(has_data, scraped, series), f"data for {series}")


@pytest.mark.deploy
@pytest.mark.model
def test_overload_is_seen_and_nothing_else_is_wrong(scraped: Prometheus) -> None:
    eventually(lambda: scraped.values("microbatch:rejections:ratio_rate5m > 0.01") != [], "refusals are counted")
    assert scraped.values("microbatch:errors:ratio_rate5m") == [0.0]
    assert scraped.values('ALERTS{alertstate="firing"}') == []
    assert 0 < scraped.values("microbatch:device_memory:used_ratio")[0] < 1


@pytest.mark.deploy
@pytest.mark.model
def test_the_preview_draws_every_panel(scraped: Prometheus, tmp_path: Path) -> None:
    draw(scraped, 30.0, tmp_path / "preview.png")
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
