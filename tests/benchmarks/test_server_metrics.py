"""Laws of what is read from a server's own metrics."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from benchmarks.server_metrics import Gauges, Scrape, figures, parse, quantile

INF = float("inf")


class Registry:
    """This service's metrics as far as they are read, to be observed and scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.batches = Counter("microbatch_batches", "-", registry=self.registry)
        self.joined = Counter("microbatch_joined_requests", "-", registry=self.registry)
        self.prompts = Counter("microbatch_prompt_tokens", "-", registry=self.registry)
        self.reused = Counter("microbatch_reused_prompt_tokens", "-", registry=self.registry)
        self.steps = self.histogram("step_size_rows", 1, 2, 4)
        self.size = self.histogram("batch_size_rows", 1, 2, 4, 8)
        self.padding = self.histogram("batch_padding_ratio", 0.1, 0.5)
        self.wait = self.histogram("queue_wait_seconds", 0.1, 1, 10)
        self.info = Gauge("microbatch_build_info", "-", ["device"], registry=self.registry)
        self.info.labels("cpu").set(1)

    def histogram(self, name: str, *buckets: float) -> Histogram:
        return Histogram(f"microbatch_{name}", "-", buckets=buckets, registry=self.registry)

    def batch(self, rows: int, padding: float, *waits: float) -> None:
        self.batches.inc()
        self.size.observe(rows)
        self.padding.observe(padding)
        for wait in waits:
            self.wait.observe(wait)

    def scrape(self) -> Scrape:
        found = parse(generate_latest(self.registry).decode())
        assert found is not None
        return found


def test_figures_are_of_what_happened_between_two_scrapes() -> None:
    server = Registry()
    server.batch(8, 0.9, 100.0)
    server.joined.inc(5)
    before = server.scrape()
    server.joined.inc(2)
    server.prompts.inc(80)
    server.reused.inc(20)
    server.steps.observe(1)
    server.steps.observe(5)
    server.batch(1, 0.0, 0.25)
    server.batch(4, 0.5, 0.75, 0.5)
    samples = [Gauges(0.0, 3, 0), Gauges(1.0, 5, 2), Gauges(2.0, 0, 4)]
    found = figures(before, server.scrape(), samples)
    assert (found.batches, found.joined, found.batch_size) == (2, 2, 2.5)
    assert found.padding == pytest.approx(0.25)
    assert found.queue_wait == pytest.approx(0.5)
    assert found.queue_wait_p95 == pytest.approx(0.1 + 0.9 * 0.95)
    assert (found.step_rows, found.reused) == (3.0, 0.25)
    assert before.facts == {"device": "cpu"}


def test_an_interval_without_batches_has_no_figures() -> None:
    server = Registry()
    found = figures(server.scrape(), server.scrape(), [])
    assert (found.batches, found.batch_size, found.padding, found.queue_wait, found.queue_wait_p95) == (0,) + (
        None,
    ) * 4
    assert (found.step_rows, found.reused) == (None, None)


@pytest.mark.parametrize("text", ["", "<html>not found</html>", 'vllm:num_requests_running{model="m"} 3.0\n'])
def test_other_servers_have_none(text: str) -> None:
    assert parse(text) is None


def test_a_series_with_labels_is_summed_over_them() -> None:
    found = parse('microbatch_x_total{reason="a"} 3\nmicrobatch_x_total{reason="b"} 4\n')
    assert found is not None
    assert found.values == {"x_total": 7.0}


@given(st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=60), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_observation_at_its_rank(values: list[float], share: float) -> None:
    bounds = [0.1, 0.25, 0.5, 1.0]
    histogram = {bound: float(sum(value <= bound for value in values)) for bound in [*bounds, INF]}
    found = quantile(histogram, share)
    ranked = sorted(values)
    index = next(number for number in range(len(ranked)) if number + 1 >= share * len(ranked))
    upper = next(bound for bound in bounds if ranked[index] <= bound)
    lower = max([0.0, *(bound for bound in bounds if bound < upper)])
    assert found is not None
    assert lower <= found <= upper + 1e-12


def test_beyond_all_finite_buckets_the_last_bound_is_the_answer() -> None:
    assert quantile({1.0: 0.0, 2.0: 0.0, INF: 5.0}, 0.5) == 2.0
    assert quantile({1.0: 0.0, INF: 0.0}, 0.5) is None
    assert quantile({}, 0.5) is None
