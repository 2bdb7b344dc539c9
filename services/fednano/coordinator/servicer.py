"""The coordinator's gRPC service: a method checks, asks the store, and answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from fednano.coordinator import buffer, keys
from fednano.coordinator.applicants import applicant_of
from fednano.coordinator.auth import CLIENTS, READERS, require
from fednano.coordinator.enrolment import Enrolment
from fednano.coordinator.fields import StoredClient
from fednano.coordinator.metrics import Metrics
from fednano.coordinator.records import StoredAdapter, Tensors
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent, Visitor
from fednano.coordinator.store_standing import Standing
from fednano.coordinator.store_updates import Claim, EvaluationMeta, Sender, UpdateMeta
from fednano.coordinator.strategies import strategy_of
from fednano.coordinator.submission import (
    Refused,
    Rules,
    checked,
    metrics_of,
    receive_head,
    receive_payload,
    spent_of,
    started_from,
    update_meta,
)
from fednano.coordinator.tasks import (
    RETRY_MS,
    may_evaluate,
    membership,
    must_train,
    next_task,
    why_stop,
)
from fednano.wire.codec import chunked, pack, spec_of
from fednano.wire.coordinator_pb2 import (
    AdapterHead,
    GetAdapterReply,
    GetAdapterRequest,
    HeartbeatReply,
    HeartbeatRequest,
    JoinReply,
    JoinRequest,
    LlmToken,
    LoginReply,
    LoginRequest,
    NextTaskReply,
    NextTaskRequest,
    SubmitEvaluationRequest,
    SubmitReply,
    SubmitRequest,
    Wait,
)
from fednano.wire.coordinator_pb2_grpc import CoordinatorServicer
from fednano.wire.errors import InvalidRequest, NotFound
from fednano.wire.headers import check_header
from fednano.wire.interceptors import Context
from fednano.wire.sessions import Identity, SessionSigner
from fednano.wire.tensor_pb2 import FP32, Header

log = logging.getLogger(__name__)

_MAX_WAIT_SECONDS = 60.0
_HEAVY_CALLS = 16  # worked on at a time: a whole cohort's must not hold up those who only ask
_LOOK_AGAIN_SECONDS = 5.0  # while a call is held open: a ring may have been lost
_DOING_LENGTH = 80
_RESULTS = {
    "accepted": (SubmitReply.ACCEPTED, ""),
    "duplicate": (SubmitReply.DUPLICATE, "it was accepted before"),
    "late": (SubmitReply.LATE, "the round has moved on"),
    "stranger": (SubmitReply.REFUSED, "this client is not in the cohort of that attempt"),
}


class Servicer(CoordinatorServicer):
    """See proto/coordinator.proto."""

    def __init__(
        self,
        store: Store,
        signer: SessionSigner,
        metrics: Metrics,
        max_update_norm: float,
        message_bytes: int,
    ) -> None:
        self._store = store
        self._signer = signer
        self._metrics = metrics
        self._max_norm = max_update_norm
        self._limit = message_bytes
        self._enrolment = Enrolment(store, message_bytes)
        self._working = asyncio.Semaphore(_HEAVY_CALLS)  # never held while a client sends or reads
        self._closing = False

    def close(self) -> None:
        """Ends the calls that are being held open."""
        self._closing = True
        self._store.database.ring_all()

    async def Join(self, request: JoinRequest, context: Context) -> JoinReply:  # noqa: N802
        identity = require(CLIENTS)
        checked_header(request.header)
        outcome = await self._enrolment.join(request.header.run, applicant_of(request, identity))
        if isinstance(outcome, str):
            return JoinReply(wait=Wait(retry_after_ms=5 * RETRY_MS, reason=outcome))
        member = membership(outcome.run, outcome.member)
        member.llm_token.CopyFrom(self._llm_token(outcome.member.id, identity, outcome.run.name))
        log.info("client joined", extra={"run": outcome.run.name})
        return JoinReply(member=member)

    async def Login(self, request: LoginRequest, context: Context) -> LoginReply:  # noqa: N802
        identity = require(CLIENTS)
        checked_header(request.header)
        await self._enrolment.check_login(request.header.client, identity)
        return LoginReply(llm_token=self._llm_token(request.header.client, identity, ""))

    def _llm_token(self, client: str, identity: Identity, run: str) -> LlmToken:
        token, expires = self._signer.issue(Identity(client, identity.role, run))
        return LlmToken(token=token, expires_at_ms=expires)

    async def _member(self, header: Header) -> tuple[Standing, StoredClient]:
        """Where the run stands and the member that a header speaks for."""
        visitor = _visitor(header)
        standing = await self._store.standings.current(visitor.run)
        return standing, await self._store.members.current(
            visitor.run, visitor.client, visitor.session, visitor.token_id
        )

    async def NextTask(self, request: NextTaskRequest, context: Context) -> NextTaskReply:  # noqa: N802
        """Held open until there is something to do, or the wait is over. A client looks when its
        run's state or round changes, or its own session; and often enough to count as alive."""
        visitor = _visitor(request.header)
        now = asyncio.get_running_loop().time
        deadline = now() + min(request.wait_ms / 1000, _MAX_WAIT_SECONDS)
        kinds = ("run", "round", keys.session(visitor.client))
        patience = min(_LOOK_AGAIN_SECONDS, self._store.members.client_seconds / 3)
        with self._store.database.bell(visitor.run, kinds, patience) as bell:
            while True:
                reply = await next_task(self._store, visitor)
                left = deadline - now()
                if left <= 0 or self._closing or not reply.HasField("wait"):
                    return reply
                rung = await bell.wait(left)
                if self._closing or (not rung and now() >= deadline):
                    return reply  # nothing has changed

    async def GetAdapter(  # noqa: N802
        self, request: GetAdapterRequest, context: Context
    ) -> AsyncIterator[GetAdapterReply]:
        require(READERS)
        checked_header(request.header)
        name = request.run or request.header.run
        async with self._working:
            number, adapter = await self._find_adapter(name, request)
        names = sorted(adapter.tensors)
        specs = [spec_of(tensor, adapter.tensors[tensor], FP32) for tensor in names]
        yield GetAdapterReply(
            head=AdapterHead(
                tensors=specs, scale=adapter.scale, digest=adapter.digest, round=number
            )
        )
        for chunk in chunked(pack(adapter.tensors[tensor], FP32) for tensor in names):
            yield GetAdapterReply(chunk=chunk)

    async def _find_adapter(
        self, name: str, request: GetAdapterRequest
    ) -> tuple[int, StoredAdapter]:
        """The round and adapter that `request` asks for."""
        run = (await self._store.standings.current(name)).run
        which = request.WhichOneof("which")
        if which == "digest":
            return await self._store.adapters.find(run, request.digest)
        if which is None:
            raise InvalidRequest.of("which", "digest, round, best or last", "nothing")
        numbers = {"round": request.round, "best": run.best_round, "last": run.last_round}
        number = numbers[which]
        if number is None:
            raise NotFound(f"run {name!r} has no {which} round yet")
        return number, await self._store.adapter_of_round(name, number)

    async def Submit(  # noqa: N802
        self, stream: AsyncIterator[SubmitRequest], context: Context
    ) -> SubmitReply:
        """No chunk is received for a head that won't do; nothing is kept before the last one has
        come and everything was checked."""
        require(CLIENTS)
        head = await receive_head(stream)
        spent, sender = spent_of(head.costs), _sender(head.header)
        async with self._working:
            standing, client = await self._member(head.header)
        asynchronous = standing.run.config.asynchronous is not None
        claim_of = buffer.claim if asynchronous else _claimed
        try:
            async with self._working:
                rules = await self._rules(standing, client, sender)
            meta = update_meta(head, rules)
            payload, digest = await receive_payload(stream, head, self._limit)
            async with self._working:
                tensors = await asyncio.to_thread(checked, head, payload, digest, rules)
                if asynchronous:
                    tensors = await asyncio.to_thread(buffer.added, tensors, rules.base)
                claim = await claim_of(self._store, sender, tensors, meta, spent)
        except Refused as refused:
            meta, reason = UpdateMeta(head.samples), str(refused)
            claim = await claim_of(self._store, sender, {}, meta, spent, reason)
            return self._answer(claim, spent, reason)
        return self._answer(claim, spent)

    async def _rules(self, standing: Standing, client: StoredClient, sender: Sender) -> Rules:
        """Raises Refused where no update of the client is wanted: the store says late, duplicate or
        stranger then."""
        run = standing.run
        if run.config.asynchronous is not None:
            digest = await buffer.started(self._store, standing, sender)
        else:
            digest = await self._base(standing, client, sender)
        base = await self._store.adapters.get(run, digest)
        strategies = [strategy_of(one) for one in run.config.strategies]
        start = started_from(base.tensors, run.config, client.shard)
        return Rules(digest, start, strategies, self._max_norm)

    async def _base(self, standing: Standing, client: StoredClient, sender: Sender) -> str:
        """Digest of the adapter that the round's training starts from. Raises Refused."""
        round_ = standing.round
        if standing.run.state.ended or round_ is None or round_.number != sender.round:
            raise Refused("there is no such round, or it has moved on")
        if round_.attempt != sender.attempt or not round_.base:
            raise Refused("there is no such attempt of a round")
        if not await must_train(self._store, standing, client):
            raise Refused("no update of this client is wanted now")
        return round_.base

    def _answer(self, claim: Claim, spent: Spent, refusal: str = "") -> SubmitReply:
        result = claim.result
        value, reason = _RESULTS.get(result, (SubmitReply.REFUSED, refusal))
        reason = claim.reason or reason
        self._metrics.updates.labels("refused" if result == "stranger" else result).inc()
        if claim.counted:
            self._metrics.spent(spent)
        log.info("update", extra={"result": result, "reason": reason})
        return SubmitReply(result=value, reason=reason)

    async def SubmitEvaluation(  # noqa: N802
        self, request: SubmitEvaluationRequest, context: Context
    ) -> SubmitReply:
        standing, client = await self._member(request.header)
        sender, spent = _sender(request.header), spent_of(request.costs)
        meta = EvaluationMeta(
            client.role,
            {item.adapter: item.samples for item in request.evaluations},
            {item.adapter: metrics_of(item.metrics) for item in request.evaluations},
        )
        refusal = _evaluation_refusal(standing, client, sender, meta)
        claim = await self._store.updates.claim_evaluation(sender, meta, spent, refusal)
        if claim.counted:
            self._metrics.spent(spent)
        value, reason = _RESULTS.get(claim.result, (SubmitReply.REFUSED, refusal))
        return SubmitReply(result=value, reason=reason)

    async def Heartbeat(  # noqa: N802
        self, request: HeartbeatRequest, context: Context
    ) -> HeartbeatReply:
        standing, client = await self._member(request.header)
        run = standing.run
        if not 0 <= request.progress <= 1:
            raise InvalidRequest.of("progress", "0 to 1", request.progress)
        header, spent = request.header, spent_of(request.costs)
        asynchronous = run.config.asynchronous is not None
        last = run.round + asynchronous  # training for it begins before it is opened
        if spent and header.round > last:
            raise InvalidRequest.of("header.round", f"0 to {last}", header.round)
        token = self._renewed(client, run.name)
        told = replace(
            client,
            progress=request.progress,
            doing=request.doing[:_DOING_LENGTH],
            token_expires_ms=token.expires_at_ms if token else client.token_expires_ms,
        )
        # Outside a task it is spent on the round that the others are at.
        number = header.round if header.attempt else run.round
        if await self._store.members.beat(run.name, told, number, spent, _request(header)):
            self._metrics.spent(spent)
        reason = why_stop(run, standing.round, client, header.round, header.attempt)
        return HeartbeatReply(stop=bool(reason), reason=reason, llm_token=token)

    def _renewed(self, client: StoredClient, run: str) -> LlmToken | None:
        """A new token for the LLM service once less than half of the old one's life is left."""
        left_ms = client.token_expires_ms - self._store.database.clock() * 1000
        if left_ms >= self._signer.ttl_seconds * 500:
            return None
        return self._llm_token(client.id, require(CLIENTS), run)


async def _claimed(
    store: Store,
    sender: Sender,
    tensors: Tensors,
    meta: UpdateMeta,
    spent: Spent,
    refusal: str = "",
) -> Claim:
    return await store.updates.claim(sender, tensors, meta, spent, refusal)


def checked_header(header: Header) -> None:
    """Also that the client's id can be part of a key. Raises InvalidRequest."""
    check_header(header)
    if not keys.CLIENT_ID.fullmatch(header.client):
        raise InvalidRequest.of(
            "header.client", "1 to 128 letters, digits, '.', '_' or '-'", repr(header.client)
        )


def _visitor(header: Header) -> Visitor:
    """The member that a header says it speaks for. Raises InvalidRequest, PermissionDenied."""
    identity = require(CLIENTS)
    checked_header(header)
    if not header.run or not header.session:
        raise InvalidRequest.of("header.session", "a session issued by Join", "nothing")
    return Visitor(header.run, header.client, header.session, identity.token_id)


def _sender(header: Header) -> Sender:
    place = header.round, header.attempt
    return Sender(header.run, header.client, header.session, *place, _request(header))


def _request(header: Header) -> str:
    """The call's name, no longer than ours are: Redis keeps the last one of each client."""
    return header.request[:32]


def _evaluation_refusal(
    standing: Standing, client: StoredClient, sender: Sender, meta: EvaluationMeta
) -> str:
    """Why an evaluation can't be used; "" if it can, or if the store will call it late."""
    run, round_ = standing.run, standing.round
    if round_ is None or (round_.number, round_.attempt) != (sender.round, sender.attempt):
        return ""
    if round_.adapter_digest not in meta.metrics:
        return f"evaluations: expected one of {round_.adapter_digest}, got {sorted(meta.metrics)}"
    if round_.state == "evaluating" and not may_evaluate(run, round_, client):
        return "this client was not asked to evaluate the round"
    return ""
