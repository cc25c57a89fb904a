"""Peak of live storages, on a hand-counted example."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spatialvlm.testing.memory import PeakMemory


def test_peak_counts_live_storages_once():
    known = torch.zeros(1000)
    with PeakMemory([known]) as memory:
        a = known + 1  # 4000 bytes
        view = a.view(10, 100)  # the same storage
        b = a * 2  # 8000
        assert memory.live == 8000
        del a, view
        assert memory.live == 4000
        c = b.double()  # 4000 + 8000
        del b
        d = c.half()  # 8000 + 2000
        known.add_(1)  # in place: nothing new
        assert memory.live == 10_000
        del c, d
    assert memory.live == 0
    assert memory.peak == 12_000


def test_fake_tensors_have_sizes_but_no_memory():
    with FakeTensorMode(), PeakMemory() as memory:
        x = torch.empty(1 << 20, 1 << 12)
        y = x.bfloat16()
        del x, y
    assert memory.peak == (1 << 32) * 6
