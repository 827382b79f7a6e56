"""What is trained on one rank and on two. In: nothing. Out: CASES, name -> Case; the options are spread over them."""

from dataclasses import dataclass
from typing import Literal

from dpq_rec import DPQConfig

SIZES = {"user": 101, "item": 50}
FEATURES = {"user": "user", "item": "item", "clicked": "item"}  # feature -> table
EMBEDDING_DIM = 16
NUM_EXAMPLES = 12  # of a step, on all ranks together
NUM_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its sharding and its batches.

    Attributes:
        config: of every quantized table.
        sharding: TorchRec's name.
        module: "bags", "ids" or "embedding", for the collection of bags, that of ids, and the module of one table.
        optimizer: of the tables, in model.OPTIMIZERS.
        num_shards: of a table cut by columns, whatever the number of ranks.
        start: keys and values from the queries before training.
        full_steps: steps before that, in which the tables warm up.
        weighted: bags are weighted sums.
        plain_items: the item table is not quantized.
        gaps: on odd steps the second half of the examples, all of the second of two ranks, has no user, on some no
            example has one.
        apart: the two halves of the examples share no id, so that draws from a batch do not depend on the ranks.
        atol: of losses and vectors; more than 1e-5 only where a difference in the last bit may move a value by more.
    """

    config: DPQConfig
    sharding: Literal["table_wise", "row_wise", "column_wise"]
    module: Literal["bags", "ids", "embedding"] = "bags"
    optimizer: str = "rowwise_adagrad"
    num_shards: int = 2
    start: bool = False
    full_steps: int = 0
    weighted: bool = False
    plain_items: bool = False
    gaps: bool = False
    apart: bool = False
    atol: float = 1e-5

    @property
    def sizes(self) -> dict[str, int]:
        """Table -> rows."""
        return {"user": SIZES["user"]} if self.module == "embedding" else SIZES

    @property
    def quantized(self) -> list[str]:
        """The tables that are."""
        return ["user"] if self.plain_items else list(self.sizes)


def default_config(method: str, **more) -> DPQConfig:
    """Of a case, but for what is said."""
    return DPQConfig(method=method, quantize_small=True, **{"num_subspaces": 4, "num_codes": 8, **more})


CASES = {
    "sx-table_wise": Case(config=default_config("sx"), sharding="table_wise", optimizer="sgd"),
    "sx-row_wise": Case(config=default_config("sx"), sharding="row_wise"),
    "sx-column_wise": Case(config=default_config("sx"), sharding="column_wise", optimizer="adagrad"),
    "vq-table_wise-commitment-value_gradient-plain_items": Case(
        config=default_config("vq", commitment_weight=0.25, value_gradient=True),
        sharding="table_wise",
        optimizer="sgd",
        plain_items=True,
    ),
    "vq-row_wise-gaps": Case(config=default_config("vq"), sharding="row_wise", gaps=True),
    "vq-column_wise-four_shards-ids": Case(
        config=default_config("vq"), sharding="column_wise", num_shards=4, optimizer="adagrad", module="ids"
    ),
    "sx-row_wise-key_dim-shared-fp16-weighted-started": Case(
        config=default_config("sx", key_dim=2, share_subspaces=True, values_dtype="float16", temperature=0.5),
        sharding="row_wise",
        start=True,
        weighted=True,
        atol=1e-4,  # a value may fall to the neighbouring fp16 number
    ),
    "sx-column_wise-cosine-tied-tiers-started": Case(
        config=default_config("sx", metric="cosine", tie_keys=True, num_levels=3, tiers=((0.3, 2), (0.6, 1))),
        sharding="column_wise",
        start=True,
        full_steps=3,
    ),
    "vq-row_wise-ema-tiers-revival-started": Case(  # the second of two ranks has no row of the first tier
        config=default_config("vq", ema_decay=0.9, num_levels=2, tiers=((0.4, 1),), num_codes=32, revive_after=2),
        sharding="row_wise",
        start=True,
        full_steps=3,
        apart=True,
    ),
    "sx-table_wise-shared-revival": Case(
        config=default_config("sx", share_subspaces=True, num_codes=60, revive_after=2),
        sharding="table_wise",
        apart=True,
    ),
    "vq-column_wise-embedding-no_batch_norm": Case(
        config=default_config("vq", batch_norm=False), sharding="column_wise", module="embedding"
    ),
}
