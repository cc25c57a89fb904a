"""A held-out evaluation that fails leaves training as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spatialvlm.errors import DataError
from spatialvlm.training.evaluate_loss import Forgiving, HeldOutLoss


class Alone:
    device = torch.device("cpu")

    def sum(self, value):
        return value

    def gather(self, value):
        return [value]


class Broken:
    """A loader whose first sample cannot be read."""

    lengths = SimpleNamespace(encoder=SimpleNamespace(capabilities=()))
    num_steps = 1
    closed = False

    def __iter__(self):
        raise DataError("photo.jpg is cut off")

    def close(self):
        self.closed = True


def test_a_forgiven_failure_leaves_the_model_in_training_mode():
    loader, model, said = Broken(), nn.Linear(2, 2), []
    evaluate = HeldOutLoss(lambda: loader, Alone(), ("s",), ("spatial",), model.train)
    forgiving = Forgiving(evaluate, said.append)
    state, engine = SimpleNamespace(step=3), SimpleNamespace(model=model)
    assert forgiving(state, engine) == {}
    assert "photo.jpg is cut off" in said[0]
    assert model.training
    assert loader.closed
    with pytest.raises(DataError):
        forgiving(state, engine)
