"""Prometheus metrics of an agent; names and labels are documented in the README."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mesh.types import ShardInfo

_LABELS = ("node_id", "shard_id", "model_version")
_FAST = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.02, 0.04, 0.08, 0.2, 0.5, 2.0)
_HOP = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_WAIT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class StageMetrics:
    """One replica's metrics, labels bound."""

    def __init__(self, metrics: AgentMetrics, shard: ShardInfo) -> None:
        labels = metrics.labels(shard)
        self._decode = metrics.inference.labels(*labels, "decode")
        self._prefill = metrics.inference.labels(*labels, "prefill")
        self._queue = metrics.queue.labels(*labels)
        self._hop = metrics.hop.labels(*labels)

    def ran(self, length: int, compute_us: int, queue_us: int) -> None:
        """A frame of ``length`` positions was computed."""
        (self._decode if length == 1 else self._prefill).observe(compute_us / 1e6)
        self._queue.observe(queue_us / 1e6)

    def hopped(self, hop_us: int) -> None:
        """An acknowledgement told what the hop onward takes."""
        self._hop.observe(hop_us / 1e6)


class AgentMetrics:
    """Everything that ``/metrics`` shows, in a registry of its own."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.registry = CollectorRegistry()
        self.inference = Histogram(
            "onnx_inference_latency_seconds",
            "Time of one run of the runtime",
            (*_LABELS, "phase"),
            buckets=_FAST,
            registry=self.registry,
        )
        self.queue = Histogram(
            "mesh_stage_queue_seconds",
            "From a frame's arrival at a stage to the start of its run",
            _LABELS,
            buckets=_FAST,
            registry=self.registry,
        )
        self.hop = Histogram(
            "mesh_hop_latency_seconds",
            "One-way time to the next stage: half of the round trip less the time held there",
            _LABELS,
            buckets=_HOP,
            registry=self.registry,
        )
        self.ttft = Histogram(
            "mesh_ttft_seconds",
            "Time to first token of sessions owned here",
            ("node_id", "model_version"),
            buckets=_WAIT,
            registry=self.registry,
        )
        self.tpot = Histogram(
            "mesh_tpot_seconds",
            "Mean time per output token after the first, by session owned here",
            ("node_id", "model_version"),
            buckets=_FAST,
            registry=self.registry,
        )
        self.recovery = Histogram(
            "mesh_recovery_seconds",
            "From the loss of a stage to the session's next token.",
            ["node"],
            buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20),
            registry=self.registry,
        )
        self.failovers = Counter(
            "mesh_failovers",
            "Sessions that went on along another route, by rung of the ladder and cause",
            ("node_id", "rung", "cause"),
            registry=self.registry,
        )
        self.held = Counter(
            "mesh_recoveries_held",
            "Changes of route that waited because the budget was spent",
            ("node_id",),
            registry=self.registry,
        )
        self.replayed = Counter(
            "mesh_replayed_positions",
            "Positions that were sent again after a loss",
            ("node_id",),
            registry=self.registry,
        )
        self.hop_log = Gauge(
            "mesh_hop_log_bytes", "Activations kept for replay", ("node_id",), registry=self.registry
        )
        self.hop_log_written = Gauge(
            "mesh_hop_log_written_bytes",
            "Activations written to the hop log since the start",
            ("node_id",),
            registry=self.registry,
        )
        self.hop_log_absent = Counter(
            "mesh_hop_log_absent",
            "Hop logs that were dropped: no room, a slow or broken disk",
            ("node_id",),
            registry=self.registry,
        )
        self.prediction = Histogram(
            "mesh_prediction_error_ratio",
            "How far a route's predicted TTFT and TPOT were off, relative to what was measured",
            ("node_id", "model_version", "what"),
            buckets=(0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0),
            registry=self.registry,
        )
        self.sessions = Gauge("mesh_sessions", "Sessions at a replica", _LABELS, registry=self.registry)
        self.kv_reserved = Gauge(
            "mesh_kv_reserved_bytes",
            "KV memory promised to sessions",
            _LABELS,
            registry=self.registry,
        )
        self.kv_budget = Gauge("mesh_kv_budget_bytes", "KV memory there is", _LABELS, registry=self.registry)
        self.owned = Gauge("mesh_owned_sessions", "Sessions owned here", ("node_id",), registry=self.registry)
        self.refused = Counter(
            "mesh_refused",
            "Requests and sessions refused",
            ("node_id", "reason"),
            registry=self.registry,
        )
        self.finished = Counter("mesh_finished", "Sessions ended", ("node_id", "how"), registry=self.registry)
        self.tokens = Counter(
            "mesh_tokens", "Tokens generated by sessions owned here", ("node_id",), registry=self.registry
        )
        self.wire_bytes = Gauge(
            "mesh_link_sent_bytes",
            "Bytes sent to a peer on the streams that are open: frames we send, replies to its own",
            ("node_id", "peer", "kind"),
            registry=self.registry,
        )

        self.members = Gauge(
            "mesh_members",
            "Members by standing, without this node",
            ("node_id", "state"),
            registry=self.registry,
        )
        self.suspicions = Counter(
            "mesh_suspicions",
            "Times that this node began to suspect a member",
            ("node_id",),
            registry=self.registry,
        )
        self.membership_bytes = Gauge(
            "mesh_membership_bytes",
            "Datagrams of membership since the start, IP and UDP headers included",
            ("node_id", "direction"),
            registry=self.registry,
        )

    def labels(self, shard: ShardInfo) -> tuple[str, str, str]:
        """node_id, shard_id, model_version."""
        return self.node_id, str(shard), str(shard.model.ref)

    def forget(self, shard: ShardInfo) -> None:
        """A replica is gone: its gauges must not go on saying what was."""
        for gauge in (self.sessions, self.kv_reserved, self.kv_budget):
            gauge.remove(*self.labels(shard))

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
