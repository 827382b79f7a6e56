"""Models of transformers with their tables replaced, outputs tied: BERT (DPQ paper, appendix H), GPT-2 and T5.

A stock model that holds the artifact's vectors, tied by transformers itself, says what they have to compute.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpq_rec import DPQConfig, EmbeddingStore
from dpq_rec.nn import DPQEmbedding, TiedLinear, freeze, replace_embeddings
from tests.dpq_rec.nn.language_models import MODELS, WORDS, logits_of, loss_of, words

CONFIGS = {
    "sx": DPQConfig(num_subspaces=8, num_codes=16),
    "vq": DPQConfig(method="vq", num_subspaces=8, num_codes=16, value_gradient=True),
    "tiers": DPQConfig(method="vq", num_subspaces=8, num_codes=8, num_levels=3, tiers=((0.2, 2), (0.5, 1))),
    "ema": DPQConfig(method="vq", num_subspaces=8, num_codes=16, ema_decay=0.9),
}


def replaced(name, config="sx", *, steps=4, **more):
    """The model, trained, in eval mode; its losses."""
    model = replace_embeddings(MODELS[name].make(), CONFIGS[config], tables=[MODELS[name].table], **more)
    return model, train(model, steps)


def train(model, steps, num_words=WORDS):
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(steps):
        loss = loss_of(model.train(), words(0, num_words))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    model.eval()
    return losses


def stored(model, name, folder, num_words=WORDS):
    """The vectors of all words, from the artifact."""
    freeze(model, folder)
    store = EmbeddingStore.open(folder)
    assert list(store.tables) == [MODELS[name].table]
    return store.lookup(MODELS[name].table, np.arange(num_words)).vectors


def stock_with(vectors_VE, name, model):
    """transformers' own model, its table the vectors, all other weights as the model has them."""
    stock = MODELS[name].make(seed=1)
    stock.resize_token_embeddings(len(vectors_VE))
    table = stock.get_input_embeddings().weight
    state = {key: tensor for key, tensor in model.state_dict().items() if key in stock.state_dict()}
    missing = stock.load_state_dict(state, strict=False).missing_keys
    assert all(torch.equal(stock.state_dict()[key], table) for key in missing)
    table.data = torch.from_numpy(vectors_VE)
    assert stock.get_output_embeddings().weight is table
    return stock.eval()


@pytest.mark.parametrize(("name", "config"), [*(("gpt2", config) for config in CONFIGS), ("bert", "sx"), ("t5", "ema")])
def test_replaced_model_trains_freezes_and_loads(name, config, tmp_path):
    model, losses = replaced(name, config, steps=12)
    assert losses[-1] < 0.95 * losses[0]
    vectors_VE = stored(model, name, tmp_path / "artifact")
    assert vectors_VE.tobytes() == model.get_input_embeddings().weight.detach().numpy().tobytes()
    logits = logits_of(model, words(1))
    assert torch.equal(logits_of(stock_with(vectors_VE, name, model), words(1)), logits)
    fresh = replace_embeddings(MODELS[name].make(seed=2), CONFIGS[config], tables=[MODELS[name].table])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(fresh.eval(), words(1)), logits)


@pytest.mark.parametrize("name", MODELS)
def test_what_shared_a_weight_shares_a_table(name):
    model, _ = replaced(name, steps=0)
    table = model.get_input_embeddings()
    assert type(table) is DPQEmbedding
    assert type(model.get_output_embeddings()) is TiedLinear
    assert sum(isinstance(module, DPQEmbedding) for module in model.modules()) == 1
    if name == "t5":
        assert model.encoder.embed_tokens is model.decoder.embed_tokens is table
    model.tie_weights()
    assert torch.equal(model.get_output_embeddings().weight, table(torch.arange(WORDS)))


@pytest.mark.parametrize("name", MODELS)
def test_trained_weights_are_kept_near(name):
    """From which from_weights starts; bert's padding row is zeros then as before."""
    stock = MODELS[name].make().eval()
    model, _ = replaced(name, steps=0, from_weights=True)
    with torch.no_grad():
        error = model.eval().get_input_embeddings().weight - stock.get_input_embeddings().weight
    assert error.square().mean() < 0.4 * stock.get_input_embeddings().weight.var()


@pytest.mark.parametrize("num_words", [WORDS + 9, WORDS - 50])
@pytest.mark.parametrize(("name", "config"), [("gpt2", "tiers"), ("bert", "sx"), ("t5", "ema")])
def test_resized_model_keeps_its_words_trains_and_freezes(name, config, num_words, tmp_path):
    model, _ = replaced(name, config)
    fewest = min(WORDS, num_words)
    ids, table = words(1, fewest), model.get_input_embeddings()
    before, trains = logits_of(model, ids), [p.requires_grad for p in model.parameters()]
    assert model.resize_token_embeddings(num_words) is table is model.get_input_embeddings()
    assert [p.requires_grad for p in model.parameters()] == trains
    after = logits_of(model, ids)
    assert after.shape[-1] == model.config.vocab_size == num_words
    assert torch.equal(after[..., :fewest], before[..., :fewest])
    losses = train(model, 6, num_words)
    assert losses[-1] < losses[0]
    vectors_VE = stored(model, name, tmp_path / "artifact", num_words)
    assert vectors_VE.tobytes() == table.weight.detach().numpy().tobytes()
    assert torch.equal(logits_of(stock_with(vectors_VE, name, model), ids), logits_of(model, ids))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generated_words_are_those_of_a_stock_model(name, tmp_path):
    model, _ = replaced(name)
    stock = stock_with(stored(model, name, tmp_path / "artifact"), name, model)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": words(2)[:, :3], "attention_mask": torch.ones(4, 3, dtype=torch.long)}
    assert torch.equal(model.generate(**prompt, **how), stock.generate(**prompt, **how))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_layers_leave_the_gradients_as_they_are(name, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model, _ = replaced(name, steps=0)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(model.train(), words(0)).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    one, other = gradients
    assert one.keys() == other.keys()
    for key, gradient in one.items():
        torch.testing.assert_close(other[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_replaced_model_is_saved_and_loaded_as_others_are(name, tmp_path):
    model, _ = replaced(name)
    model.save_pretrained(tmp_path)
    fresh, _ = replaced(name, steps=0)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    fresh.tie_weights()
    assert torch.equal(logits_of(fresh.eval(), words(1)), logits_of(model, words(1)))
