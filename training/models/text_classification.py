"""Text classification: one hidden layer over the mean of word vectors; every rank holds the whole model.

In: a ClassifierConfig. Out: a `Task`: batches, the loss, accuracy. N ranks take the very steps of one, since they share
out the examples of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.nn import DPQEmbeddingBag
from training.data.ragged import Bag
from training.data.text import Documents, read_documents
from training.distributed import add_up, check_shared_out, replicate
from training.evaluation.served import ServedTable
from training.recipes.text_classification import ClassifierConfig, ClassifierOptions
from training.task import Task

WORD = "word"
_EVAL_DOCUMENTS = 1024  # read at a time in evaluation


class TextClassifier(nn.Module):
    """One hidden layer over the mean of the vectors of a document's words (DPQ paper, table 2).

    Args:
        options: of the recipe.
        word: bags of rows, as nn.EmbeddingBag takes them, to their means [B, E].
        embedding_dim: E.
        num_classes: C.
    """

    TABLES = "word."  # what the names of the tables' weights begin with

    def __init__(self, options: ClassifierOptions, word: nn.Module, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.word, self.dropout = word, nn.Dropout(options.dropout)
        self.hidden, self.output = (
            nn.Linear(embedding_dim, options.hidden_dim),
            nn.Linear(options.hidden_dim, num_classes),
        )

    def forward(self, rows_T: torch.Tensor, offsets_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of the classes.

        Args:
            rows_T: of the words of all documents (int64).
            offsets_B: where each document begins; one without words has a mean of zeros.
        """
        means_BE = self.dropout(self.word(rows_T, offsets_B))
        return self.output(self.dropout(self.hidden(means_BE).relu()))


class TextClassificationTask(Task):
    """Recipe text-classification.

    Documents are shuffled and thinned anew in every epoch; a rank takes every world_size-th one of a step's. Those at
    the end that fill no step are left out.
    """

    chosen_by = "accuracy"

    def __init__(self, config: ClassifierConfig, device: torch.device) -> None:
        self.embedding, self.options, self.optimisation = config.embedding, config.model, config.optimisation
        self.device, self.seed, self.batch_size = device, config.run.seed, config.optimisation.batch_size
        check_shared_out(self.batch_size)
        self.documents = read_documents(config.data)
        self.vocabularies, self.digest = {WORD: self.documents.vocabulary}, self.documents.digest
        num_documents = len(self.documents.splits["train"][1])
        self.num_steps = num_documents // self.batch_size
        if not self.num_steps:
            raise ConfigError(f"--batch-size: got {self.batch_size}, and {num_documents} training documents; lower it")
        self.num_examples = self.num_steps * self.batch_size

    def model(self) -> TextClassifier:
        """See `Task.model`."""
        num_words, dim = len(self.documents.words_V), self.embedding.embedding_dim
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

    def train_batches(self, epoch: int) -> Iterator[Documents]:
        """See `Task.train_batches`."""
        bag, classes_N = self.documents.splits["train"]
        rng = np.random.default_rng([self.seed, epoch])
        order_N = rng.permutation(len(classes_N))
        mine_N = np.arange(dist.get_rank(), self.batch_size, dist.get_world_size())
        for step in range(self.num_steps):
            of_step = order_N[step * self.batch_size : (step + 1) * self.batch_size]
            words = bag.take(of_step)
            kept_T = rng.random(len(words.rows_T)) >= self.options.word_dropout
            yield words.keep(kept_T).take(mine_N), classes_N[of_step[mine_N]]

    def loss(self, model: nn.Module, batch: Documents, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`: cross-entropy."""
        bag, classes_B = batch
        return functional.cross_entropy(self._logits(model, bag), torch.from_numpy(classes_B).to(self.device))

    def _logits(self, model: nn.Module, bag: Bag) -> torch.Tensor:
        return model(torch.from_numpy(bag.rows_T).to(self.device), torch.from_numpy(bag.offsets[:-1]).to(self.device))

    @torch.no_grad()
    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: accuracy."""
        store = EmbeddingStore.open(folder / "artifact")
        served = self._around(ServedTable(store.table(WORD))).to(self.device).eval()
        served.load_state_dict(load_file(folder / "model.safetensors"))
        (bag, classes_N), num_right = self.documents.splits[split], 0
        mine_N = np.arange(dist.get_rank(), len(classes_N), dist.get_world_size())
        for start in range(0, len(mine_N), _EVAL_DOCUMENTS):
            at_B = mine_N[start : start + _EVAL_DOCUMENTS]
            found_B = self._logits(served, bag.take(at_B)).argmax(1).cpu().numpy()
            num_right += int((found_B == classes_N[at_B]).sum())
        (num_right_of_all,) = add_up([num_right])
        return {"accuracy": num_right_of_all / len(classes_N)}
