"""Who asks to join, as Join tells it."""

from __future__ import annotations

import re

from fednano.coordinator.enrolment import Applicant
from fednano.wire.coordinator_pb2 import EVALUATOR, TRAINER, JoinRequest
from fednano.wire.errors import InvalidRequest
from fednano.wire.placements import LORA, Shapes
from fednano.wire.sessions import Identity

_ROLES = {TRAINER: "trainer", EVALUATOR: "evaluator"}
_MAX_WEIGHTS, _MAX_DIMENSIONS = 10_000, 8
_WEIGHT = re.compile(r"(connector|lora)\.[A-Za-z0-9_.-]{1,240}")
_SHOWN = 80  # characters of a name that is none


def applicant_of(request: JoinRequest, identity: Identity) -> Applicant:
    """Raises InvalidRequest for what can't be."""
    if request.role not in _ROLES:
        raise InvalidRequest.of("role", "TRAINER or EVALUATOR", request.role)
    if not request.fingerprint:
        raise InvalidRequest.of("fingerprint", "the model's", "nothing")
    if not 1 <= request.hidden_size <= 1 << 20:
        raise InvalidRequest.of("hidden_size", "the LLM's", request.hidden_size)
    return Applicant(
        client=request.header.client,
        role=_ROLES[request.role],
        samples=request.samples,
        fingerprint=request.fingerprint,
        hidden_size=request.hidden_size,
        version=request.version[:64],
        token=identity,
        weights=_weights(request),
    )


def _weights(request: JoinRequest) -> Shapes:
    """What a client tells of its weights. Raises InvalidRequest for what no run could train."""
    if len(request.weights) > _MAX_WEIGHTS:
        raise InvalidRequest.of("weights", f"at most {_MAX_WEIGHTS}", len(request.weights))
    found = {spec.name: tuple(spec.shape) for spec in request.weights}
    if len(found) < len(request.weights):
        raise InvalidRequest.of("weights", "each name once", "one of them twice")
    for name, shape in found.items():
        if not _WEIGHT.fullmatch(name):
            expected = "connector.<name> or lora.<layer>, 256 characters at most"
            raise InvalidRequest.of("weights", expected, repr(name[:_SHOWN]))
        matrix = len(shape) == 2 or not name.startswith(LORA)
        if not matrix or len(shape) > _MAX_DIMENSIONS or not all(1 <= n <= 1 << 24 for n in shape):
            expected = f"at most {_MAX_DIMENSIONS} sizes, and 2 of a layer"
            raise InvalidRequest.of(f"weights.{name}", expected, list(shape)[:_SHOWN])
    return tuple(found.items())
