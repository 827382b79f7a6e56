"""Small models of transformers, randomly initialised from configs: nothing is downloaded. And a batch for them."""

from typing import Any, NamedTuple

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS, DIM = 211, 32


class LanguageModel(NamedTuple):
    """How a model is made, and the table that its embeddings and its output layer share."""

    kind: Any
    config: Any
    table: str

    def make(self, seed: int = 0) -> Any:
        """The model, without dropout."""
        torch.manual_seed(seed)
        return self.kind(self.config())


def bert():
    """The model of the DPQ paper's appendix H in small."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": DIM, "intermediate_size": 2 * DIM, "max_position_embeddings": 24}
    return BertConfig(vocab_size=WORDS, num_hidden_layers=2, num_attention_heads=2, **sizes, **off)


def gpt2():
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    words = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2Config(vocab_size=WORDS, n_positions=24, n_embd=DIM, n_layer=2, n_head=2, **off, **words)


def t5():
    sizes = {"d_model": DIM, "d_kv": 8, "d_ff": 2 * DIM, "num_layers": 2, "num_heads": 4}
    return T5Config(vocab_size=WORDS, dropout_rate=0.0, decoder_start_token_id=0, **sizes)


MODELS = {
    "bert": LanguageModel(BertForMaskedLM, bert, "bert.embeddings.word_embeddings"),
    "gpt2": LanguageModel(GPT2LMHeadModel, gpt2, "transformer.wte"),
    "t5": LanguageModel(T5ForConditionalGeneration, t5, "shared"),
}


def words(number, num_words=WORDS):
    """Ids [4, 8] of the batch of a number; none is a padding or an end."""
    return torch.randint(2, num_words, (4, 8), generator=torch.Generator().manual_seed(number))


def loss_of(model, ids):
    """The model's own loss: of each word from those before it or, for bert, from all."""
    return model(input_ids=ids, labels=ids).loss


def logits_of(model, ids):
    """Scores of all words at each place."""
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).logits
