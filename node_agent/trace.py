"""Where a session's time went: summed as tokens arrive, told when somebody asks. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesh.types import LayeredRoute, SessionId, Token
from scheduler.learning import NOTHING_LEARNED, Learned

_ENOUGH_TOKENS = 4


@dataclass(slots=True)
class StageSums:
    """Sums over decode steps, microseconds; the first token's step (prefill) is kept apart."""

    queue_us: int = 0
    compute_us: int = 0
    hop_us: int = 0


@dataclass(slots=True)
class Recovery:
    """A stage lost or left: why, on which route, after how many tokens, and how long no token came
    (microseconds; 0 while it lasts). ``rung``: by what it came back; ``replayed`` positions were sent again."""

    cause: str
    route: str
    tokens: int
    at_ns: int
    stalled_us: int = 0
    rung: str = ""
    replayed: int = 0
    waited: bool = False
    """There was no other route at first: something had to be loaded, or to come back."""
    opening: bool = False
    """Nothing was lost: a stage refused the session before its first token."""


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
    predicted_ways_us: float = 0.0
    """Of that, what links take for a token."""
    ingress_hop_us: int = 0
    first_ns: int = 0
    last_ns: int = 0
    tokens: int = 0
    outcome: str = "running"
    overheads_us: list[int] = field(default_factory=list)
    """For each decode step what was not computation: step time less the runtime's, microseconds."""
    stages: list[StageSums] = field(default_factory=list)
    first_stages: list[StageSums] = field(default_factory=list)
    guesses: int = 0
    """Tokens that were guessed, once the session has ended; ``guesses_right`` came true."""
    guesses_right: int = 0
    cached_tokens: int = 0
    """Of the prompt, those whose KV cache came from another session."""
    waited: bool = False
    """That session still ran: this one may have waited for it."""
    mixed: bool = False
    """The route has stages of different runtimes or quantizations."""
    learned: Learned = NOTHING_LEARNED
    """What the predictions were made with."""
    recoveries: list[Recovery] = field(default_factory=list)

    def lost(self, cause: str, now: int, refused: bool = False) -> None:
        """A stage is lost, or about to be left, or ``refused`` the session."""
        if not self.recoveries or self.recoveries[-1].stalled_us:
            opening = refused and not self.tokens
            self.recoveries.append(Recovery(cause, str(self.route), self.tokens, now, opening=opening))

    def rerouted(self, route: LayeredRoute) -> None:
        """Another route was taken; stages' times are of it from here on."""
        self.route = route
        self.stages, self.first_stages = [], []

    def stayed(self) -> None:
        """There was nowhere else to go: nothing happened."""
        self.recoveries.pop()

    @property
    def comparable(self) -> bool:
        """Whether what came can be held against the predictions."""
        plain = not self.recoveries and not self.guesses and not self.waited
        return plain and self.predicted_tpot_ms > 0 and self.tokens >= _ENOUGH_TOKENS

    def token(self, token: Token, now: int, going: bool = True) -> int:
        """Note a token and the times that it brought along; microseconds that the session stood still for a
        recovery that it ends, else 0. ``going`` is false for a token that was under way when a stage was lost."""
        self.tokens += 1
        first = self.tokens == 1
        if first:
            self.first_ns = now
        stalled_us = 0
        if going and self.recoveries and not self.recoveries[-1].stalled_us:
            stalled_us = self.recoveries[-1].stalled_us = max(1, (now - self.recoveries[-1].at_ns) // 1000)
            self.last_ns = now
            return stalled_us
        if not first:
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
        return 0

    @property
    def ttft_ms(self) -> float:
        """Time to first token, milliseconds."""
        return (self.first_ns - self.started_ns) / 1e6 if self.tokens else 0.0

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first, milliseconds."""
        return (self.last_ns - self.first_ns) / 1e6 / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def left_us(self) -> float:
        """Of a token's time, what was neither computation nor waiting for others' steps nor predicted of links; of a session
        that stayed on one route."""
        known = sum(s.compute_us + s.queue_us for s in self.stages)
        return self.tpot_ms * 1000 - known / max(1, self.tokens - 1) - self.predicted_ways_us

    def prediction_errors(self) -> dict[str, float]:
        """Relative errors of the predictions, by name; of those that were made and came to be."""
        pairs = {
            "ttft": (self.predicted_ttft_ms, self.ttft_ms),
            "tpot": (self.predicted_tpot_ms, self.tpot_ms),
        }
        if self.recoveries or self.guesses:
            return {}
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
            "cached_tokens": self.cached_tokens,
            "tokens": self.tokens,
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": round(self.tpot_ms, 3),
            "predicted_ttft_ms": round(self.predicted_ttft_ms, 3),
            "predicted_tpot_ms": round(self.predicted_tpot_ms, 3),
            "overhead_ms_p50": round(self._overhead_ms(0.5), 3),
            "overhead_ms_p99": round(self._overhead_ms(0.99), 3),
            "ingress_hop_ms": round(self.ingress_hop_us / 1000, 3),
            "mixed": self.mixed,
            "guesses": self.guesses,
            "guesses_right": self.guesses_right,
            "return_ms": round(max(0.0, self.tpot_ms - accounted), 3),
            "stages": stages,
            "recoveries": [
                {
                    "cause": r.cause,
                    "left": r.route,
                    "after_tokens": r.tokens,
                    "stalled_ms": round(r.stalled_us / 1000, 3),
                    "rung": r.rung,
                    "replayed": r.replayed,
                }
                for r in self.recoveries
            ],
        }
