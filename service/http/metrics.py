"""What the service tells Prometheus of its inside: adapters by state, batches, caches; read when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from backbone.batcher import SIZES
from service.adapters.encoder import Encoder
from service.search.query import Searcher

STATES = ("active", "inactive", "offloaded", "loading")


class Inside(Collector):
    """Metrics of one application's residency, text batcher, text cache and index views."""

    def __init__(self, encoder: Encoder, searcher: Searcher) -> None:
        self._encoder = encoder
        self._searcher = searcher

    def collect(self) -> Iterable[Metric]:
        encoders, cache = self._encoder.resident, self._searcher.texts
        yield GaugeMetricFamily("polyclip_backbones", "Backbones in memory.", len(encoders))
        states = GaugeMetricFamily("polyclip_adapters", "Adapters in memory, by state.", labels=["state"])
        found = Counter(state for each in encoders for state in each.residency.states().values())
        for state in STATES:
            states.add_metric([state], found[state])
        yield states
        host_bytes = sum(each.residency.host_bytes for each in encoders)
        yield GaugeMetricFamily("polyclip_adapter_host_bytes", "Adapters in host memory.", host_bytes)
        counted: Counter[str] = Counter()
        for each in encoders:
            counted.update(asdict(each.residency.counters))
        for name, value in counted.items():
            yield CounterMetricFamily(f"polyclip_adapter_{name}", f"Adapters: {name.replace('_', ' ')}.", value)
        batchers = [each.texts for each in encoders]
        yield GaugeMetricFamily("polyclip_text_queue_depth", "Texts that wait to be encoded.", sum(b.depth for b in batchers))
        for name in ("refused", "expired", "cancelled", "failures"):
            value = sum(getattr(batcher, name) for batcher in batchers)
            yield CounterMetricFamily(f"polyclip_text_batcher_{name}", f"Texts or batches {name}.", value)
        bounds = [*(str(size) for size in SIZES), "+Inf"]
        sizes = HistogramMetricFamily("polyclip_text_batch_rows", "Texts of a batch.")
        batches = [sum(of_size) for of_size in zip(*(batcher.batch_sizes for batcher in batchers), strict=True)]
        sizes.add_metric([], list(zip(bounds, accumulate(batches), strict=True)), sum(b.rows for b in batchers))
        yield sizes
        for name in ("hits", "shared", "misses"):
            yield CounterMetricFamily(f"polyclip_text_cache_{name}", f"Text cache: {name}.", getattr(cache, name))
        yield GaugeMetricFamily("polyclip_views", "Index views open.", len(self._searcher.views))
        yield GaugeMetricFamily("polyclip_view_bytes", "Memory of the open index views.", self._searcher.views.bytes)
        yield GaugeMetricFamily("polyclip_text_cache_bytes", "Text vectors kept.", cache.bytes)
