import torch
from torch import nn

from spatialvlm.models.head import SupervisedHead


def run(rows, dtype=torch.float64):
    torch.manual_seed(0)
    linear = nn.Linear(6, 11, bias=False, dtype=dtype)
    hidden = torch.randn(10, 6, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 11, (10,))
    weight = torch.rand(10, dtype=torch.float32)
    output = SupervisedHead(linear, rows)(hidden, target)
    (weight * output.cross_entropy).sum().backward()
    found = output.cross_entropy.detach(), hidden.grad, linear.weight.grad, output.correct
    plain_hidden = hidden.detach().clone().requires_grad_()
    logits = plain_hidden @ linear.weight.T
    loss = nn.functional.cross_entropy(logits.float(), target, reduction="none")
    grads = torch.autograd.grad((weight * loss).sum(), (plain_hidden, linear.weight))
    return found, (loss.detach(), *grads, logits.argmax(-1) == target)


def test_equals_cross_entropy_for_every_chunk_size():
    for rows in (1, 3, 10, 64):
        for found, expected in zip(*run(rows), strict=True):
            torch.testing.assert_close(found.float(), expected.float(), atol=2e-7, rtol=1e-6)


def test_only_one_chunk_of_logits_is_alive(monkeypatch):
    widths = []
    original = nn.functional.linear

    def spy(hidden, weight, bias=None):
        widths.append(len(hidden))
        return original(hidden, weight, bias)

    monkeypatch.setattr("spatialvlm.models.head.F.linear", spy)
    run(3)
    assert widths == [3, 3, 3, 1] * 2  # forward, and again in backward
