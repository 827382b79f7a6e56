"""Text classification beside plain torch and numpy, and whole runs on generated documents."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional

from dpq_rec import EmbeddingStore, verify
from training.__main__ import main
from training.distributed import process_group
from training.models.text_classification import TextClassificationTask
from training.recipes import RECIPES, with_changes

CPU = torch.device("cpu")
SIZES = {"embedding-dim": 12, "hidden-dim": 16, "batch-size": 32, "dropout": 0.0, "word-dropout": 0.0}
DPQ = {"num-subspaces": 6, "num-codes": 8}
SMALL = [
    text for name, value in {**SIZES, "epochs": 4, "learning-rate": 0.02}.items() for text in (f"--{name}", str(value))
]
QUANTIZED = ["--num-subspaces", 6, "--num-codes", 8]


def documents(num_documents, seed):
    """Each of three topics has 20 words of its own; a third of a document's words are any topic's."""
    rng = np.random.default_rng(seed)
    topics = rng.integers(3, size=num_documents)
    texts = []
    for topic in topics:
        of_any = rng.random(rng.integers(0, 12)) < 1 / 3
        words = np.where(of_any, rng.integers(60, size=len(of_any)), 20 * topic + rng.integers(20, size=len(of_any)))
        texts.append(" ".join(f"w{word}" for word in words))
    return pa.table({"text": texts, "label": topics})


@pytest.fixture(scope="session")
def news(tmp_path_factory):
    folder = tmp_path_factory.mktemp("news")
    for seed, (split, num_documents) in enumerate({"train": 700, "test": 150}.items()):
        pq.write_table(documents(num_documents, seed), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def task_of(news):
    """Makes tasks on the documents, with some flags changed, on one rank."""
    with process_group(CPU):

        def of(**changes):
            flags = {**SIZES, **{name.replace("_", "-"): value for name, value in changes.items()}}
            start = RECIPES["text-classification"](str(news), "unused")
            return TextClassificationTask(with_changes(start.as_dict(), {"embedding": "full", **flags}), CPU)

        yield of


def bags_of(batch):
    return np.split(batch[0].rows_T, np.cumsum(batch[0].lengths)[:-1])


def logits_of(weights, vectors_VE, bags):
    """By the definition, a document at a time; one without words has a mean of zeros."""
    zeros_E = torch.zeros(vectors_VE.shape[1])
    means_BE = torch.stack([vectors_VE[torch.from_numpy(b)].mean(0) if len(b) else zeros_E for b in bags])
    hidden_BH = (means_BE @ weights["hidden.weight"].T + weights["hidden.bias"]).clamp(min=0)
    return hidden_BH @ weights["output.weight"].T + weights["output.bias"]


def test_steps_are_those_of_plain_torch(task_of):
    """Two steps of Adam, from the first on: what readies its state for checkpoints is no step."""
    task = task_of(learning_rate=0.03)
    model, optimizer = task.distribute(task.model())
    plain = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    adam = torch.optim.Adam(plain.values(), 0.03)
    batches = task.train_batches(1)
    for _ in range(2):
        batch = next(batches)
        assert min(batch[0].lengths) == 0, "an empty document is among them"
        optimizer.zero_grad()
        loss = task.loss(model, batch, torch.Generator())
        loss.backward()
        optimizer.step()
        adam.zero_grad()
        logits_BC = logits_of(plain, plain["word.weight"], bags_of(batch))
        want = -logits_BC.log_softmax(1)[torch.arange(32), torch.from_numpy(batch[1])].mean()
        want.backward()
        adam.step()
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_epoch_holds_every_document_once_but_for_the_rest_in_an_order_of_its_own(task_of):
    task = task_of()
    train = task.documents.splits["train"]
    everything = sorted(zip(map(tuple, bags_of(train)), train[1].tolist(), strict=True))
    orders = []
    for epoch in (1, 1, 2):
        batches = [*task.train_batches(epoch)]
        assert len(batches) == task.num_steps == 630 // 32
        seen = [each for b in batches for each in zip(map(tuple, bags_of(b)), b[1].tolist(), strict=True)]
        orders.append(seen)
        left = list(everything)
        for each in seen:
            left.remove(each)
        assert len(left) == 630 % 32
    assert orders[0] == orders[1] != orders[2]


def test_word_dropout_leaves_out_words_of_each_document_alone(task_of):
    """Other ones in every epoch."""
    whole, *thinned = (next(task_of(word_dropout=share).train_batches(3)) for share in (0.0, 0.5, 0.5))
    for thin, full in zip(bags_of(thinned[0]), bags_of(whole), strict=True):
        rest = list(full)
        assert all(rest.pop(rest.index(row)) == row for row in thin)
    assert 0.35 < len(thinned[0][0].rows_T) / len(whole[0].rows_T) < 0.65
    assert (thinned[0][0].rows_T == thinned[1][0].rows_T).all()
    assert (thinned[0][1] == whole[1]).all()
    task = task_of(word_dropout=0.5)
    seen = [sum(len(batch[0].rows_T) for batch in task.train_batches(epoch)) for epoch in (1, 2)]
    assert seen[0] != seen[1]


def test_ranks_share_out_the_documents_of_a_step(task_of, monkeypatch):
    whole = next(task_of(word_dropout=0.3).train_batches(3))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        parts.append(next(task_of(word_dropout=0.3).train_batches(3)))
    assert [len(part[1]) for part in parts] == [8] * 4
    for at in range(32):
        part, inside = parts[at % 4], at // 4
        assert part[1][inside] == whole[1][at]
        assert (bags_of(part)[inside] == bags_of(whole)[at]).all()


@pytest.mark.parametrize("kind", ["full", "dpq-sx", "dpq-vq"])
def test_a_batch_without_any_word_trains(task_of, kind):
    task = task_of(embedding=kind, **({} if kind == "full" else DPQ))
    model, optimizer = task.distribute(task.model())
    bag, classes_N = task.documents.splits["train"]
    empty_B = np.flatnonzero(bag.lengths == 0)[:2]
    task.loss(model.train(), (bag.take(empty_B), classes_N[empty_B]), torch.Generator()).backward()
    optimizer.step()
    assert all(weight.isfinite().all() for weight in model.parameters())


def run(*arguments):
    return main(["text-classification", *map(str, arguments)])


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="session")
def finished(news, tmp_path_factory):
    """A run of DPQ-VQ on one rank, with dropout."""
    folder = tmp_path_factory.mktemp("topics") / "run"
    arguments = ["--data", news, *SMALL, *QUANTIZED, "--embedding", "dpq-vq", "--dropout", 0.1, "--word-dropout", 0.1]
    assert run(*arguments, "--out", folder) == 0
    return arguments, folder


def test_run_reports_the_accuracy_of_the_served_words(finished, news):
    """From the artifact's vectors, looked up by word, and the saved weights alone."""
    folder = finished[1]
    weights = {name: torch.from_numpy(each) for name, each in load_file(folder / "model.safetensors").items()}
    assert set(weights) == {"hidden.weight", "hidden.bias", "output.weight", "output.bias"}
    store, test = EmbeddingStore.open(folder / "artifact"), pq.read_table(news / "test.parquet").to_pydict()
    num_right = 0
    for text, label in zip(test["text"], test["label"], strict=True):
        vectors_NE = torch.from_numpy(store.lookup("word", text.split()).vectors)
        (logits_C,) = logits_of(weights, vectors_NE, [np.arange(len(vectors_NE))])
        num_right += int(logits_C.argmax()) == label
    metrics = metrics_of(folder)
    assert metrics["metrics"] == {"accuracy": pytest.approx(num_right / 150, abs=1e-9)}
    (table,) = verify(folder / "artifact").tables.values()
    assert table.manifest.kind == "dpq"
    assert metrics["tables"]["word"]["num_embeddings"] == 60


def test_run_chooses_the_epoch_of_the_highest_accuracy_and_learns(finished):
    metrics = metrics_of(finished[1])
    accuracies = [epoch["accuracy"] for epoch in metrics["history"]]
    assert metrics["best_epoch"] == 1 + int(np.argmax(accuracies))
    assert metrics["metrics"]["accuracy"] > 0.7  # chance is a third; documents without words have a topic too
    assert metrics["batch_size"] == 32
    assert metrics["examples_per_second"] > 0


def test_a_run_that_broke_off_ends_as_an_undisturbed_one(finished, tmp_path, monkeypatch):
    """With dropout of both kinds, Adam's moments and batch statistics."""
    arguments, undisturbed = finished
    loss, calls = TextClassificationTask.loss, []

    def breaking(self, *inputs):
        calls.append(1)
        if len(calls) > self.num_steps + 7:
            raise KeyboardInterrupt
        return loss(self, *inputs)

    monkeypatch.setattr(TextClassificationTask, "loss", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "--out", tmp_path / "run")
    monkeypatch.undo()
    assert run(*arguments, "--out", tmp_path / "run") == 0
    found, want = metrics_of(tmp_path / "run"), metrics_of(undisturbed)
    assert {name: found[name] for name in ("metrics", "history")} == {n: want[n] for n in ("metrics", "history")}


@pytest.mark.parametrize("options", ["--embedding full", "--embedding dpq-sx --start-from kmeans --share-subspaces"])
def test_tables_of_every_kind_learn(news, tmp_path, options):
    quantized = [] if "full" in options else QUANTIZED
    assert run("--data", news, *SMALL, *quantized, *options.split(), "--out", tmp_path / "run") == 0
    assert metrics_of(tmp_path / "run")["metrics"]["accuracy"] > 0.7


def test_run_refuses_a_batch_larger_than_the_data(news, tmp_path, capsys):
    assert run("--data", news, "--batch-size", 1000, "--out", tmp_path / "run") == 2
    assert "--batch-size: got 1000, and 630 training documents; lower it" in capsys.readouterr().err


def test_run_refuses_data_without_a_label(tmp_path, capsys):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "train.parquet")
    assert run("--data", tmp_path, "--out", tmp_path / "run") == 2
    assert "training: label: got no such column in" in capsys.readouterr().err


def test_the_loss_of_a_batch_is_the_mean_over_its_documents(task_of):
    task = task_of(embedding="dpq-sx", **DPQ)
    model, batch = task.model().eval(), next(task.train_batches(1))
    vectors_VE = model.word.only_quantizer.decode(model.word.only_quantizer.encode(model.word.query_weights()["word"]))
    logits_BC = logits_of(dict(model.named_parameters()), vectors_VE, bags_of(batch))
    want = functional.cross_entropy(logits_BC, torch.from_numpy(batch[1]))
    assert task.loss(model, batch, torch.Generator()).item() == pytest.approx(want.item(), rel=1e-5)
