"""What is told of sessions: figures and log lines for people, and to the cost model what its predictions came to."""

from __future__ import annotations

import logging

from mesh.session import Session
from mesh.session_events import Ended
from node_agent.adapters.metrics import AgentMetrics
from node_agent.trace import SessionTrace
from scheduler.learning import Learner

log = logging.getLogger(__name__)


class SessionAccounts:
    """Of the sessions that this node owns."""

    def __init__(self, metrics: AgentMetrics) -> None:
        self._metrics, self._node = metrics, metrics.node_id
        self.learner = Learner()

    def owned(self, running: int) -> None:
        """So many run now."""
        self._metrics.owned.labels(self._node).set(running)

    def refused(self) -> None:
        """One more than may run was asked for."""
        self._metrics.refused.labels(self._node, "ingress_full").inc()

    def held(self) -> None:
        """The retry budget let a session wait."""
        self._metrics.held.labels(self._node).inc()

    def recovered(self, session: Session, trace: SessionTrace, stalled_us: int) -> None:
        """A session goes on after a loss; the last recovery of its ``trace`` gets to know how."""
        recovery = trace.recoveries[-1]
        if recovery.opening:
            recovery.rung = "opening"
            log.info(
                "a session was opened elsewhere: %s", recovery.cause, extra={"session": session.order.session}
            )
            return
        rung = session.rung.value if session.rung else "moved"
        recovery.rung = "cold" if recovery.waited else rung
        recovery.replayed = session.replayed
        self.learner.recovered(stalled_us)
        metrics, node = self._metrics, self._node
        metrics.recovery.labels(node).observe(stalled_us / 1e6)
        metrics.failovers.labels(node, recovery.rung, recovery.cause.split(":")[0]).inc()
        metrics.replayed.labels(node).inc(session.replayed)
        log.warning(
            "session went on after %.0f ms by %s: %s",
            stalled_us / 1000,
            recovery.rung,
            recovery.cause,
            extra={
                "session": session.order.session,
                "left": recovery.route,
                "route": str(session.route),
                "epoch": session.epoch.counter,
                "tokens": recovery.tokens,
                "replayed": recovery.replayed,
            },
        )

    def ended(self, trace: SessionTrace, ended: Ended, running: int) -> None:
        """A session is over; ``running`` are left."""
        metrics, node = self._metrics, self._node
        self.owned(running)
        metrics.finished.labels(node, ended.finish.value if ended.finish else "failed").inc()
        metrics.tokens.labels(node).inc(trace.tokens)
        if trace.tokens:
            metrics.ttft.labels(node, trace.model).observe(trace.ttft_ms / 1000)
        if trace.tokens > 1:
            metrics.tpot.labels(node, trace.model).observe(trace.tpot_ms / 1000)
            for what, error in trace.prediction_errors().items():
                metrics.prediction.labels(node, trace.model, what).observe(error)
            if trace.comparable:
                self.learner.ended(
                    trace.learned,
                    [stage.node for stage in trace.route.stages],
                    trace.left_us,
                    (trace.ttft_ms - trace.predicted_ttft_ms) * 1000,
                )
        extra = {
            "session": trace.session,
            "model_version": trace.model,
            "tokens": trace.tokens,
            "ttft_ms": round(trace.ttft_ms, 1),
            "tpot_ms": round(trace.tpot_ms, 2),
        }
        if ended.error:
            log.warning("session ended: %s", trace.outcome, extra=extra)
        else:
            log.info("session ended: %s", trace.outcome, extra=extra)
