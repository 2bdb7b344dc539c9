from fednano.wire import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Modality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODALITY_UNSPECIFIED: _ClassVar[Modality]
    RAW: _ClassVar[Modality]
    TEXT: _ClassVar[Modality]
    IMAGE: _ClassVar[Modality]
MODALITY_UNSPECIFIED: Modality
RAW: Modality
TEXT: Modality
IMAGE: Modality

class Segment(_message.Message):
    __slots__ = ("modality", "start", "length")
    MODALITY_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    modality: Modality
    start: int
    length: int
    def __init__(self, modality: _Optional[_Union[Modality, str]] = ..., start: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("segments",)
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    def __init__(self, segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ...) -> None: ...

class Embeddings(_message.Message):
    __slots__ = ("samples", "dense", "factored", "position_ids", "token_types", "deep_features")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    FACTORED_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TYPES_FIELD_NUMBER: _ClassVar[int]
    DEEP_FEATURES_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    dense: DenseForm
    factored: FactoredForm
    position_ids: _tensor_pb2.Tensor
    token_types: _tensor_pb2.Tensor
    deep_features: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    def __init__(self, samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., dense: _Optional[_Union[DenseForm, _Mapping]] = ..., factored: _Optional[_Union[FactoredForm, _Mapping]] = ..., position_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., token_types: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., deep_features: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ...) -> None: ...

class DenseForm(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _tensor_pb2.TensorSpec
    def __init__(self, values: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...

class FactoredForm(_message.Message):
    __slots__ = ("bases", "left", "right")
    class RightEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: _tensor_pb2.TensorSpec
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...
    BASES_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    bases: _containers.RepeatedScalarFieldContainer[bytes]
    left: _tensor_pb2.TensorSpec
    right: _containers.MessageMap[int, _tensor_pb2.TensorSpec]
    def __init__(self, bases: _Optional[_Iterable[bytes]] = ..., left: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., right: _Optional[_Mapping[int, _tensor_pb2.TensorSpec]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("name", "fingerprint", "hidden_size", "vocabulary", "dtype", "limits", "forms", "wire_dtypes", "load", "replica", "version", "protocol")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    hidden_size: int
    vocabulary: int
    dtype: _tensor_pb2.DType
    limits: Limits
    forms: _containers.RepeatedScalarFieldContainer[str]
    wire_dtypes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.DType]
    load: Load
    replica: str
    version: str
    protocol: int
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., hidden_size: _Optional[int] = ..., vocabulary: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., forms: _Optional[_Iterable[str]] = ..., wire_dtypes: _Optional[_Iterable[_Union[_tensor_pb2.DType, str]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., replica: _Optional[str] = ..., version: _Optional[str] = ..., protocol: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("tokens_per_sample", "tokens_per_request", "samples_per_request", "queue", "new_tokens", "message_bytes", "body_bytes")
    TOKENS_PER_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    tokens_per_sample: int
    tokens_per_request: int
    samples_per_request: int
    queue: int
    new_tokens: int
    message_bytes: int
    body_bytes: int
    def __init__(self, tokens_per_sample: _Optional[int] = ..., tokens_per_request: _Optional[int] = ..., samples_per_request: _Optional[int] = ..., queue: _Optional[int] = ..., new_tokens: _Optional[int] = ..., message_bytes: _Optional[int] = ..., body_bytes: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("queued", "busy")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    queued: int
    busy: bool
    def __init__(self, queued: _Optional[int] = ..., busy: bool = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("header", "ids", "dtype")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    ids: _tensor_pb2.Tensor
    dtype: _tensor_pb2.DType
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ...) -> None: ...

class EmbedReply(_message.Message):
    __slots__ = ("values", "chunk")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    values: _tensor_pb2.TensorSpec
    chunk: bytes
    def __init__(self, values: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: ForwardHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[ForwardHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ForwardHead(_message.Message):
    __slots__ = ("header", "embeddings", "positions", "keep")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    embeddings: Embeddings
    positions: _tensor_pb2.Tensor
    keep: bool
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., embeddings: _Optional[_Union[Embeddings, _Mapping]] = ..., positions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., keep: bool = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("result", "chunk")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    result: ForwardResult
    chunk: bytes
    def __init__(self, result: _Optional[_Union[ForwardResult, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ForwardResult(_message.Message):
    __slots__ = ("activation", "logits", "spent")
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    activation: str
    logits: _tensor_pb2.TensorSpec
    spent: Spent
    def __init__(self, activation: _Optional[str] = ..., logits: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., spent: _Optional[_Union[Spent, _Mapping]] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: BackwardHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[BackwardHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class BackwardHead(_message.Message):
    __slots__ = ("header", "activation", "logits_gradient", "positions", "embeddings", "gradient_dtype", "want_fisher")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    LOGITS_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WANT_FISHER_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    activation: str
    logits_gradient: _tensor_pb2.TensorSpec
    positions: _tensor_pb2.Tensor
    embeddings: Embeddings
    gradient_dtype: _tensor_pb2.DType
    want_fisher: bool
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., activation: _Optional[str] = ..., logits_gradient: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., positions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., embeddings: _Optional[_Union[Embeddings, _Mapping]] = ..., gradient_dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., want_fisher: bool = ...) -> None: ...

class BackwardReply(_message.Message):
    __slots__ = ("gradient", "chunk", "spent")
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    gradient: Gradient
    chunk: bytes
    spent: Spent
    def __init__(self, gradient: _Optional[_Union[Gradient, _Mapping]] = ..., chunk: _Optional[bytes] = ..., spent: _Optional[_Union[Spent, _Mapping]] = ...) -> None: ...

class Gradient(_message.Message):
    __slots__ = ("dense", "factored")
    DENSE_FIELD_NUMBER: _ClassVar[int]
    FACTORED_FIELD_NUMBER: _ClassVar[int]
    dense: DenseForm
    factored: FactoredGradient
    def __init__(self, dense: _Optional[_Union[DenseForm, _Mapping]] = ..., factored: _Optional[_Union[FactoredGradient, _Mapping]] = ...) -> None: ...

class FactoredGradient(_message.Message):
    __slots__ = ("left", "right", "fisher")
    class RightEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: _tensor_pb2.TensorSpec
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...
    class FisherEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: _tensor_pb2.TensorSpec
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...
    LEFT_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    FISHER_FIELD_NUMBER: _ClassVar[int]
    left: _tensor_pb2.TensorSpec
    right: _containers.MessageMap[int, _tensor_pb2.TensorSpec]
    fisher: _containers.MessageMap[int, _tensor_pb2.TensorSpec]
    def __init__(self, left: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., right: _Optional[_Mapping[int, _tensor_pb2.TensorSpec]] = ..., fisher: _Optional[_Mapping[int, _tensor_pb2.TensorSpec]] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("head", "chunk", "body")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    head: ForwardBackwardHead
    chunk: bytes
    body: bytes
    def __init__(self, head: _Optional[_Union[ForwardBackwardHead, _Mapping]] = ..., chunk: _Optional[bytes] = ..., body: _Optional[bytes] = ...) -> None: ...

class ForwardBackwardHead(_message.Message):
    __slots__ = ("header", "embeddings", "labels", "weights", "want_fisher", "gradient_dtype")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WANT_FISHER_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    embeddings: Embeddings
    labels: _tensor_pb2.Tensor
    weights: _tensor_pb2.Tensor
    want_fisher: bool
    gradient_dtype: _tensor_pb2.DType
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., embeddings: _Optional[_Union[Embeddings, _Mapping]] = ..., labels: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., want_fisher: bool = ..., gradient_dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ...) -> None: ...

class ForwardBackwardReply(_message.Message):
    __slots__ = ("result", "chunk", "body")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    result: ForwardBackwardResult
    chunk: bytes
    body: bytes
    def __init__(self, result: _Optional[_Union[ForwardBackwardResult, _Mapping]] = ..., chunk: _Optional[bytes] = ..., body: _Optional[bytes] = ...) -> None: ...

class ForwardBackwardResult(_message.Message):
    __slots__ = ("loss_sums", "token_counts", "gradient", "spent")
    LOSS_SUMS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    loss_sums: _tensor_pb2.Tensor
    token_counts: _tensor_pb2.Tensor
    gradient: Gradient
    spent: Spent
    def __init__(self, loss_sums: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., token_counts: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., gradient: _Optional[_Union[Gradient, _Mapping]] = ..., spent: _Optional[_Union[Spent, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: ScoreHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[ScoreHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ScoreHead(_message.Message):
    __slots__ = ("header", "embeddings", "labels")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    embeddings: Embeddings
    labels: _tensor_pb2.Tensor
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., embeddings: _Optional[_Union[Embeddings, _Mapping]] = ..., labels: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("loss_sums", "token_counts", "correct_counts", "spent")
    LOSS_SUMS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    CORRECT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    loss_sums: _tensor_pb2.Tensor
    token_counts: _tensor_pb2.Tensor
    correct_counts: _tensor_pb2.Tensor
    spent: Spent
    def __init__(self, loss_sums: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., token_counts: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., correct_counts: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., spent: _Optional[_Union[Spent, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: GenerateHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[GenerateHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class GenerateHead(_message.Message):
    __slots__ = ("header", "embeddings", "sampling", "text_adapter")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TEXT_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    embeddings: Embeddings
    sampling: Sampling
    text_adapter: LowRank
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., embeddings: _Optional[_Union[Embeddings, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., text_adapter: _Optional[_Union[LowRank, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_new_tokens", "temperature", "top_p", "seed", "stop_ids")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class LowRank(_message.Message):
    __slots__ = ("down", "up", "scale")
    DOWN_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    down: _tensor_pb2.TensorSpec
    up: _tensor_pb2.TensorSpec
    scale: float
    def __init__(self, down: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., up: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., scale: _Optional[float] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("tokens", "spent")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[NewToken]
    spent: Spent
    def __init__(self, tokens: _Optional[_Iterable[_Union[NewToken, _Mapping]]] = ..., spent: _Optional[_Union[Spent, _Mapping]] = ...) -> None: ...

class NewToken(_message.Message):
    __slots__ = ("sample", "id", "end")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    sample: int
    id: int
    end: bool
    def __init__(self, sample: _Optional[int] = ..., id: _Optional[int] = ..., end: bool = ...) -> None: ...

class Spent(_message.Message):
    __slots__ = ("queue_seconds", "compute_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    compute_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ...) -> None: ...

class UploadBaseRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: UploadBaseHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[UploadBaseHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class UploadBaseHead(_message.Message):
    __slots__ = ("header", "digest", "values", "offset")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    digest: bytes
    values: _tensor_pb2.TensorSpec
    offset: int
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., digest: _Optional[bytes] = ..., values: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadBaseReply(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...

class DeleteBaseRequest(_message.Message):
    __slots__ = ("header", "digests")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    header: _tensor_pb2.Header
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, header: _Optional[_Union[_tensor_pb2.Header, _Mapping]] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class DeleteBaseReply(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: int
    def __init__(self, deleted: _Optional[int] = ...) -> None: ...
