"""A 4,000-parameter model and a step source with the interface of the real ones, for engine tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spatialvlm.training.optim import build_adamw, freeze_by_rate, plan_groups
from spatialvlm.typing import Batch, LossOutput, ModalityFlags

VOCAB, WIDTH = 31, 16
RATES = {
    "language_model": 1e-2,
    "vision_encoder": 1e-3,
    "projector": 3e-3,
    "embeddings": 2e-3,
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x):
        return self.lm_head(x).float()


class FakeVLM(nn.Module):
    """Embedding, vision linear, projector, two blocks, head; vision runs in every forward (dummy unit)."""

    def __init__(self, seed: int = 0, dropout: float = 0.0, dummy: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
            self.visual = nn.ModuleList([Block(3), Block(3)])
            self.projector = nn.Linear(3, WIDTH)
            self.layers = nn.ModuleList([Block(WIDTH), Block(WIDTH)])
            self.head = Head()
        self.dropout = nn.Dropout(dropout)
        self.dummy = dummy

    def parts(self):
        named = dict(self.named_parameters())
        pick = lambda *prefix: [(n, p) for n, p in named.items() if n.startswith(prefix)]  # noqa: E731
        return {
            "language_model": pick("layers"),
            "vision_encoder": pick("visual"),
            "projector": pick("projector"),
            "embeddings": pick("embed_tokens", "head"),
        }

    def forward(self, batch: Batch) -> LossOutput:
        x = self.embed_tokens(batch["input_ids"][0])
        seen = batch["token_kind"][0] == 1
        pixels = batch["frames_u8"].view(-1, 3).to(x.dtype) / 255
        dummy = len(pixels) == 0
        if not dummy or self.dummy:
            v = torch.zeros(4, 3, dtype=x.dtype) if dummy else pixels
            for block in self.visual:
                v = block(v)
            v = self.projector(v)
            x = (
                x + 0.0 * v.float().sum()
                if dummy
                else x.masked_scatter(seen[:, None], v.to(x.dtype))
            )
        # A causal mean stands in for attention, so that images reach the supervised rows.
        x = x + x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]
        for layer in self.layers:
            x = layer(self.dropout(x))
        rows = batch["logit_index"]
        logits = self.head(x[rows])
        ce = nn.functional.cross_entropy(logits, batch["target_ids"], reduction="none")
        weighted = ce * batch["loss_weight"]
        count = max(1, len(batch["uids"]))
        sample = torch.zeros(count).index_add_(0, batch["sample_index"], weighted.detach().float())
        weight = torch.zeros(count).index_add_(0, batch["sample_index"], batch["loss_weight"])
        supervised = batch["loss_weight"] > 0
        right = (logits.argmax(-1) == batch["target_ids"]) & supervised
        wrong = torch.zeros(count).index_add_(
            0, batch["sample_index"], (supervised & ~right).float()
        )
        return LossOutput(
            weighted.sum(),
            sample,
            weight,
            wrong,
            right.sum(),
            supervised.sum(),
            torch.zeros(2),
        )


def make_batch(seed: int, *, length: int = 12, image: bool = True, labels: int = 4) -> Batch:
    """One sample; ``labels=0`` gives a dummy pack."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (1, length), generator=g)
    kind = torch.zeros(1, length, dtype=torch.uint8)
    patches = 3 if image else 0
    kind[0, :patches] = 1
    rows = torch.arange(length - max(labels, 1) - 1, length - 1)
    return Batch(
        input_ids=ids,
        token_kind=kind,
        segment_start=torch.tensor([0], dtype=torch.int32),
        segment_len=torch.tensor([length], dtype=torch.int32),
        segment_parent=torch.tensor([-1], dtype=torch.int32),
        logit_index=rows,
        target_ids=ids[0, rows + 1],
        loss_weight=torch.full((len(rows),), float(labels > 0)),
        sample_index=torch.zeros(len(rows), dtype=torch.int64),
        source_index=torch.tensor([seed % 2]),
        capability_index=torch.tensor([-1]),
        frames_u8=torch.randint(0, 256, (patches * 3,), generator=g, dtype=torch.uint8),
        media_grid_thw=torch.tensor([[1, 1, patches]] if image else []).view(-1, 3).long(),
        flags=ModalityFlags(image, False, False, False),
        uids=[f"fake#{seed}"] if labels else [],
    )


@dataclass
class FakeSteps:
    batches: list[Batch]
    denominator_local: float
    label_tokens: int
    plan: Any = None
    shares: Any = None
    wait_s: float = 0.0


class FakeLoader:
    """``per_step`` samples per step dealt round-robin over ranks; unequal label counts; resumable.

    ``poison``: (step, sample) whose loss weights become NaN, or a mapping to what they are multiplied by.
    """

    def __init__(self, *, rank=0, size=1, per_step=4, start=0, kinds=None, poison=()) -> None:
        self.rank, self.size, self.per_step = rank, size, per_step
        self.step = start
        self.kinds = kinds or (lambda step, i: (step + i) % 3 != 0)
        self.poison = dict(poison) if isinstance(poison, dict) else dict.fromkeys(poison, math.nan)

    def __iter__(self):
        while True:
            step = self.step
            self.step += 1
            own = [i for i in range(self.per_step) if i % self.size == self.rank]
            batches = [
                make_batch(
                    100 * step + i, length=8 + 3 * i, image=self.kinds(step, i), labels=1 + 2 * i
                )
                for i in own
            ]
            for i, batch in zip(own, batches, strict=True):
                if (step, i) in self.poison:
                    batch["loss_weight"] = batch["loss_weight"] * self.poison[step, i]
            total = sum(len(b["logit_index"]) for b in batches)
            yield FakeSteps(batches, float(total), total)

    def state_dict(self):
        return {"step": self.step}

    def own_faults(self):
        return [1]

    def check_budget(self, faults):
        assert faults.tolist() == [self.size]  # summed over ranks


def prepare(model: FakeVLM, rates=RATES, weight_decay=0.01):
    """Groups and an optimizer factory for a fake model."""
    parts = model.parts()
    freeze_by_rate(parts, rates)
    groups = plan_groups(model, parts, rates, weight_decay=weight_decay)
    return parts, groups, lambda m: build_adamw(m, groups)
