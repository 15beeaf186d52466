"""Where a session's time went: summed as tokens arrive, told when somebody asks. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesh.types import LayeredRoute, SessionId, Token


@dataclass(slots=True)
class StageSums:
    """Sums over decode steps, microseconds; the first token's step (prefill) is kept apart."""

    queue_us: int = 0
    compute_us: int = 0
    hop_us: int = 0


@dataclass(slots=True)
class SessionTrace:
    """Timings of one session; all instants in nanoseconds of one monotonic clock."""

    session: SessionId
    model: str
    route: LayeredRoute
    prompt_tokens: int
    started_ns: int
    predicted_ttft_ms: float = 0.0
    predicted_tpot_ms: float = 0.0
    """What the route's cost model said before the request ran; 0 if it was not asked."""
    ingress_hop_us: int = 0
    first_ns: int = 0
    last_ns: int = 0
    tokens: int = 0
    outcome: str = "running"
    overheads_us: list[int] = field(default_factory=list)
    """For each decode step what was not computation: step time less the runtime's, microseconds."""
    stages: list[StageSums] = field(default_factory=list)
    first_stages: list[StageSums] = field(default_factory=list)

    def token(self, token: Token, now: int) -> None:
        """Note a token and the times that it brought along."""
        self.tokens += 1
        first = self.tokens == 1
        if first:
            self.first_ns = now
        else:
            self.overheads_us.append((now - self.last_ns) // 1000 - sum(token.times[1::3]))
        self.last_ns = now
        sums = self.first_stages if first else self.stages
        times = token.times
        for i in range(len(times) // 3):
            if i == len(sums):
                sums.append(StageSums())
            each = sums[i]
            each.queue_us += times[3 * i]
            each.compute_us += times[3 * i + 1]
            each.hop_us += times[3 * i + 2]

    @property
    def ttft_ms(self) -> float:
        """Time to first token, milliseconds."""
        return (self.first_ns - self.started_ns) / 1e6 if self.tokens else 0.0

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first, milliseconds."""
        return (self.last_ns - self.first_ns) / 1e6 / (self.tokens - 1) if self.tokens > 1 else 0.0

    def prediction_errors(self) -> dict[str, float]:
        """Relative errors of the predictions, by name; of those that were made and came to be."""
        pairs = {
            "ttft": (self.predicted_ttft_ms, self.ttft_ms),
            "tpot": (self.predicted_tpot_ms, self.tpot_ms),
        }
        return {k: abs(said - was) / was for k, (said, was) in pairs.items() if said > 0 and was > 0}

    def _overhead_ms(self, quantile: float) -> float:
        ordered = sorted(self.overheads_us)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] / 1000 if ordered else 0.0

    def report(self) -> dict[str, Any]:
        """As ``GET /mesh/v1/sessions/ID`` answers; times in milliseconds per token of decode.

        ``return_ms`` is what is left of a step: the token's hop home and the ingress.
        """
        steps = max(1, self.tokens - 1)
        stages = []
        accounted = self.ingress_hop_us / 1000
        for i, stage in enumerate(self.route.stages):
            sums = self.stages[i] if i < len(self.stages) else StageSums()
            first = self.first_stages[i] if i < len(self.first_stages) else StageSums()
            compute, queue, hop = (x / steps / 1000 for x in (sums.compute_us, sums.queue_us, sums.hop_us))
            accounted += compute + queue + hop
            stages.append(
                {
                    "stage": i,
                    "node": stage.node,
                    "address": stage.address,
                    "layers": [stage.layers.start, stage.layers.end],
                    "compute_ms": round(compute, 3),
                    "queue_ms": round(queue, 3),
                    "hop_ms": round(hop, 3),
                    "first_compute_ms": round(first.compute_us / 1000, 3),
                }
            )
        return {
            "session": self.session,
            "model": self.model,
            "outcome": self.outcome,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": round(self.tpot_ms, 3),
            "predicted_ttft_ms": round(self.predicted_ttft_ms, 3),
            "predicted_tpot_ms": round(self.predicted_tpot_ms, 3),
            "overhead_ms_p50": round(self._overhead_ms(0.5), 3),
            "overhead_ms_p99": round(self._overhead_ms(0.99), 3),
            "ingress_hop_ms": round(self.ingress_hop_us / 1000, 3),
            "return_ms": round(max(0.0, self.tpot_ms - accounted), 3),
            "stages": stages,
        }
