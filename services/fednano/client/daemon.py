"""The client's life: join a run, do its tasks, join the next one."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from pydantic import ValidationError
from structlog.contextvars import bound_contextvars

from fednano import __version__, logs, tracing
from fednano.client.cache import FeatureCache
from fednano.client.coordination import CoordinatorClient, Membership
from fednano.client.datasets import JsonlDataset
from fednano.client.edge import EdgeHalf
from fednano.client.factored import FactoredLanguageModel
from fednano.client.heartbeat import Heartbeat, TaskGivenUp
from fednano.client.meter import Meter
from fednano.client.placements import NanoPlacement, Placement
from fednano.client.placements_connector import ConnectorEdge, ConnectorPlacement, cache_of
from fednano.client.placements_lora import LoraPlacement
from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.client.scaffold import Controls
from fednano.client.settings import ClientSettings
from fednano.client.trainer import Trainer
from fednano.client.weights import trainable
from fednano.client.worker import Worker
from fednano.models.checkpoint import read_record
from fednano.models.devices import pick_device
from fednano.models.language_model import LanguageModel
from fednano.settings import invalid
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import SessionEnded, Unsupported
from fednano.wire.run_config import RunConfig
from fednano.wire.tensor_pb2 import BF16, FP16, FP32, INT8, Header, TensorSpec

log = logging.getLogger(__name__)

WIRE_DTYPES = {"fp32": FP32, "fp16": FP16, "bf16": BF16, "int8": INT8}
POLL_MS = 20_000
_FENCED_TWICE_SECONDS = 60.0


class Stopped(BaseException):
    """A signal asked this process to end; BaseException, so that nothing takes it for a failure."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Raises Stopped, and again every second: one raised within a callback of C code is lost."""
    signal.signal(signal.SIGALRM, lambda *_: _stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, 1)
    raise Stopped(signal.Signals(number).name)


def _end(client: Client) -> NoReturn:
    """Without the interpreter's own tear-down: with torch that takes seconds on a busy machine, in
    which whoever said stop may lose patience."""
    client.close()
    tracing.stop()
    logging.shutdown()
    os._exit(0)


@dataclass
class Client:
    """One client process."""

    settings: ClientSettings
    coordinator: CoordinatorClient
    replicas: Replicas
    meter: Meter
    _own_data: JsonlDataset | None
    _controls: Controls
    _task: object = None
    _cache: FeatureCache | None = field(default=None, repr=False)
    _before_connector: FeatureCache | None = field(default=None, repr=False)

    @classmethod
    def connect(cls, settings: ClientSettings) -> Client:
        """Nothing is dialled yet. Raises InvalidRequest for settings that can't work here."""
        settings.check()
        pick_device(settings.device)  # now, rather than in a run
        meter, tls = Meter(), settings.client_tls()
        coordinator = CoordinatorClient(
            settings.coordinator,
            settings.token.get_secret_value(),
            settings.id,
            tls,
            meter,
            settings.retry_seconds,
        )
        data = JsonlDataset.read(settings.data) if settings.data else None
        controls = Controls(settings.id, settings.cache_dir)
        return cls(settings, coordinator, Replicas(settings.llm, tls), meter, data, controls)

    def close(self) -> None:
        self.replicas.close()
        self.coordinator.close()

    def run(self) -> int:
        """Until a signal comes. With `once`, or for a run that was named, until that has ended:
        0 if it finished, else 1."""
        fenced_at = float("-inf")
        while True:
            try:
                member = self._join()
                with bound_contextvars(run=member.run):
                    state = self._serve(member)
                self.coordinator.forget_costs()
            except SessionEnded as error:
                if time.monotonic() - fenced_at < _FENCED_TWICE_SECONDS:
                    log.error("another process runs under this client id")
                    return 1
                fenced_at = time.monotonic()
                log.warning("session ended, joining again", extra={"reason": str(error)})
                continue
            if self.settings.once or self.settings.run:
                return 0 if state == "finished" else 1

    def _join(self) -> Membership:
        """Asks until a run wants this client."""
        record = read_record(self.settings.edge, "edge")
        weights = trainable(self.settings.edge, self.settings.llm_half)
        role = pb.EVALUATOR if self.settings.role == "evaluator" else pb.TRAINER
        waiting_for = ""
        while True:
            header = self.coordinator.header()
            header.run = self.settings.run
            reply = self.coordinator.join(
                pb.JoinRequest(
                    header=header,
                    role=role,
                    samples=len(self._own_data) if self._own_data else 0,
                    fingerprint=record.fingerprint,
                    hidden_size=record.hidden_size,
                    version=__version__,
                    weights=[TensorSpec(name=n, dtype=FP32, shape=s) for n, s in weights],
                )
            )
            if reply.WhichOneof("outcome") == "member":
                return self._member(reply.member)
            if reply.wait.reason != waiting_for:
                waiting_for = reply.wait.reason
                log.info("waiting for a run", extra={"reason": waiting_for})
            time.sleep(reply.wait.retry_after_ms / 1000)

    def _member(self, reply: pb.Membership) -> Membership:
        config = config_of(reply)
        log.info("joined", extra={"run": reply.run})
        return Membership(
            reply.run, reply.session, config, reply.llm_token.token, reply.shard, reply.of
        )

    def _serve(self, member: Membership) -> str:
        """Does a run's tasks; returns the state in which the run ended."""
        heartbeat = Heartbeat(self.coordinator, member, self.settings.heartbeat_seconds)
        with heartbeat:
            placement = self._placement(member)
            worker = Worker(
                self.coordinator,
                member,
                placement,
                heartbeat,
                self._own_data,
                self.settings.role == "evaluator",
                self._controls,
                self.settings.cache_dir,
            )
            while True:
                heartbeat.check()
                reply = self.coordinator.next_task(member, POLL_MS)
                match reply.WhichOneof("task"):
                    case "finished":
                        state = reply.finished.run_state
                        log.info("run ended", extra={"state": state})
                        self._controls.forget(member.run)
                        placement.forget()
                        return state
                    case "train":
                        self._do(worker.train, reply.train)
                    case "evaluate":
                        self._do(worker.evaluate, reply.evaluate)

    def _do(self, work: Callable[[Any], None], task: Any) -> None:
        self._task = task
        with bound_contextvars(round=task.round):
            try:
                with tracing.working(work.__name__, logs.bound_ids()):
                    work(task)
            except TaskGivenUp as error:
                log.info("task given up", extra={"reason": str(error)})
            finally:
                self._task = None

    def _llm_header(self, member: Membership) -> Header:
        header = self.coordinator.header(member, self._task)
        header.alone = member.config.deterministic
        return header

    def _placement(self, member: Membership) -> Placement:
        """Of the weights that the run trains. With `lora` no LLM service is asked for anything."""
        config = member.config
        adapter, training = config.adapter, config.training
        if config.placement == "lora":
            half = self.settings.llm_half
            assert half is not None, "the coordinator lets nobody in who has none"
            frozen = config.strategy.name == "ffa"
            return LoraPlacement.load(half, adapter.rank, adapter.scale, self._edge_half, frozen)
        llm = RemoteLanguageModel(
            self.replicas,
            Caller(lambda: self._llm_header(member), member.token),
            self.meter,
            WIRE_DTYPES[training.wire_dtype],
            self.settings.retry_seconds,
        )
        if config.placement == "connector":
            return ConnectorPlacement(self._connector_edge(llm), llm, training.loss)
        trainer = Trainer(self._edge_half(llm), llm, _factored(llm, config))
        return NanoPlacement(trainer, adapter.scale)

    def _connector_edge(self, llm: LanguageModel) -> ConnectorEdge:
        """As `_edge_half`; what is kept is what the encoder made of images."""
        if self._before_connector is None:
            record = read_record(self.settings.edge, "edge")
            self._before_connector = cache_of(record.fingerprint, self.settings.cache_dir)
        return ConnectorEdge(self.settings.edge, llm, self._before_connector)

    def _edge_half(self, llm: LanguageModel) -> EdgeHalf:
        """Bound to this membership's LLM; images that were encoded for an earlier one are kept."""
        if self._cache is None:
            record = read_record(self.settings.edge, "edge")
            self._cache = FeatureCache(record.fingerprint, self.settings.cache_dir)
        return EdgeHalf(self.settings.edge, llm, self._cache, self.settings.device)


def config_of(member: pb.Membership) -> RunConfig:
    """What the run asks for. Raises Unsupported for settings that a newer coordinator may know."""
    try:
        return RunConfig.model_validate_json(member.config_json)
    except ValidationError as error:
        told = f"run {member.run!r} asks for what a client of version {__version__} doesn't know"
        raise Unsupported(f"{told}: {invalid(error)}") from None


def _factored(llm: RemoteLanguageModel, config: RunConfig) -> FactoredLanguageModel | None:
    """Where the run wants the factored wire. A service that does not offer it gets the dense one:
    the numbers are the same but for rounding, only more bytes travel."""
    if config.training.wire != "factored":
        return None
    if "factored" not in llm.card.forms:
        log.warning("the LLM service does not offer the factored wire; the dense one is used")
        return None
    return FactoredLanguageModel(llm)


def run(settings: ClientSettings) -> int:
    """The process: returns its exit status. A signal ends it at once; the coordinator notices."""
    settings.set_threads()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    client = Client.connect(settings)
    with bound_contextvars(client=settings.id):
        try:
            return client.run()
        except Stopped as signalled:
            signal.setitimer(signal.ITIMER_REAL, 0)
            log.info("stopped", extra={"signal": str(signalled)})
            _end(client)
        finally:
            client.close()
