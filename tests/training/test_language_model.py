"""The language model's maths beside plain loops, and whole runs on a generated text."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional

from dpq_rec import EmbeddingStore, verify
from training.__main__ import main
from training.distributed import process_group
from training.models import language_model
from training.models.language_model import LanguageModel, LanguageModelTask, cross_entropy, perplexity
from training.recipes import RECIPES, with_changes
from training.recipes.language_model import LanguageModelOptions

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SIZES = {"embedding-dim": 12, "hidden-dim": 12, "num-steps": 4, "batch-size": 3}
DPQ = {"num-subspaces": 3, "num-codes": 4}
SMALL = [
    text for name, value in {**SIZES, "epochs": 3, "init-scale": 0.5}.items() for text in (f"--{name}", str(value))
]


def sentences(num_sentences, seed):
    """Each word says which two can follow it: 2 is the lowest perplexity that a model could reach within a sentence."""
    rng, lines = np.random.default_rng(seed), []
    for _ in range(num_sentences):
        at = [int(rng.integers(30))]
        while len(at) < 8:
            at.append((3 * at[-1] + int(rng.integers(2))) % 30)
        lines.append(" ".join(f"w{each}" for each in at))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for seed, (split, num_sentences) in enumerate({"train": 400, "valid": 30, "test": 40}.items()):
        (folder / f"{split}.txt").write_text(sentences(num_sentences, seed))
    return folder


@pytest.fixture
def task_of(text):
    """Makes tasks on the text, with some flags changed, on one rank."""
    with process_group(CPU):

        def of(**changes):
            flags = {**SIZES, **{name.replace("_", "-"): value for name, value in changes.items()}}
            start = RECIPES["language-model"](str(text), "unused")
            return LanguageModelTask(with_changes(start.as_dict(), {"embedding": "full", **flags}), CPU)

        yield of


def stepwise(weights, vectors_TBE, num_layers, state=None):
    """What the output layer sees, by the equations of an LSTM, a step and a layer at a time."""
    size = weights["lstm.weight_hh_l0"].shape[1]
    num_texts = vectors_TBE.shape[1]
    state = state or [(torch.zeros(num_texts, size), torch.zeros(num_texts, size)) for _ in range(num_layers)]
    seen = []
    for x in vectors_TBE:
        for layer in range(num_layers):
            hidden, cell = state[layer]
            gates = x @ weights[f"lstm.weight_ih_l{layer}"].T + weights[f"lstm.bias_ih_l{layer}"]
            gates = gates + hidden @ weights[f"lstm.weight_hh_l{layer}"].T + weights[f"lstm.bias_hh_l{layer}"]
            enter, forget, new, out = gates.chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            x = out.sigmoid() * cell.tanh()
            state[layer] = (x, cell)
        seen.append(x)
    return torch.stack(seen), state


def scores(weights, hidden):
    return hidden @ weights["output.weight"].T + weights["output.bias"]


@pytest.mark.parametrize("clip_norm", [0.5, 1000.0])
def test_two_steps_are_those_of_plain_torch(task_of, clip_norm):
    """The second begins with what the first left, without a gradient back into it."""
    task = task_of(clip_norm=clip_norm, learning_rate=0.7)
    model, optimizer = task.distribute(task.model())
    plain = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    batches, state, norms = task.train_batches(1), None, []
    for _ in range(2):
        words_TB, next_TB = batch = next(batches)
        optimizer.zero_grad()
        loss = task.loss(model, batch, torch.Generator())
        loss.backward()
        optimizer.step()

        hidden, state = stepwise(plain, plain["word.weight"][words_TB], 2, state)
        want = sum(functional.cross_entropy(scores(plain, h), n) for h, n in zip(hidden, next_TB, strict=True))
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        gradients = torch.autograd.grad(want, list(plain.values()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        for (name, weight), gradient in zip(plain.items(), gradients, strict=True):
            plain[name] = (weight - 0.7 * min(1, clip_norm / norms[-1]) * gradient).detach().requires_grad_()
        state = [(hidden.detach(), cell.detach()) for hidden, cell in state]
    assert (min(norms) > clip_norm) == (clip_norm == 0.5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_batches_are_the_text_in_reading_order(task_of, text):
    task = task_of()
    words = [word for line in (text / "train.txt").read_text().splitlines() for word in [*line.split(), "<eos>"]]
    stretch = len(words) // 3
    batches = [*task.train_batches(1)]
    assert len(batches) == task.num_steps == (stretch - 1) // 4
    assert task.num_examples == 3 * 4 * len(batches)
    for text_number in range(3):
        begin = text_number * stretch
        for shift in (0, 1):
            rows = torch.cat([batch[shift][:, text_number] for batch in batches])
            got = [task.text.words_V[row] for row in rows]
            assert got == words[begin + shift : begin + shift + len(rows)]


def test_every_epoch_begins_without_a_state(task_of):
    task = task_of()
    model = task.model()
    losses = []
    for _ in range(2):
        batches = task.train_batches(1)
        losses.append([task.loss(model, next(batches), torch.Generator()).item() for _ in range(3)])
    assert losses[0] == losses[1]


def test_weights_start_uniform_and_biases_at_zero(task_of):
    scales = {"init_scale": 0.25, "query_scale": 0.0625, "value_scale": 1.0}
    model = task_of(embedding="dpq-sx", **scales, **DPQ).model()
    for name, weight in model.named_parameters():
        which = "query" if "queries" in name else "value" if "quantizers" in name else "init"
        scale = 0 if "bias" in name else scales[f"{which}_scale"]
        assert 0.6 * scale <= weight.abs().max() <= scale, name
    names = {name for name, _ in model.named_parameters()}
    assert {"word.quantizers.word.values_MKS", "word.quantizers.word.own_keys_MKS"} < names


def test_keys_and_values_take_steps_of_their_own_rate(task_of):
    steps = []
    for rate in (1.0, 0.25):
        task = task_of(embedding="dpq-sx", value_rate=rate, clip_norm=1e6, **DPQ)
        torch.manual_seed(1)
        model = task.model()
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        model, optimizer = task.distribute(model)
        task.loss(model, next(task.train_batches(1)), torch.Generator()).backward()
        optimizer.step()
        steps.append({name: weight.detach() - before[name] for name, weight in model.named_parameters()})
    for name, step in steps[0].items():
        assert step.any(), name
        want = 0.25 * step if "quantizers" in name else step
        torch.testing.assert_close(steps[1][name], want, rtol=1e-3, atol=1e-7)


def test_the_codebook_loss_of_vq_counts_as_often_as_the_steps_that_a_loss_sums(task_of):
    """Its values are moved by the codebook loss alone: here 4 times the mean of |nearest value - query|^2."""
    task = task_of(embedding="dpq-vq", batch_norm=False, **DPQ)
    model, batch = task.model(), next(task.train_batches(1))
    queries_TS = model.word.query_weights()["word"].detach()[batch[0].flatten()].view(-1, 4)
    values_MKS = model.word.quantizer("word").values_MKS
    (values_KS,) = values_MKS.detach().clone()  # one list for all subspaces
    values_KS.requires_grad_()
    nearest_T = torch.cdist(queries_TS, values_KS).argmin(1)
    (want_KS,) = torch.autograd.grad(4 * (values_KS[nearest_T] - queries_TS).square().mean(), values_KS)
    task.loss(model, batch, torch.Generator()).backward()
    torch.testing.assert_close(values_MKS.grad[0], want_KS)


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_cross_entropy_and_its_gradients_are_those_of_torch(spread):
    generator = torch.Generator().manual_seed(1)
    hidden_NH, output = spread * torch.randn(7, 5, generator=generator), nn.Linear(5, 11)
    next_N = torch.randint(11, (7,), generator=generator)
    found = []
    for loss_of in (cross_entropy, lambda h, layer, n: functional.cross_entropy(layer(h), n)):
        inputs = [hidden_NH.clone().requires_grad_(), *output.parameters()]
        loss = loss_of(inputs[0], output, next_N)
        found.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_dropout_leaves_out_inputs_of_every_layer_and_outputs_of_the_last():
    """All weights being 1 where it matters, a share of each is zero in training, and none in evaluation."""
    word = nn.Embedding(1, 500)
    model = LanguageModel(LanguageModelOptions(num_layers=1, hidden_dim=400, dropout=0.5), word, 500, 1)
    seen = []
    model.lstm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    words_TB = torch.zeros(1, 1, dtype=torch.int64)
    outputs = [model.train(mode).hidden(words_TB, None)[0] for mode in (True, False)]
    for each in (seen, outputs):
        assert 0.35 < (each[0] == 0).float().mean() < 0.65
        assert (each[1] != 0).all()


@pytest.mark.parametrize(("chunk_words", "block_words"), [(7, 3), (1, 1), (1000, 1000)])
def test_perplexity_is_that_of_a_naive_loop_whatever_the_chunks(task_of, monkeypatch, chunk_words, block_words):
    monkeypatch.setattr(language_model, "_CHUNK_WORDS", chunk_words)
    monkeypatch.setattr(language_model, "_BLOCK_WORDS", block_words)
    task = task_of(init_scale=1.5)
    model = task.model().eval()
    rows_T = torch.from_numpy(task.text.splits["validation"][:50])
    assert perplexity(model, rows_T) == pytest.approx(naive_perplexity(model.state_dict(), rows_T), rel=1e-4)


def naive_perplexity(weights, rows_T, vectors_VE=None):
    vectors_VE = weights["word.weight"] if vectors_VE is None else vectors_VE
    hidden, _ = stepwise(weights, vectors_VE[rows_T[:-1]][:, None], 2)
    losses = [-scores(weights, h)[0].log_softmax(0)[n].item() for h, n in zip(hidden, rows_T[1:], strict=True)]
    return math.exp(sum(losses) / len(losses))


def run(*arguments):
    return main(["language-model", *map(str, arguments)])


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """A run of DPQ-SX on one rank, with dropout."""
    folder = tmp_path_factory.mktemp("words") / "run"
    arguments = ["--data", text, *SMALL, "--num-subspaces", 3, "--num-codes", 4, "--dropout", 0.1]
    assert run(*arguments, "--out", folder) == 0
    return arguments, folder


def test_run_reports_the_perplexity_of_the_served_words(finished, text):
    """By a naive loop over the artifact's vectors, looked up by word, and the saved weights."""
    _, folder = finished
    weights = {name: torch.from_numpy(each) for name, each in load_file(folder / "model.safetensors").items()}
    assert not [name for name in weights if name.startswith("word")]
    train = [word for line in (text / "train.txt").read_text().splitlines() for word in [*line.split(), "<eos>"]]
    words = sorted(set(train), key=lambda word: (-train.count(word), word))
    vectors_VE = torch.from_numpy(EmbeddingStore.open(folder / "artifact").lookup("word", words).vectors)
    test = [word for line in (text / "test.txt").read_text().splitlines() for word in [*line.split(), "<eos>"]]
    rows_T = torch.tensor([words.index(word) for word in test])
    metrics = metrics_of(folder)
    assert metrics["metrics"] == {"perplexity": pytest.approx(naive_perplexity(weights, rows_T, vectors_VE), rel=1e-4)}
    (table,) = verify(folder / "artifact").tables.values()
    assert table.manifest.kind == "dpq"
    assert table.manifest.shared_values
    assert metrics["tables"]["word"]["compression_ratio"] == pytest.approx(31 * 12 * 4 / (31 + 4 * 4 * 4))
    assert metrics["paper_ratios"] == {"word": pytest.approx(32 * 31 * 12 / (31 * 3 * 2 + 32 * 4 * 4))}


def test_run_chooses_the_epoch_of_the_lowest_perplexity_and_learns(finished):
    metrics = metrics_of(finished[1])
    perplexities = [epoch["perplexity"] for epoch in metrics["history"]]
    assert metrics["best_epoch"] == 1 + int(np.argmin(perplexities))
    assert metrics["metrics"]["perplexity"] < 15  # a model that knows nothing has 31
    assert metrics["batch_size"] == 3
    assert metrics["examples_per_second"] > 0


def test_run_keeps_the_best_epoch_where_later_ones_are_worse(text, tmp_path):
    """A learning rate that rises tenfold after the first epoch spoils what that learned."""
    arguments = ["--data", text, *SMALL, "--embedding", "full", "--full-rate-epochs", 1, "--rate-decay", 10]
    assert run(*arguments, "--out", tmp_path / "run") == 0
    metrics = metrics_of(tmp_path / "run")
    first, *later = [epoch["perplexity"] for epoch in metrics["history"]]
    assert first < min(later)
    assert metrics["best_epoch"] == 1


def test_a_run_that_broke_off_ends_as_an_undisturbed_one(finished, tmp_path, monkeypatch):
    """With dropout, batch statistics and a learning rate of the epoch's own."""
    arguments, undisturbed = finished
    loss, calls = LanguageModelTask.loss, []

    def breaking(self, *inputs):
        calls.append(1)
        if len(calls) > self.num_steps + 30:
            raise KeyboardInterrupt
        return loss(self, *inputs)

    monkeypatch.setattr(LanguageModelTask, "loss", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "--out", tmp_path / "run")
    assert [each.name for each in (tmp_path / "run" / "checkpoints").glob("epoch-*")] == ["epoch-0001"]
    monkeypatch.undo()
    assert run(*arguments, "--out", tmp_path / "run") == 0
    found, want = metrics_of(tmp_path / "run"), metrics_of(undisturbed)
    assert {name: found[name] for name in ("metrics", "history")} == {n: want[n] for n in ("metrics", "history")}
    table = Path("artifact", "tables", "word.safetensors")
    tensors, others = load_file(tmp_path / "run" / table), load_file(undisturbed / table)
    assert all((tensors[name] == others[name]).all() for name in others)


@pytest.mark.parametrize(
    "options",
    [
        "--embedding dpq-vq --num-subspaces 3 --num-codes 4 --ema-decay 0.9 --revive-after 5 --start-from kmeans",
        "--embedding dpq-vq --num-subspaces 2 --num-codes 4 --num-levels 2 --no-share-subspaces",
        "--embedding dpq-vq --target-ratio 3 --full-epochs 1",
        "--embedding full --num-layers 1 --clip-norm 1",
    ],
)
def test_options_train_together(text, tmp_path, options):
    assert run("--data", text, *SMALL, *options.split(), "--out", tmp_path / "run") == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["metrics"]["perplexity"] < 25
    losses = [epoch["loss"] for epoch in metrics["history"]]
    assert losses[-1] < losses[0]
    ratio = float(dict(itertools.pairwise(options.split())).get("--target-ratio", 1))
    assert metrics["tables"]["word"]["compression_ratio"] >= ratio


def test_two_ranks_take_the_steps_of_one(text, tmp_path):
    """From small weights: larger ones learn so fast that the rounding of sums over ranks changes codes."""
    changes = ["--batch-size", 4, "--num-subspaces", 3, "--num-codes", 4, "--epochs", 2, "--init-scale", 0.1]
    changes += ["--query-scale", 0.1, "--value-scale", 0.1]
    arguments = ["--data", text, *SMALL, *changes]
    assert run(*arguments, "--out", tmp_path / "one") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training"]
    command = [*launch, "language-model", *map(str, arguments), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert two["world_size"] == 2
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)
        assert theirs["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-3)
    assert two["metrics"]["perplexity"] == pytest.approx(one["metrics"]["perplexity"], rel=1e-3)


def test_run_refuses_a_text_too_short_for_a_step(text, tmp_path, capsys):
    assert run("--data", text, "--batch-size", 200, "--out", tmp_path / "run") == 2
    assert "got 3600 words in the train text, want 4200 or more for 200 parts" in capsys.readouterr().err


def test_run_refuses_a_folder_without_text(tmp_path, capsys):
    assert run("--data", tmp_path, "--out", tmp_path / "run") == 2
    assert "has no file for train; want one whose name says train" in capsys.readouterr().err
