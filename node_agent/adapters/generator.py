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

from mesh.errors import InputError, MeshError, NoRoute, RequestError
from mesh.session_events import SessionOrder
from mesh.types import Digest, LayeredRoute, NodeId, Sampling, SessionId
from node_agent.adapters.http_api import Job, new_choice, new_envelope
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.pages import trim_heap
from node_agent.adapters.peers import ClusterView
from node_agent.adapters.planner import RoutePlanner
from node_agent.adapters.session_driver import SessionDriver, SessionHandle
from node_agent.adapters.takeover import Takeovers
from node_agent.config import AgentConfig
from node_agent.ingress.chat import TextModel
from node_agent.ingress.resumption import (
    SessionRecord,
    parse_event_id,
    read_record,
    write_record,
)
from node_agent.ingress.schema import Generation
from node_agent.prefixes import KeptSession
from scheduler.routing import (
    mixed,
    models_served,
)

log = logging.getLogger(__name__)

_LONG_TEXT = 4096


class Generator:
    """Starts what clients ask for."""

    def __init__(
        self,
        config: AgentConfig,
        node: NodeId,
        store: ModelStore,
        view: ClusterView,
        driver: SessionDriver,
        planner: RoutePlanner,
        takeovers: Takeovers,
    ) -> None:
        self._takeovers = takeovers
        self.config, self.node_id, self.store, self.view = config, node, store, view
        self.driver, self.planner = driver, planner
        self._texts: dict[str, TextModel] = {}

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
        rules = self.planner.rules(name, class_name)
        route = self.planner.plan(name, rules=rules).route
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
                plan = self.planner.plan(name, order, rules, draw=self.planner.draw(), kept=kept)
                if mixed(plan.group):
                    order = replace(order, exact=False)
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
                    order = self.driver.prefixes.begin(order, kept[0], plan.resumed)
                    cached += plan.resumed if i % generation.choices == 0 else 0
                replan = partial(self.planner.replan, name, rules)
                handles.append(self.driver.start(order, plan, str(shape.ref), replan))
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
        known, epoch = await self._takeovers.claim(
            session, seen, lambda request: read_record(request).tokens_max
        )
        log.info(
            "took a session over at epoch %d with %d tokens, in %.0f ms",
            epoch.counter,
            len(known.tokens),
            (time.monotonic() - begin) * 1000,
            extra={"session": session},
        )
        record = read_record(known.request)
        generation, group = record.generation, record.group
        text = await self._text_model(generation.model, group[0])
        rules = self.planner.rules(generation.model, record.class_name)
        order = self._order(
            generation, session, known.prompt, record.sampling, record.tokens_max, record.positions_max, text
        )
        exact = order.exact and not mixed(group)
        order = replace(order, keep=False, request=known.request, exact=exact)
        plan = self.planner.plan(
            generation.model,
            order,
            rules,
            draw=self.planner.draw(),
            pin=group,
            done=len(known.tokens),
            holds=known.route,
        )
        replan = partial(self.planner.replan, generation.model, rules)
        handle = self.driver.start(order, plan, generation.model, replan, (epoch, known.tokens))
        envelope = new_envelope(session, generation.model, generation.chat, record.created)
        choice = new_choice(record.sampling.choice, text, generation.stop)
        return Job(
            replace(generation, stream=True), envelope, [choice], [handle], len(known.prompt), seen=seen
        )

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
        speculate = generation.speculation
        if speculate is None:
            speculate = config.speculation == "on"
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
            # What ran in steps of several positions cannot be run again bit by bit from its tokens alone.
            exact=self._exact(generation) and not speculate,
            speculate=speculate,
        )

    def _kept(
        self, generation: Generation, model: Digest, order: SessionOrder
    ) -> tuple[KeptSession, int] | None:
        """Another session that this one may begin with, and for how many positions."""
        fixed = generation.seeded or order.sampling.temperature == 0
        return self.driver.begins_alike(model, order, self.config.prefix_cache, fixed)

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
        made = TextModel(self.store.card(name), self.store.tokenizer_json(name))
        trim_heap()  # reading a vocabulary takes twice the memory that it is kept in: 26 MB of 49,152 entries
        return made


def _check_length(about: str, count: int, context: int, where: str) -> None:
    if count >= context:
        raise RequestError(
            f"the prompt has {about}{count} tokens; the context is {context} tokens, answer included",
            param=where,
            code="context_length_exceeded",
        )
