"""Models over the words of a text. In: rows of words. Out: the loss, or what it is made of.

`LanguageModel` is the LSTM of Zaremba et al. (2014), `TextClassifier` one hidden layer over the mean of word vectors.
What they are given as their table maps rows to vectors, or bags of rows to means: a module of torch or of DPQ, or what
an artifact serves.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dpq_rec.nn import DPQEmbedding
from training.text_options import ClassifierOptions, LanguageModelOptions

State: TypeAlias = tuple[torch.Tensor, torch.Tensor]
_BLOCK_WORDS = 256  # whose scores of all words are held together, in evaluation


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
