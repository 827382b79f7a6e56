from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT32: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]

class MissingPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ZEROS: _ClassVar[MissingPolicy]
    ERROR: _ClassVar[MissingPolicy]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Pooling]
    SUM: _ClassVar[Pooling]
    MEAN: _ClassVar[Pooling]

class Similarity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DOT: _ClassVar[Similarity]
    COSINE: _ClassVar[Similarity]
FLOAT32: DType
FLOAT16: DType
ZEROS: MissingPolicy
ERROR: MissingPolicy
NONE: Pooling
SUM: Pooling
MEAN: Pooling
DOT: Similarity
COSINE: Similarity

class LookupRequest(_message.Message):
    __slots__ = ("table", "ids", "string_ids", "dtype", "missing", "bag_lengths", "pooling")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    STRING_IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    BAG_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    table: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    string_ids: _containers.RepeatedScalarFieldContainer[str]
    dtype: DType
    missing: MissingPolicy
    bag_lengths: _containers.RepeatedScalarFieldContainer[int]
    pooling: Pooling
    def __init__(self, table: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., string_ids: _Optional[_Iterable[str]] = ..., dtype: _Optional[_Union[DType, str]] = ..., missing: _Optional[_Union[MissingPolicy, str]] = ..., bag_lengths: _Optional[_Iterable[int]] = ..., pooling: _Optional[_Union[Pooling, str]] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("vectors", "dim", "dtype", "missing", "version")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    vectors: bytes
    dim: int
    dtype: DType
    missing: _containers.RepeatedScalarFieldContainer[int]
    version: str
    def __init__(self, vectors: _Optional[bytes] = ..., dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., missing: _Optional[_Iterable[int]] = ..., version: _Optional[str] = ...) -> None: ...

class BatchLookupRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[LookupRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[LookupRequest, _Mapping]]] = ...) -> None: ...

class BatchLookupReply(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[LookupReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[LookupReply, _Mapping]]] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("table", "queries", "ids", "string_ids", "k", "similarity", "missing")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    STRING_IDS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    table: str
    queries: _containers.RepeatedScalarFieldContainer[float]
    ids: _containers.RepeatedScalarFieldContainer[int]
    string_ids: _containers.RepeatedScalarFieldContainer[str]
    k: int
    similarity: Similarity
    missing: MissingPolicy
    def __init__(self, table: _Optional[str] = ..., queries: _Optional[_Iterable[float]] = ..., ids: _Optional[_Iterable[int]] = ..., string_ids: _Optional[_Iterable[str]] = ..., k: _Optional[int] = ..., similarity: _Optional[_Union[Similarity, str]] = ..., missing: _Optional[_Union[MissingPolicy, str]] = ...) -> None: ...

class SearchReply(_message.Message):
    __slots__ = ("neighbours", "missing", "version")
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    neighbours: _containers.RepeatedCompositeFieldContainer[Neighbours]
    missing: _containers.RepeatedScalarFieldContainer[int]
    version: str
    def __init__(self, neighbours: _Optional[_Iterable[_Union[Neighbours, _Mapping]]] = ..., missing: _Optional[_Iterable[int]] = ..., version: _Optional[str] = ...) -> None: ...

class Neighbours(_message.Message):
    __slots__ = ("ids", "string_ids", "scores")
    IDS_FIELD_NUMBER: _ClassVar[int]
    STRING_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    string_ids: _containers.RepeatedScalarFieldContainer[str]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., string_ids: _Optional[_Iterable[str]] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class ListTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTablesReply(_message.Message):
    __slots__ = ("version", "tables")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    version: str
    tables: _containers.RepeatedCompositeFieldContainer[TableInfo]
    def __init__(self, version: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[TableInfo, _Mapping]]] = ...) -> None: ...

class TableInfo(_message.Message):
    __slots__ = ("name", "dim", "num_embeddings", "kind", "vocabulary", "features", "artifact_bytes", "vocabulary_bytes", "full_bytes", "compression_ratio")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    NUM_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_BYTES_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FULL_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_RATIO_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    num_embeddings: int
    kind: str
    vocabulary: str
    features: _containers.RepeatedScalarFieldContainer[str]
    artifact_bytes: int
    vocabulary_bytes: int
    full_bytes: int
    compression_ratio: float
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., num_embeddings: _Optional[int] = ..., kind: _Optional[str] = ..., vocabulary: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., artifact_bytes: _Optional[int] = ..., vocabulary_bytes: _Optional[int] = ..., full_bytes: _Optional[int] = ..., compression_ratio: _Optional[float] = ...) -> None: ...
