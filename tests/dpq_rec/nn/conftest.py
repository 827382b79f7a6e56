"""What several files of this folder need."""

import pytest
import torch.distributed as dist


@pytest.fixture
def one_rank():
    """A process group of this process alone: TorchRec's shards exist in one only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
