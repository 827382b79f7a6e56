"""Embedding tables tens of times smaller, by differentiable product quantization (DPQ; Chen, Li and Sun, 2020).

A row of a table becomes D codes, each of which picks one of K values that all rows share; its vector is these values
side by side. With residual levels, each adds a vector like that. Where to find what:

Lookups:

    lookup        begin here: `EmbeddingStore` opens an artifact and looks ids up in its tables, by name
    table         `Table`, one table: ids -> rows -> codes -> vectors
    vocabulary    ids -> rows; `ids` reads lists and arrays of any library, `strings` packs many strings into two arrays
    codes         `CodeLayout`: codes <-> bytes; and tiers, which are rows with fewer codes than those before them
    kernels       the C++ loops: codes -> vectors; `kernels.ids` indexes ids, `kernels.lookup` goes from ids to vectors
    search        a query -> the nearest ids
    artifact      the published folder: written, opened, verified (`manifest`: its JSON; `tensorfile`: its tensors;
                  `files`: atomic writes); `publish` copies it into a store
    wire          the binary format of lookups; `client` asks a server for it, `http_reply` parses the replies

Training (`dpq_rec.nn`):

    config        `DPQConfig`: K, D, levels, and how codes are trained
    nn.embedding  in place of torch's modules; `nn.collection`: of TorchRec's; `nn.replace` puts them into a model
    nn.tables     what these have in common: rows -> queries, which are the weights that train -> vectors
    nn.quantizer  queries -> codes -> vectors and codebook loss: a loop over `nn.level`, whose gradients `nn.estimators`
                  define; `nn.codebook`: k-means, running means (EMA) and dead-code revival
    nn.model      finds a model's tables; lets them warm up, then starts their keys and values by k-means
    nn.freeze     encodes every row's query once; codes and values go into an artifact

Tools: `cli`, `report` (an artifact as a web page), `code_use`, `export` (Parquet), `sizing` (K and D for a ratio); and
`errors`. Beside this package stand `training`, whose loop is `training.trainer`, and `service`, where
`service.http_lookup` and `service.grpc_api` answer lookups by `service.engine`.

Importing this package needs numpy alone. `dpq_rec.nn` imports torch; nothing else does.
"""

from dpq_rec.artifact import Artifact, TableContents, open_artifact, verify, write_artifact
from dpq_rec.codes import CodeLayout, pack_codes, unpack_codes
from dpq_rec.config import DPQConfig
from dpq_rec.errors import (
    ArtifactError,
    ConfigError,
    DamagedArtifactError,
    DpqRecError,
    IdTypeError,
    MissingDependencyError,
    UnknownIdsError,
    UnknownTableError,
)
from dpq_rec.lookup import EmbeddingStore
from dpq_rec.publish import publish
from dpq_rec.search import Neighbours
from dpq_rec.table import Lookup
from dpq_rec.vocabulary import IdentityVocabulary, Int64Vocabulary, ModuloVocabulary, StringVocabulary, Vocabulary

__all__ = [
    "Artifact",
    "ArtifactError",
    "CodeLayout",
    "ConfigError",
    "DPQConfig",
    "DamagedArtifactError",
    "DpqRecError",
    "EmbeddingStore",
    "IdTypeError",
    "IdentityVocabulary",
    "Int64Vocabulary",
    "Lookup",
    "MissingDependencyError",
    "ModuloVocabulary",
    "Neighbours",
    "StringVocabulary",
    "TableContents",
    "UnknownIdsError",
    "UnknownTableError",
    "Vocabulary",
    "open_artifact",
    "pack_codes",
    "publish",
    "unpack_codes",
    "verify",
    "write_artifact",
]
