"""What the recipes over text add to the trainer. In: text. Out: batches, the loss, metrics of an artifact.

Their tables are small: every rank holds the whole model, and N ranks take the very steps of one, since they share out
the examples of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBag, Quantizer
from dpq_rec.vocabulary import Vocabulary
from training.config import RunConfig
from training.data.batches import Bag
from training.data.documents import Labelled, read_documents
from training.data.text import read_text
from training.evaluation.served import ServedEmbedding, ServedEmbeddingBag
from training.parallel import add_up, replicate
from training.per_table import check_tables
from training.text_models import LanguageModel, State, TextClassifier
from training.text_options import (
    ClassifierOptimisation,
    ClassifierOptions,
    DocumentOptions,
    LanguageModelOptimisation,
    LanguageModelOptions,
)

WORD = "word"
_CHUNK_WORDS, _EVAL_DOCUMENTS = 2048, 1024  # read at a time in evaluation


class Words(NamedTuple):
    """Rows of words that follow each other in B texts, and of those after them (int64)."""

    words_TB: torch.Tensor
    next_TB: torch.Tensor


class LanguageModelTask:
    """Recipe language-model.

    The training text is cut into batch_size stretches, which are read side by side, num_steps words at a time; a rank
    reads every world_size-th of them. What a step leaves in the LSTM is where the next one begins. Words at the end
    that fill no step are left out, as Zaremba et al. do.
    """

    chosen_by, lower_is_better, num_negatives = "perplexity", True, 0

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        assert isinstance(config.model, LanguageModelOptions), "the configuration is checked"
        assert isinstance(config.optimisation, LanguageModelOptimisation), "the configuration is checked"
        self.embedding, self.options, self.optimisation = config.embedding, config.model, config.optimisation
        self.device, self.batch_size = device, config.optimisation.batch_size
        check_shared_out(self.batch_size)
        self.text = read_text(Path(config.data.path))
        self.digest = self.text.digest
        self.vocabularies: Mapping[str, Vocabulary] = {WORD: self.text.vocabulary}
        num_words, num_steps = len(self.text.rows["train"]), self.options.num_steps
        self.num_steps = (num_words // self.batch_size - 1) // num_steps
        if self.num_steps < 1:
            want = f"{self.batch_size * (num_steps + 1)} or more for {self.batch_size} stretches of {num_steps} steps"
            raise ConfigError(f"data: got {num_words} words in the train text, want {want}: lower --batch-size")
        self.num_examples = self.num_steps * num_steps * self.batch_size
        self._state: State | None = None

    def model(self) -> LanguageModel:
        """See `Task.model`."""
        num_words, dim = len(self.text.words_V), self.embedding.embedding_dim
        check_tables(self.embedding.per_table, [WORD])
        dpq = self.embedding.dpq_by_table({WORD: num_words})[WORD]
        word = nn.Embedding(num_words, dim) if dpq is None else DPQEmbedding(num_words, dim, dpq, name=WORD)
        if isinstance(word, DPQEmbedding):
            word.codebook_loss_scale = self.options.num_steps  # the loss is a sum over so many steps
        return self._around(word)

    def _around(self, word: nn.Module) -> LanguageModel:
        return LanguageModel(self.options, word, self.embedding.embedding_dim, len(self.text.words_V))

    def distribute(self, model: nn.Module) -> tuple[nn.Module, KeyedOptimizer]:
        """See `Task.distribute`."""
        rate, clip_norm = self.optimisation.learning_rate, self.optimisation.clip_norm
        for quantizer in (module for module in model.modules() if isinstance(module, Quantizer)):
            for weight in filter(lambda weight: weight.requires_grad, quantizer.parameters()):
                # A gradient times x is to SGD what a learning rate times x is.
                weight.register_hook(partial(torch.mul, self.optimisation.value_rate))
        return replicate(model, self.device, lambda weights: torch.optim.SGD(weights, rate), clip_norm=clip_norm)

    def learning_rate(self, epoch: int) -> float | None:
        """See `Task.learning_rate`."""
        return self.optimisation.rate_of(epoch)

    def train_batches(self, epoch: int) -> Iterator[Words]:
        """See `Task.train_batches`: in reading order, the same in every epoch."""
        self._state = None
        rows_T = torch.from_numpy(self.text.rows["train"])
        stretches_BT = rows_T[: len(rows_T) // self.batch_size * self.batch_size].view(self.batch_size, -1)
        mine_TB = stretches_BT[dist.get_rank() :: dist.get_world_size()].t().contiguous().to(self.device)
        for step in range(self.num_steps):
            start = step * self.options.num_steps
            stop = start + self.options.num_steps
            yield Words(mine_TB[start:stop], mine_TB[start + 1 : stop + 1])

    def loss(self, model: nn.Module, batch: Words, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`: summed over the steps."""
        loss, self._state = model(batch.words_TB, batch.next_TB, self._state)
        return loss

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: perplexity."""
        store = EmbeddingStore.open(folder / "artifact")
        served = self._around(ServedEmbedding(store.table(WORD)))
        served.load_state_dict(load_file(folder / "model.safetensors"))
        rows_T = torch.from_numpy(self.text.rows[split]).to(self.device)
        return {"perplexity": perplexity(served.to(self.device).eval(), rows_T)}


@torch.no_grad()
def perplexity(model: LanguageModel, rows_T: torch.Tensor) -> float:
    """The exponential of the mean of -log p(word), over all words but the first, each after all words before it.

    Every rank reads the text, and scores a part of it.

    Args:
        model: in eval mode.
        rows_T: of the words (int64), two or more.
    """
    state, total, num_words = None, 0.0, len(rows_T) - 1
    for number, start in enumerate(range(0, num_words, _CHUNK_WORDS)):
        stop = min(start + _CHUNK_WORDS, num_words)
        hidden_T1H, state = model.hidden(rows_T[start:stop, None], state)
        if number % dist.get_world_size() == dist.get_rank():
            total += model.sum_of_losses(hidden_T1H[:, 0], rows_T[start + 1 : stop + 1])
    (total,) = add_up([total])
    return math.exp(min(total / num_words, 700.0))  # beyond, what diverged would be no number


class TextClassificationTask:
    """Recipe text-classification.

    Documents are shuffled and thinned anew in every epoch; a rank takes every world_size-th one of a step's. Those at
    the end that fill no step are left out.
    """

    chosen_by, lower_is_better, num_negatives = "accuracy", False, 0

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        assert isinstance(config.data, DocumentOptions), "the configuration is checked"
        assert isinstance(config.model, ClassifierOptions), "the configuration is checked"
        assert isinstance(config.optimisation, ClassifierOptimisation), "the configuration is checked"
        self.embedding, self.options, self.optimisation = config.embedding, config.model, config.optimisation
        self.device, self.seed, self.batch_size = device, config.run.seed, config.optimisation.batch_size
        check_shared_out(self.batch_size)
        self.documents = read_documents(config.data)
        self.digest = self.documents.digest
        self.vocabularies: Mapping[str, Vocabulary] = {WORD: self.documents.vocabulary}
        num_documents = len(self.documents.splits["train"].classes_B)
        self.num_steps = num_documents // self.batch_size
        if not self.num_steps:
            raise ConfigError(f"--batch-size: got {self.batch_size}, and {num_documents} training documents; lower it")
        self.num_examples = self.num_steps * self.batch_size

    def model(self) -> TextClassifier:
        """See `Task.model`."""
        num_words, dim = len(self.documents.words_V), self.embedding.embedding_dim
        check_tables(self.embedding.per_table, [WORD])
        dpq = self.embedding.dpq_by_table({WORD: num_words})[WORD]
        if dpq is not None:
            return self._around(DPQEmbeddingBag(num_words, dim, dpq, name=WORD))
        word = nn.EmbeddingBag(num_words, dim, mode="mean")
        nn.init.uniform_(word.weight, -(dim**-0.5), dim**-0.5)  # as queries start
        return self._around(word)

    def _around(self, word: nn.Module) -> TextClassifier:
        return TextClassifier(self.options, word, self.embedding.embedding_dim, len(self.documents.labels_C))

    def distribute(self, model: nn.Module) -> tuple[nn.Module, KeyedOptimizer]:
        """See `Task.distribute`."""
        rate = self.optimisation.learning_rate
        return replicate(model, self.device, lambda weights: torch.optim.Adam(weights, rate, fused=True))

    def learning_rate(self, epoch: int) -> float | None:
        """See `Task.learning_rate`."""
        return None

    def train_batches(self, epoch: int) -> Iterator[Labelled]:
        """See `Task.train_batches`."""
        train = self.documents.splits["train"]
        rng = np.random.default_rng([self.seed, epoch])
        order_N = rng.permutation(len(train.classes_B))
        mine_N = np.arange(dist.get_rank(), self.batch_size, dist.get_world_size())
        for step in range(self.num_steps):
            documents = train.take(order_N[step * self.batch_size : (step + 1) * self.batch_size])
            kept_T = rng.random(len(documents.bag.rows_T)) >= self.options.word_dropout
            yield documents.thinned(kept_T).take(mine_N)

    def loss(self, model: nn.Module, batch: Labelled, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`: cross-entropy."""
        classes_B = torch.from_numpy(batch.classes_B).to(self.device)
        return functional.cross_entropy(self._logits(model, batch.bag), classes_B)

    def _logits(self, model: nn.Module, bag: Bag) -> torch.Tensor:
        offsets_B = np.cumsum(bag.lengths_B) - bag.lengths_B
        return model(torch.from_numpy(bag.rows_T).to(self.device), torch.from_numpy(offsets_B).to(self.device))

    @torch.no_grad()
    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: accuracy."""
        store = EmbeddingStore.open(folder / "artifact")
        served = self._around(ServedEmbeddingBag(store.table(WORD))).to(self.device).eval()
        served.load_state_dict(load_file(folder / "model.safetensors"))
        documents, num_right = self.documents.splits[split], 0
        mine_N = np.arange(dist.get_rank(), len(documents.classes_B), dist.get_world_size())
        for start in range(0, len(mine_N), _EVAL_DOCUMENTS):
            bag, classes_B = documents.take(mine_N[start : start + _EVAL_DOCUMENTS])
            found_B = self._logits(served, bag).argmax(1).cpu().numpy()
            num_right += int((found_B == classes_B).sum())
        (num_right_of_all,) = add_up([num_right])
        return {"accuracy": num_right_of_all / len(documents.classes_B)}


def check_shared_out(batch_size: int) -> None:
    """Raises ConfigError where the ranks cannot share out the examples of a step evenly."""
    if batch_size % dist.get_world_size():
        raise ConfigError(f"--batch-size: got {batch_size} on {dist.get_world_size()} ranks, want a multiple of them")
