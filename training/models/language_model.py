"""Language model: the LSTM of Zaremba et al. (2014) over a table of words, which every rank holds whole.

In: a LanguageModelConfig. Out: a `Task`: batches, the loss, perplexity. N ranks take the very steps of one, since they
share out the examples of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.nn import DPQEmbedding, Quantizer
from training.data.text import read_text
from training.distributed import add_up, check_shared_out, replicate
from training.evaluation.served import ServedTable
from training.recipes.language_model import LanguageModelConfig, LanguageModelOptions
from training.task import Task

State: TypeAlias = tuple[torch.Tensor, torch.Tensor]
WORD = "word"
_BLOCK_WORDS = 256  # whose scores of all words are held together, in evaluation
_CHUNK_WORDS = 2048  # read at a time in evaluation


class LanguageModel(nn.Module):
    """An LSTM that tells each word from the words before it (Zaremba et al., 2014, section 3).

    Weights start uniform between plus and minus `init_scale`, biases at zero. A DPQ table has scales of its own: where
    queries start small and values large, codes change soon, and what the LSTM reads is more than noise.
    Shapes: T words that follow each other, of each of B texts that are read side by side; H hidden.

    Args:
        options: of the recipe.
        word: rows (int64, any shape) to vectors [..., E].
        embedding_dim: E.
        num_words: V.
    """

    TABLES = "word."  # what the names of the tables' weights begin with

    def __init__(self, options: LanguageModelOptions, word: nn.Module, embedding_dim: int, num_words: int) -> None:
        super().__init__()
        hidden, layers = options.hidden_dim, options.num_layers
        self.word = word
        self.lstm = nn.LSTM(embedding_dim, hidden, layers, dropout=options.dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(options.dropout)
        self.output = nn.Linear(hidden, num_words)
        for name, parameter in self.named_parameters():
            nn.init.uniform_(parameter, -options.init_scale, options.init_scale)
            if "bias" in name.rpartition(".")[2]:
                nn.init.zeros_(parameter)
        if isinstance(word, DPQEmbedding):
            for parameter in word.queries.parameters():
                nn.init.uniform_(parameter, -options.query_scale, options.query_scale)
            for parameter in word.quantizers.parameters():
                nn.init.uniform_(parameter, -options.value_scale, options.value_scale)

    def forward(self, words_TB: torch.Tensor, next_TB: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """The loss: of each step the mean over the texts of -log p(next word), summed over the steps.

        Args:
            words_TB: rows of the words.
            next_TB: rows of the words after them.
            state: what the words before left; None where there were none.

        Returns:
            The loss, and what these words leave, without a way back for gradients.
        """
        hidden_TBH, state = self.hidden(words_TB, state)
        loss = len(words_TB) * cross_entropy(hidden_TBH.flatten(0, 1), self.output, next_TB.flatten())
        return loss, state

    def hidden(self, words_TB: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """What the output layer sees [T, B, H], and the state after the words."""
        outputs_TBH, (hidden_LBH, cell_LBH) = self.lstm(self.dropout(self.word(words_TB)), state)
        return self.dropout(outputs_TBH), (hidden_LBH.detach(), cell_LBH.detach())

    def sum_of_losses(self, hidden_NH: torch.Tensor, next_N: torch.Tensor) -> float:
        """Sum of -log p(next word), a block of words at a time."""
        blocks = zip(hidden_NH.split(_BLOCK_WORDS), next_N.split(_BLOCK_WORDS), strict=True)
        losses = [functional.cross_entropy(self.output(h_BH), n_B, reduction="sum") for h_BH, n_B in blocks]
        return float(torch.stack(losses).double().sum())


def cross_entropy(hidden_NH: torch.Tensor, output: nn.Linear, next_N: torch.Tensor) -> torch.Tensor:
    """Mean over N of -log softmax(output(hidden))[next]: as torch's, in three quarters of the time on CPU."""
    return _CrossEntropy.apply(hidden_NH, output.weight, output.bias, next_N)


class _CrossEntropy(torch.autograd.Function):
    """The scores [N, V] become their own gradient in place: written once, they are never copied."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor, next_N: torch.Tensor
    ) -> torch.Tensor:
        scores_NV = torch.addmm(bias_V, hidden_NH, weight_VH.t())
        scores_NV -= scores_NV.amax(1, keepdim=True)
        next_N1 = next_N[:, None]
        at_next_N1 = scores_NV.gather(1, next_N1)
        sums_N1 = scores_NV.exp_().sum(1, keepdim=True)
        scores_NV /= sums_N1
        scores_NV.scatter_add_(1, next_N1, scores_NV.new_full(next_N1.shape, -1))
        ctx.save_for_backward(hidden_NH, weight_VH, scores_NV)
        return (sums_N1.log() - at_next_N1).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, scores_NV = ctx.saved_tensors
        share = gradient / len(hidden_NH)
        return (scores_NV @ weight_VH) * share, scores_NV.t() @ (hidden_NH * share), scores_NV.sum(0) * share, None


class LanguageModelTask(Task):
    """Recipe language-model.

    The training text is cut into batch_size parts, which are read side by side, num_steps words at a time; a rank
    reads every world_size-th of them. What a step leaves in the LSTM is where the next one begins. Words at the end
    that fill no step are left out, as Zaremba et al. do.
    """

    chosen_by, lower_is_better = "perplexity", True

    def __init__(self, config: LanguageModelConfig, device: torch.device) -> None:
        self.embedding, self.options, self.optimisation = config.embedding, config.model, config.optimisation
        self.device, self.batch_size = device, config.optimisation.batch_size
        check_shared_out(self.batch_size)
        self.text = read_text(Path(config.data.path))
        self.vocabularies, self.digest = {WORD: self.text.vocabulary}, self.text.digest
        num_words, num_steps = len(self.text.splits["train"]), self.options.num_steps
        self.num_steps = (num_words // self.batch_size - 1) // num_steps
        if self.num_steps < 1:
            want = f"{self.batch_size * (num_steps + 1)} or more for {self.batch_size} parts of {num_steps} steps"
            raise ConfigError(f"data: got {num_words} words in the train text, want {want}: lower --batch-size")
        self.num_examples = self.num_steps * num_steps * self.batch_size
        self._state: State | None = None

    def model(self) -> LanguageModel:
        """See `Task.model`."""
        num_words, dim = len(self.text.words_V), self.embedding.embedding_dim
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

    def train_batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Task.train_batches`: words_TB in reading order, the same in every epoch, and the words after them."""
        self._state = None
        rows_T = torch.from_numpy(self.text.splits["train"])
        parts_BT = rows_T[: len(rows_T) // self.batch_size * self.batch_size].view(self.batch_size, -1)
        mine_TB = parts_BT[dist.get_rank() :: dist.get_world_size()].t().contiguous().to(self.device)
        for step in range(self.num_steps):
            start = step * self.options.num_steps
            stop = start + self.options.num_steps
            yield mine_TB[start:stop], mine_TB[start + 1 : stop + 1]

    def loss(
        self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        """See `Task.loss`: summed over the steps."""
        loss, self._state = model(*batch, self._state)
        return loss

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: perplexity."""
        store = EmbeddingStore.open(folder / "artifact")
        served = self._around(ServedTable(store.table(WORD)))
        served.load_state_dict(load_file(folder / "model.safetensors"))
        rows_T = torch.from_numpy(self.text.splits[split]).to(self.device)
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
