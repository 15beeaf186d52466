"""From a request to running sessions: model, rules, tokens, route; and sessions of others taken over.

The shell of the ingress: what is decided here is decided by pure files, over the latest snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import replace
from functools import partial
from typing import Any

from mesh.errors import InputError, MeshError, NoRoute, RequestError
from mesh.session import Session
from mesh.session_events import SessionOrder, Standbys
from mesh.types import Digest, LayeredRoute, NodeId, Sampling, SessionId
from node_agent.adapters.http_api import Job, new_choice, new_envelope
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.peers import ClusterView
from node_agent.adapters.policy_book import PolicyBook
from node_agent.adapters.session_driver import SessionDriver, SessionHandle
from node_agent.adapters.takeover import Takeovers
from node_agent.config import AgentConfig
from node_agent.ingress.chat import TextModel
from node_agent.ingress.resumption import (
    SessionRecord,
    check_seen,
    parse_event_id,
    read_record,
    write_record,
)
from node_agent.ingress.schema import Generation
from node_agent.prefixes import KeptSession
from node_agent.route_report import route_report
from scheduler.cost import Percentile
from scheduler.policy import ClassPolicy
from scheduler.routing import (
    Group,
    Kept,
    RoutePlan,
    Router,
    RouteRequest,
    models_served,
    standbys_for,
)

log = logging.getLogger(__name__)

_LONG_TEXT = 4096
_TOKENS_EXPECTED = 256
"""Of an answer whose length nobody limited."""
_TOKENS_SOON = 32
"""Of a session that lost a stage: what goes on soon matters more than what is a little faster later."""
_ALTERNATIVES = 2


class Generator:
    """Starts what clients ask for."""

    def __init__(
        self,
        config: AgentConfig,
        node: NodeId,
        store: ModelStore,
        view: ClusterView,
        driver: SessionDriver,
        policies: PolicyBook,
        takeovers: Takeovers,
    ) -> None:
        self._takeovers = takeovers
        self.config, self.node_id, self.store, self.view = config, node, store, view
        self.driver, self.policies = driver, policies
        self._texts: dict[str, TextModel] = {}
        self._router = Router()

    async def start(self, generation: Generation, class_name: str = "") -> Job:
        """Route, tokenize and open a request's sessions; raises ``MeshError`` with what to say.
        ``class_name``: the class of requests whose rules hold, if any."""
        name = generation.model
        shape = models_served(self.view.snapshot).get(name)
        if shape is None:
            everywhere = {m for n in self.view.snapshot.alive() for m in n.models}
            if name in everywhere:
                raise NoRoute(
                    f"no node serves {name} yet; hold its shards ('mesh up', or 'shards' in an agent's settings)",
                    retry_after_s=2,
                )
            known = ", ".join(sorted(models_served(self.view.snapshot))) or "none"
            raise RequestError(
                f"the model {name!r} does not exist here (served: {known})",
                param="model",
                code="model_not_found",
                status=404,
            )
        rules = self._rules(name, class_name)
        route = self.plan(name, rules=rules).route
        text = await self._text_model(name, shape.ref.digest)
        context = self._context(route, shape.context_max)
        prompts = await self._prompts(text, generation, context)
        orders = self._orders(generation, prompts, context, text, shape.vocabulary)
        created = int(time.time())
        envelope = new_envelope(orders[0].session, name, generation.chat, created)
        choices = [new_choice(i, text, generation.stop) for i in range(len(orders))]
        handles: list[SessionHandle] = []
        cached = 0
        try:
            for i, order in enumerate(orders):
                if generation.echo:
                    choices[i].text.append(
                        b"".join(map(text.bytes_of, order.prompt)).decode("utf-8", "replace")
                    )
                kept = self._kept(generation, shape.ref.digest, order)
                plan = self.plan(name, order, rules, draw=secrets.randbits(62) + 1, kept=kept)
                if plan.group is not None:
                    record = SessionRecord(
                        generation,
                        class_name,
                        order.sampling,
                        order.tokens_max,
                        order.positions_max,
                        plan.group,
                        created,
                    )
                    order = replace(order, request=write_record(record))
                if kept is not None and plan.resumed:
                    order = replace(order, resume=(kept[0].session, plan.resumed))
                    self.driver.prefixes.take(kept[0].session)
                    cached += plan.resumed
                replan = partial(self._replan, name, rules)
                standbys = self._standbys(plan, rules)
                handles.append(self.driver.start(order, plan, str(shape.ref), replan, standbys=standbys))
        except MeshError:
            for handle in handles:
                handle.stop()
            raise
        return Job(generation, envelope, choices, handles, sum(map(len, prompts)), cached)

    async def resume(self, event: str) -> Job:
        """Go on with a stream that broke off, from the event that came last: the session is taken over from
        whoever owned it, here or on a node that is lost. Raises ``MeshError`` with what to say."""
        name, seen = parse_event_id(event)
        session = SessionId(name)
        self.driver.let_go(session)
        begin = time.monotonic()
        known, epoch = await self._takeovers.claim(session)
        log.info(
            "took a session over at epoch %d with %d tokens, in %.0f ms",
            epoch.counter,
            len(known.tokens),
            (time.monotonic() - begin) * 1000,
            extra={"session": session},
        )
        check_seen(session, seen, known.tokens)
        record = read_record(known.request)
        generation, group = record.generation, record.group
        text = await self._text_model(generation.model, group[0])
        rules = self._rules(generation.model, record.class_name)
        order = self._order(
            generation, session, known.prompt, record.sampling, record.tokens_max, record.positions_max, text
        )
        order = replace(order, keep=False, request=known.request)
        plan = self.plan(
            generation.model,
            order,
            rules,
            draw=secrets.randbits(62) + 1,
            pin=group,
            done=len(known.tokens),
            holds=known.route,
        )
        replan = partial(self._replan, generation.model, rules)
        handle = self.driver.start(order, plan, generation.model, replan, (epoch, known.tokens))
        envelope = new_envelope(session, generation.model, generation.chat, record.created)
        choice = new_choice(record.sampling.choice, text, generation.stop)
        return Job(
            replace(generation, stream=True), envelope, [choice], [handle], len(known.prompt), seen=seen
        )

    def _standbys(self, plan: RoutePlan, rules: tuple[ClassPolicy, ...]) -> Standbys:
        hot = self.config.recovery == "hot" or any(r.recovery == "hot" for r in rules)
        return standbys_for(self.view.snapshot, plan.route) if hot and not plan.resumed else ()

    def _exact(self, generation: Generation) -> bool:
        """Whether a replay must bring the same bits."""
        told = self.config.replay
        return told == "exact" or (
            told == "auto" and (generation.seeded or generation.sampling.temperature == 0)
        )

    def _order(
        self,
        generation: Generation,
        session: SessionId,
        prompt: tuple[int, ...],
        sampling: Sampling,
        tokens_max: int,
        positions_max: int,
        text: TextModel,
    ) -> SessionOrder:
        config = self.config
        return SessionOrder(
            session=session,
            prompt=prompt,
            sampling=sampling,
            tokens_max=tokens_max,
            stop_tokens=frozenset(text.card.stop_tokens),
            positions_max=positions_max,
            deadline_ns=time.monotonic_ns() + int(config.request_timeout * 1e9),
            chunk=config.chunk,
            window=config.window,
            step_timeout_ns=int(config.step_timeout * 1e9),
            recovery_timeout_ns=int(config.recovery_timeout * 1e9),
            keep=config.prefix_cache != "off",
            exact=self._exact(generation),
        )

    def _kept(
        self, generation: Generation, model: Digest, order: SessionOrder
    ) -> tuple[KeptSession, int] | None:
        """A finished session that this one may go on from, and for how many positions."""
        told = self.config.prefix_cache
        fixed = generation.seeded or order.sampling.temperature == 0
        if told == "off" or (told == "auto" and fixed):
            return None
        return self.driver.prefixes.longest(model, order.prompt)

    def _rules(self, model: str, class_name: str) -> tuple[ClassPolicy, ...]:
        """What the policy says of a model and of a class of requests; raises ``RequestError``."""
        policy = self.policies.policy
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

    def _replan(
        self,
        model: str,
        rules: tuple[ClassPolicy, ...],
        session: Session,
        before: RoutePlan,
        avoid: frozenset[NodeId],
    ) -> RoutePlan:
        """Another route for a session that runs: of the same model, runtime and quantization (rule R7), and
        where it pays with the stages that hold its KV cache."""
        return self.plan(
            model,
            session.order,
            rules,
            draw=secrets.randbits(62) + 1,
            avoid=avoid,
            pin=before.group,
            runs=session,
        )

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
        stages = [*holds.stages] if holds else []
        if runs:
            stages = [*runs.route.stages, *(s for s in runs.standbys if s is not None)]
        percentile = max(percentile, *(r.percentile for r in rules)) if rules else percentile
        request = RouteRequest(
            model,
            self.node_id,
            percentile=Percentile[percentile.upper()],
            rules=rules,
            avoid=avoid,
            pin=pin,
            kept=Kept(kept[0].route, kept[1]) if kept else None,
            learned=self.driver.learner.learned,
            tokens=min(order.tokens_max, _TOKENS_SOON if done else _TOKENS_EXPECTED) if order else 1,
            prompt=len(order.prompt) + done if order else 0,
            steps=done if order and order.exact else 0,
            holding=frozenset((s.node, s.shard) for s in stages) if done else frozenset(),
            chunk=self.config.chunk,
            own=self.driver.own_sessions(),
            ours_told=self.driver.ours_told,
            positions=len(order.prompt) + order.tokens_max if order else 0,
            draw=draw,
            alternatives=_ALTERNATIVES,
        )
        return self._router.plan(self.view.snapshot, request)

    def explain(self, model: str, percentile: str, class_name: str = "") -> dict[str, Any]:
        """``/mesh/v1/route``: the route that a request would take now, with every term of its cost."""
        if model not in models_served(self.view.snapshot):
            known = ", ".join(sorted(models_served(self.view.snapshot))) or "none"
            raise RequestError(
                f"the model {model!r} does not exist here (served: {known})",
                param="model",
                code="model_not_found",
                status=404,
            )
        if percentile not in ("p50", "p99"):
            raise RequestError(f"percentile is {percentile!r}; use p50 or p99", param="percentile")
        names = {n.id: n.name for n in self.view.snapshot.nodes.values()}
        rules = self._rules(model, class_name)
        return route_report(self.plan(model, rules=rules, percentile=percentile), names)

    def _context(self, route: LayeredRoute, model_context: int) -> int:
        """Positions that every stage of the route has room for."""
        wanted = {(s.node, s.shard) for s in route.stages}
        rooms = [
            r.context_max
            for n in self.view.snapshot.alive()
            for r in n.replicas
            if (n.id, r.shard.digest) in wanted and r.context_max
        ]
        return min([model_context, *rooms])

    async def _prompts(self, text: TextModel, generation: Generation, context: int) -> list[tuple[int, ...]]:
        """Token ids of a request's prompts; a text that cannot fit is not even tokenized."""
        where = "messages" if generation.chat else "prompt"
        given = generation.prompts
        if generation.chat:
            given = (text.render(generation.messages),)
        prompts = []
        for prompt in given:
            if isinstance(prompt, str):
                _check_length("at least ", len(prompt) // text.card.token_letters_max, context, where)
                prompt = tuple(
                    text.encode(prompt)
                    if len(prompt) < _LONG_TEXT
                    else await asyncio.to_thread(text.encode, prompt)
                )
            _check_length("", len(prompt), context, where)
            if not prompt:
                raise RequestError("the prompt is empty", param=where)
            prompts.append(prompt)
        return prompts

    def _orders(
        self,
        generation: Generation,
        prompts: list[tuple[int, ...]],
        context: int,
        text: TextModel,
        vocabulary: int,
    ) -> list[SessionOrder]:
        orders: list[SessionOrder] = []
        seed = generation.sampling.seed if generation.seeded else secrets.randbits(64)
        if any(token >= vocabulary for token, _ in generation.sampling.logit_bias):
            raise RequestError(
                f"logit_bias names a token beyond the vocabulary of {vocabulary}", param="logit_bias"
            )
        for prompt in prompts:
            where = "messages" if generation.chat else "prompt"
            if not all(0 <= token < vocabulary for token in prompt):
                raise RequestError(f"the prompt has token ids outside 0 to {vocabulary - 1}", param=where)
            room = context - len(prompt)
            for choice in range(generation.choices):
                sampling = replace(generation.sampling, seed=seed, choice=choice)
                tokens_max = min(generation.tokens_max or room, room)
                session = SessionId(secrets.token_hex(16))
                orders.append(self._order(generation, session, prompt, sampling, tokens_max, context, text))
        return orders

    async def _text_model(self, name: str, digest: str) -> TextModel:
        known = self._texts.get(name)
        if known is None or known.card.digest != digest:
            try:
                known = await asyncio.to_thread(self._load_text, name)
            except (InputError, OSError) as error:
                raise NoRoute(f"this agent cannot read the tokenizer of {name}: {error}") from error
            self._texts[name] = known
        if known.card.digest != digest:
            raise NoRoute(
                f"this agent has {name}@{known.card.digest[:12]}, the replicas serve {name}@{digest[:12]}; pull the same file"
            )
        return known

    def _load_text(self, name: str) -> TextModel:
        return TextModel(self.store.card(name), self.store.tokenizer_json(name))


def _check_length(about: str, count: int, context: int, where: str) -> None:
    if count >= context:
        raise RequestError(
            f"the prompt has {about}{count} tokens; the context is {context} tokens, answer included",
            param=where,
            code="context_length_exceeded",
        )
