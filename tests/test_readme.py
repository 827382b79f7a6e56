"""The README's example, as pasted, on two ranks."""

import re
import subprocess
import sys
from pathlib import Path

from dpq_rec import verify

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_trains_shards_freezes_and_looks_up_on_two_ranks(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launch, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "(3, 64) [2]"
    verify(tmp_path / "example-artifact")
