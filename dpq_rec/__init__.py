"""Embedding tables tens of times smaller, by differentiable product quantization (DPQ; Chen, Li and Sun, 2020).

Read the modules in this order and you have read DPQ:

1. `config`         what can be chosen: K codes in each of D subspaces, and how the choice of a code is trained
2. `nn.quantizer`   queries -> codes -> vectors, and how gradients pass (the paper's equations)
3. `nn.tables`      rows -> vectors; on it `nn.embedding` and `nn.collection` stand in for torch's and TorchRec's
4. `nn.freeze`      every row's query is encoded once; codes and values are all that remain
5. `codes`          codes <-> bytes, and tiers: rows that have fewer codes than others
6. `vocabulary`     ids -> rows (`ids` takes them from lists and arrays of any library; `strings` holds many in two
                    arrays)
7. `artifact`       the folder that is published (`manifest` says what may be in it, `tensorfile` is one of its files,
                    `files` lets it appear whole, `publish` copies it into a store)
8. `kernels`        the loops that must be fast (`kernels.ids` indexes ids, `kernels.lookup` goes from ids to vectors)
9. `table`          ids -> rows -> codes -> vectors, from the mapped artifact (`search`: back to the nearest ids)
10. `lookup`        `EmbeddingStore`: the tables of an artifact by their name
11. `wire`          lookups as bytes that travel, for a `client` that holds the values (`http_reply` reads what a server
                    says)
12. `code_use`      how rows use their codes; `report` shows it, and more, as a page
13. `export`, `cli`, `errors`

Importing this package needs numpy alone. `dpq_rec.nn` imports torch; nothing else does, but for `bench`, which
compares with it where it is installed.
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
