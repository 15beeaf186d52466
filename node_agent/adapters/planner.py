"""Routes for this ingress's requests: the pure router, given what this node knows at that moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mesh.errors import NoRoute, RequestError
from mesh.session import Session
from mesh.session_events import SessionOrder
from mesh.types import Digest, LayeredRoute, NodeId, Stage
from node_agent.adapters.cold_loads import ColdLoads
from node_agent.adapters.session_driver import SessionDriver
from node_agent.config import AgentConfig
from node_agent.prefixes import KeptSession
from node_agent.route_report import route_report
from scheduler.cluster import ClusterSnapshot
from scheduler.cost import Percentile
from scheduler.policy import ClassPolicy, Policy
from scheduler.route import Group, Kept, RoutePlan, RouteRequest
from scheduler.routing import Router, models_served, standbys_for

_TOKENS_EXPECTED = 256
"""Of an answer whose length nobody limited."""
_TOKENS_SOON = 32
"""Of a session that lost a stage: what goes on soon matters more than what is a little faster later."""
_ALTERNATIVES = 2


class RoutePlanner:
    """``draw`` gives a positive random number for each request (see ``scheduler.routing``: herding)."""

    def __init__(
        self,
        config: AgentConfig,
        me: NodeId,
        view: Callable[[], ClusterSnapshot],
        driver: SessionDriver,
        policy: Callable[[], Policy],
        draw: Callable[[], int],
        cold: ColdLoads,
    ) -> None:
        self._config, self._me, self._view = config, me, view
        self._driver, self._policy, self.draw = driver, policy, draw
        self._cold = cold
        self._router = Router()

    def rules(self, model: str, class_name: str = "") -> tuple[ClassPolicy, ...]:
        """What the policy says of a model and of a class of requests; raises ``RequestError``."""
        policy = self._policy()
        rules: list[ClassPolicy] = []
        if model in policy.models:
            rules.append(policy.models[model])
        if class_name:
            if class_name not in policy.classes:
                known = ", ".join(sorted(policy.classes)) or "none"
                raise RequestError(
                    f"X-Mesh-Class is {class_name!r}; the policy has these classes: {known}",
                    param="X-Mesh-Class",
                )
            rules.append(policy.classes[class_name])
        return tuple(rules)

    def replan(
        self,
        model: str,
        rules: tuple[ClassPolicy, ...],
        session: Session,
        before: RoutePlan,
        avoid: frozenset[NodeId],
    ) -> RoutePlan:
        """Another route for a session that runs: of the same model, and where its text must be what it would have
        been of the same runtime and quantization (rule R7); where it pays with the stages that hold its KV cache.
        Where there is none, what it lacks is loaded somewhere if that can be, and ``NoRoute`` raised: ask again."""
        draw, order, pin = self.draw(), session.order, before.group
        try:
            return self.plan(model, order, rules, draw=draw, avoid=avoid, pin=pin, runs=session)
        except NoRoute:
            self._cold.want(session, avoid, rules)
            raise

    def plan(
        self,
        model: str,
        order: SessionOrder | None = None,
        rules: tuple[ClassPolicy, ...] = (),
        draw: int = 0,
        percentile: str = "p50",
        avoid: frozenset[NodeId] = frozenset(),
        pin: Group | None = None,
        kept: tuple[KeptSession, int] | None = None,
        runs: Session | None = None,
        done: int = 0,
        holds: LayeredRoute | None = None,
    ) -> RoutePlan:
        """The route of a request on our latest snapshot, or of a session that ``runs``, or has ``done`` tokens
        and may be held by the stages of ``holds``, from here on; raises ``NoRoute``."""
        done = len(runs.generated) if runs else done
        stages = runs.route.stages if runs else holds.stages if holds else ()
        standbys = [s for s in runs.standbys if s is not None] if runs else []
        percentile = max(percentile, *(r.percentile for r in rules)) if rules else percentile
        request = RouteRequest(
            model,
            self._me,
            percentile=Percentile[percentile.upper()],
            rules=rules,
            avoid=avoid,
            pin=pin,
            # A session that began in one form and must be exact stays with it; one that begins has no bits yet.
            mix=pin is None or order is None or not order.exact,
            learned=self._driver.learner.learned,
            tokens=min(order.tokens_max, _TOKENS_SOON if done else _TOKENS_EXPECTED) if order else 1,
            prompt=len(order.prompt) + done if order else 0,
            steps=done if order and order.exact else 0,
            holding=_replicas(*stages, *standbys) if done else frozenset(),
            standing_by=_replicas(*standbys),
            chunk=self._config.chunk,
            own=self._driver.own_sessions(but=runs),
            ours_told=self._driver.ours_told,
            positions=len(order.prompt) + order.tokens_max if order else 0,
            draw=draw,
            alternatives=_ALTERNATIVES,
        )
        shares = replace(request, kept=Kept(kept[0].route, kept[1])) if kept else request
        hot = self._config.recovery == "hot" or any(r.recovery == "hot" for r in rules)
        # A standby is fed the whole prompt: a session that is to have them begins with nothing of another.
        found = self._router.plan(self._view(), request if hot else shares)
        if hot and not done:
            found = replace(found, standbys=standbys_for(self._view(), found.route, avoid))
            if kept and not any(found.standbys):
                found = self._router.plan(self._view(), shares)
        if order is not None:
            self._cold.note(found.route)
        return found

    def explain(self, model: str, percentile: str, class_name: str = "") -> dict[str, Any]:
        """``/mesh/v1/route``: the route that a request would take now, with every term of its cost."""
        if model not in models_served(self._view()):
            known = ", ".join(sorted(models_served(self._view()))) or "none"
            raise RequestError(
                f"the model {model!r} does not exist here (served: {known})",
                param="model",
                code="model_not_found",
                status=404,
            )
        if percentile not in ("p50", "p99"):
            raise RequestError(f"percentile is {percentile!r}; use p50 or p99", param="percentile")
        names = {n.id: n.name for n in self._view().nodes.values()}
        rules = self.rules(model, class_name)
        return route_report(self.plan(model, rules=rules, percentile=percentile), names)


def _replicas(*stages: Stage) -> frozenset[tuple[NodeId, Digest]]:
    return frozenset((s.node, s.shard) for s in stages)
