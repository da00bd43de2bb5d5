"""What a scrape shows of one gateway among several."""

from __future__ import annotations

from potluck_coordinator.metrics import Metrics


def test_every_sample_of_one_gateway_among_several_says_which():
    metrics = Metrics(3)
    metrics.observe_request("/v1/models", 200, 0.1)
    for _ in range(2):
        samples = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
        assert samples
        assert all('gateway="3"' in line for line in samples)
        assert 'potluck_requests_total{endpoint="/v1/models",gateway="3",status="200"} 1.0' in samples


def test_the_only_gateway_bears_no_number():
    assert b"gateway=" not in Metrics().render()
