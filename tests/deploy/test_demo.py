"""What a newcomer sees of `make demo`."""

import runpy
import subprocess
from pathlib import Path

import pytest

from dpq_rec import ArtifactError

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo.py"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return runpy.run_path(str(DEMO))


def test_two_ranks_start_without_a_warning_of_torchrun(demo, capfd):
    seconds = demo["step"]("Train", "torchrun", "--nproc-per-node", "2", "--no-python", "true", **demo["THREADS"])
    shown = capfd.readouterr()
    assert seconds > 0
    assert shown.err == ""
    assert shown.out == "\nTrain\n$ OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 --no-python true\n"


def test_the_number_of_threads_that_is_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runpy.run_path(str(DEMO))["THREADS"] == {"OMP_NUM_THREADS": "3"}


def test_every_command_on_several_ranks_says_how_many_threads(demo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check, env: ran.append((command, env)))
    with pytest.raises(ArtifactError):  # no command has left anything to look at
        demo["main"]()
    assert [env.get("OMP_NUM_THREADS") for command, env in ran if command[0].name == "torchrun"] == ["1"]
