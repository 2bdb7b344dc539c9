from fednano.wire import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    TRAINER: _ClassVar[Role]
    EVALUATOR: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
TRAINER: Role
EVALUATOR: Role

class JoinRequest(_message.Message):
    __slots__ = ("header", "role", "samples", "fingerprint", "abilities", "version", "hidden_size", "weights")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ABILITIES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    role: Role
    samples: int
    fingerprint: str
    abilities: _containers.RepeatedScalarFieldContainer[str]
    version: str
    hidden_size: int
    weights: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., role: _Optional[_Union[Role, str]] = ..., samples: _Optional[int] = ..., fingerprint: _Optional[str] = ..., abilities: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., hidden_size: _Optional[int] = ..., weights: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("member", "wait")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    member: Membership
    wait: Wait
    def __init__(self, member: _Optional[_Union[Membership, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("run", "session", "config_json", "enrolled", "shard", "of", "llm_token")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    LLM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    run: str
    session: str
    config_json: str
    enrolled: bool
    shard: int
    of: int
    llm_token: LlmToken
    def __init__(self, run: _Optional[str] = ..., session: _Optional[str] = ..., config_json: _Optional[str] = ..., enrolled: bool = ..., shard: _Optional[int] = ..., of: _Optional[int] = ..., llm_token: _Optional[_Union[LlmToken, _Mapping]] = ...) -> None: ...

class LlmToken(_message.Message):
    __slots__ = ("token", "expires_at_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_at_ms: int
    def __init__(self, token: _Optional[str] = ..., expires_at_ms: _Optional[int] = ...) -> None: ...

class LoginRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ...) -> None: ...

class LoginReply(_message.Message):
    __slots__ = ("llm_token",)
    LLM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    llm_token: LlmToken
    def __init__(self, llm_token: _Optional[_Union[LlmToken, _Mapping]] = ...) -> None: ...

class NextTaskRequest(_message.Message):
    __slots__ = ("header", "wait_ms")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    wait_ms: int
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class NextTaskReply(_message.Message):
    __slots__ = ("train", "evaluate", "wait", "finished")
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    train: TrainTask
    evaluate: EvaluateTask
    wait: Wait
    finished: Finished
    def __init__(self, train: _Optional[_Union[TrainTask, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateTask, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class TrainTask(_message.Message):
    __slots__ = ("round", "attempt", "adapter", "hyper_json", "deadline_ms", "shard", "of", "auxiliary", "rank")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    HYPER_JSON_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    AUXILIARY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    adapter: str
    hyper_json: str
    deadline_ms: int
    shard: int
    of: int
    auxiliary: _containers.RepeatedScalarFieldContainer[str]
    rank: int
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., adapter: _Optional[str] = ..., hyper_json: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., shard: _Optional[int] = ..., of: _Optional[int] = ..., auxiliary: _Optional[_Iterable[str]] = ..., rank: _Optional[int] = ...) -> None: ...

class EvaluateTask(_message.Message):
    __slots__ = ("round", "attempt", "adapters", "deadline_ms", "shard", "of")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    adapters: _containers.RepeatedScalarFieldContainer[str]
    deadline_ms: int
    shard: int
    of: int
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., adapters: _Optional[_Iterable[str]] = ..., deadline_ms: _Optional[int] = ..., shard: _Optional[int] = ..., of: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("retry_after_ms", "reason")
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    retry_after_ms: int
    reason: str
    def __init__(self, retry_after_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("run_state", "reason")
    RUN_STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run_state: str
    reason: str
    def __init__(self, run_state: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("header", "run", "digest", "round", "best", "last")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    run: str
    digest: str
    round: int
    best: bool
    last: bool
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., run: _Optional[str] = ..., digest: _Optional[str] = ..., round: _Optional[int] = ..., best: bool = ..., last: bool = ...) -> None: ...

class GetAdapterReply(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: AdapterHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[AdapterHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class AdapterHead(_message.Message):
    __slots__ = ("tensors", "scale", "digest", "round")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    scale: float
    digest: str
    round: int
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., scale: _Optional[float] = ..., digest: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: SubmitHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[SubmitHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SubmitHead(_message.Message):
    __slots__ = ("header", "base", "tensors", "auxiliary", "digest", "samples", "metrics", "costs")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    AUXILIARY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    base: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    auxiliary: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    digest: str
    samples: int
    metrics: _containers.ScalarMap[str, float]
    costs: Costs
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., base: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., auxiliary: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., digest: _Optional[str] = ..., samples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ...) -> None: ...

class Costs(_message.Message):
    __slots__ = ("sent_bytes", "received_bytes", "client_seconds", "server_seconds")
    class SentBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ReceivedBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SERVER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    sent_bytes: _containers.ScalarMap[str, int]
    received_bytes: _containers.ScalarMap[str, int]
    client_seconds: float
    server_seconds: float
    def __init__(self, sent_bytes: _Optional[_Mapping[str, int]] = ..., received_bytes: _Optional[_Mapping[str, int]] = ..., client_seconds: _Optional[float] = ..., server_seconds: _Optional[float] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("result", "reason")
    class Result(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RESULT_UNSPECIFIED: _ClassVar[SubmitReply.Result]
        ACCEPTED: _ClassVar[SubmitReply.Result]
        DUPLICATE: _ClassVar[SubmitReply.Result]
        LATE: _ClassVar[SubmitReply.Result]
        REFUSED: _ClassVar[SubmitReply.Result]
    RESULT_UNSPECIFIED: SubmitReply.Result
    ACCEPTED: SubmitReply.Result
    DUPLICATE: SubmitReply.Result
    LATE: SubmitReply.Result
    REFUSED: SubmitReply.Result
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    result: SubmitReply.Result
    reason: str
    def __init__(self, result: _Optional[_Union[SubmitReply.Result, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class SubmitEvaluationRequest(_message.Message):
    __slots__ = ("header", "evaluations", "costs")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    costs: Costs
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("adapter", "samples", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    samples: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, adapter: _Optional[str] = ..., samples: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("header", "progress", "doing", "costs")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DOING_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    progress: float
    doing: str
    costs: Costs
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., progress: _Optional[float] = ..., doing: _Optional[str] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("stop", "reason", "llm_token")
    STOP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LLM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    stop: bool
    reason: str
    llm_token: LlmToken
    def __init__(self, stop: bool = ..., reason: _Optional[str] = ..., llm_token: _Optional[_Union[LlmToken, _Mapping]] = ...) -> None: ...
