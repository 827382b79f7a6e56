"""What tests of whole runs share."""

import pytest


@pytest.fixture
def break_off(monkeypatch):
    """Runs that are interrupted after the first batch of an epoch, as by Ctrl-C."""

    def broken_off(task, disturbed, run):
        real = task.train_batches

        def train_batches(self, epoch):
            batches = real(self, epoch)
            yield next(batches)
            if epoch == disturbed:
                raise KeyboardInterrupt
            yield from batches

        with monkeypatch.context() as patch:
            patch.setattr(task, "train_batches", train_batches)
            with pytest.raises(KeyboardInterrupt):
                run()

    return broken_off
