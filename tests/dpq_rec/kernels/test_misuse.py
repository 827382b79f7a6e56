"""What no caller and no file can do: leave an array, hang, or get numbers that are none."""

import subprocess
import sys

import numpy as np
import pytest

from dpq_rec import CodeLayout, ConfigError, kernels
from dpq_rec.kernels import Coded
from tests.dpq_rec.builders import random_values

# Codes change between the look at them and their use: a thread writes to them as another process may to a file. The
# values end where readable memory ends, and whatever is read behind them is a zero that stands there.
CHANGING_CODES = """
import sys, threading, time
import numpy as np
from dpq_rec import CodeLayout, DamagedArtifactError, kernels
from dpq_rec.kernels import Coded
from dpq_rec.kernels.lookup import JsonTexts, decode_to_json
from tests.dpq_rec.kernels.end_of_memory import at_the_end

num_codes, use = int(sys.argv[1]), sys.argv[2]
layout = CodeLayout(num_subspaces=8, num_codes=num_codes)
packed, rows = np.zeros((9, layout.row_bytes), np.uint8), np.zeros(2_000, np.int64)  # the last are read from a copy
stored = Coded.of(packed, at_the_end(np.full((8, num_codes, 4), 7, np.float32)), layout)
texts = JsonTexts.of(stored, np.float32, lambda numbers: b",".join([b"7.0"] * len(numbers)))
stop = time.monotonic() + 0.2

def change():
    while time.monotonic() < stop:
        for _ in range(1_000):
            packed.fill(255)
            packed.fill(0)

thread = threading.Thread(target=change)
thread.start()
while time.monotonic() < stop:
    try:
        if use == "decode":
            assert set(np.unique(kernels.decode(stored, rows))) <= {0, 7}
        elif use == "bags":
            kernels.decode_bags(stored, rows, np.full(1_000, 2))
        elif use == "json":
            assert set(decode_to_json(stored, texts, rows)) <= set(b"[],.70")
        else:
            kernels.scan_top(packed, np.ones((8, num_codes), np.float32), layout, 1)
    except DamagedArtifactError:
        pass
thread.join()
"""


def ran(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-500:]
    return done.stdout


@pytest.mark.parametrize("use", ["decode", "bags", "json", "scan"])
@pytest.mark.parametrize("num_codes", [5, 129])
def test_codes_that_change_between_check_and_use_read_nothing_outside_the_values(num_codes, use):
    ran("-c", CHANGING_CODES, str(num_codes), use)


def test_every_function_refuses_arguments_that_are_wrong_in_one_thing_and_leaves_no_array():
    assert int(ran("-W", "ignore", "-m", "tests.dpq_rec.kernels.misuse").split()[-1]) > 2_500


def stored(num_codes=5):
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes)
    return Coded.of(np.zeros((7, layout.row_bytes), np.uint8), random_values(layout, 4), layout)


@pytest.mark.parametrize("dtype", ["int8", "float64", "int32", "complex64", "bool", ">f4", "nonsense"])
def test_decode_names_the_dtypes_that_there_are(dtype):
    with pytest.raises(ConfigError, match=r"want.*(float16|decode)"):
        kernels.decode(stored(), np.zeros(3, np.int64), dtype=dtype)


@pytest.mark.parametrize("lengths", [[3, 3], [6, -1], [-1, 6], [2**62, 2**62, 2**62, 2**62, 5], [4], []])
def test_decode_bags_refuses_lengths_that_are_not_those_of_the_rows(lengths):
    with pytest.raises(ConfigError, match="bag_lengths: got"):
        kernels.decode_bags(stored(), np.zeros(5, np.int64), np.array(lengths, np.int64))


@pytest.mark.parametrize("num_threads", [0, -1, -(2**63), 2**31, 2**62, 2**70])
def test_a_number_of_threads_that_cannot_be_is_refused(num_threads):
    rows_N = np.zeros(5, np.int64)
    for use in (
        lambda: kernels.decode(stored(), rows_N, num_threads=num_threads),
        lambda: kernels.decode_bags(stored(), rows_N, np.array([5]), num_threads=num_threads),
    ):
        with pytest.raises(ConfigError, match=r"num_threads|int"):
            use()


def test_as_many_threads_as_may_be_asked_for_find_the_same():
    rows_N = np.arange(5_000) % 7
    assert (
        kernels.decode(stored(), rows_N, num_threads=2**31 - 1).tobytes() == kernels.decode(stored(), rows_N).tobytes()
    )


def test_a_refusal_says_what_was_given():
    with pytest.raises(ConfigError, match=r"got Vectors, float64 \[3\] not contiguous, .*; want decode\(.*int64"):
        kernels.decode(stored(), np.zeros(6)[::2])
