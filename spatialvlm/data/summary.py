"""Numbers about sources and plans, before anything is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialvlm.data.plan import PackingArgs, distinct_media, imbalance, make_items
from spatialvlm.data.sample import StepPlan, count_notes
from spatialvlm.typing import CostCoefficients

if TYPE_CHECKING:
    from spatialvlm.data.lengths import LengthTable
    from spatialvlm.data.mixture import Mixture
    from spatialvlm.data.sample import DrawArray, LengthArray

SIZES = ("tokens", "label_tokens", "patches", "frames")


def quantiles(values: Any) -> dict[str, int]:
    """Median, 95 %, 99 % and the largest of some sizes."""
    if not len(values):
        return {"p50": 0, "p95": 0, "p99": 0, "max": 0}
    p50, p95, p99, top = np.quantile(values, [0.5, 0.95, 0.99, 1.0], method="higher")
    return {"p50": int(p50), "p95": int(p95), "p99": int(p99), "max": int(top)}


def source_summary(lengths: LengthTable, mixture: Mixture, source: int) -> dict[str, Any]:
    """Rows, rejects and sizes of one source; sizes cover the rows measured so far."""
    index = lengths.encoder.indices[source]
    name = index.source.name
    records = lengths.records[source]
    known = records[records["tokens"] > 0]
    return {
        "source": name,
        "family": index.source.family,
        "format": index.source.format.name,
        "rows": len(index),
        "eligible": int(index.eligible().sum()),
        "drawn_rows": int(mixture.drawn_rows.get(name, 0)),
        "measured": len(known),
        "rejected": index.rejected() | lengths.rejected(source),
        "notes": count_notes(known["notes"]),
        "tokens_removed": int(known["tokens_removed"].sum()),
        "blocked": dict(index.info["blocked"]),
        "without_scene_id": int(index.info["no_known_id"]),
        **{size: quantiles(known[size]) for size in SIZES},
    }


@dataclass
class PlanSummary:
    """Totals over planned steps.

    Attributes:
        world: Number of ranks.
        align: Packs are padded to a multiple of this.
        unit_sizes: Rows per unit of every lane of the mixture, to count units cut by a step border.
    """

    world: int
    align: int = 1
    unit_sizes: Sequence[int] = ()
    steps: int = 0
    samples: int = 0
    packs: int = 0
    empty_packs: int = 0
    micro_steps: int = 0
    tokens: int = 0
    """LLM tokens that are computed, shared prefixes once, without alignment padding."""
    allocated: int = 0
    separate_tokens: int = 0
    """LLM tokens if every sample were computed alone."""
    flops: float = 0.0
    separate_flops: float = 0.0
    imbalance: list[float] = field(default_factory=list)
    patch_imbalance: list[float] = field(default_factory=list)
    distinct_media: list[int] = field(default_factory=list)
    group_sizes: Counter[int] = field(default_factory=Counter)
    units_cut: int = 0
    """Units that lie in two steps, and so form two groups."""

    def add(
        self,
        plan: StepPlan,
        draws: DrawArray,
        sizes: LengthArray,
        cost: CostCoefficients,
    ) -> None:
        """Count one step."""
        alone = PackingArgs(max_tokens=1 << 40, max_branches=1)
        singles = make_items(sizes, cost, alone)
        self.steps += 1
        self.micro_steps += len(plan.packs)
        self.separate_tokens += sum(item.tokens for item in singles)
        self.separate_flops += sum(item.cost for item in singles)
        self.imbalance.append(imbalance(plan))
        first = int(draws["position"][0])
        patches = np.zeros(self.world, np.int64)
        for packs in plan.packs:
            for rank, pack in enumerate(packs):
                self.packs += 1
                self.empty_packs += not pack.draws
                self.samples += len(pack.draws)
                self.tokens += pack.tokens
                self.allocated += -(-pack.tokens // self.align) * self.align
                self.flops += pack.cost
                self.group_sizes.update(len(group) for group in pack.groups)
                leaders = [pack.draws[group[0]].position - first for group in pack.groups]
                patches[rank] += int(sizes["patches"][leaders].sum()) if leaders else 0
        if patches.any():
            self.patch_imbalance.append(float(patches.max() / patches.mean() - 1))
        self.distinct_media.append(distinct_media(sizes))
        self.units_cut += self._units_cut(draws)

    def _units_cut(self, draws: DrawArray) -> int:
        """Units that begin in these draws and do not end in them."""
        if not self.unit_sizes:
            return 0
        units = draws[["lane", "unit", "epoch"]]
        last = np.asarray(self.unit_sizes)[draws["lane"]] - 1
        begun = {unit.item() for unit in units[draws["branch"] == 0]}
        return len(begun - {unit.item() for unit in units[draws["branch"] == last]})

    def as_dict(self, max_tokens: int) -> dict[str, Any]:
        """The totals as plain numbers."""
        sizes = sorted(self.group_sizes.items())
        return {
            "steps": self.steps,
            "samples": self.samples,
            "micro_steps_per_step": self.micro_steps / max(self.steps, 1),
            "packs": self.packs,
            "empty_packs": self.empty_packs,
            "fill": self.tokens / max((self.packs - self.empty_packs) * max_tokens, 1),
            "padding": 1 - self.tokens / max(self.allocated, 1),
            "cost_imbalance_mean": float(np.mean(self.imbalance or [0])),
            "patch_imbalance_mean": float(np.mean(self.patch_imbalance or [0])),
            "distinct_media_mean": float(np.mean(self.distinct_media or [0])),
            "distinct_media_min": int(min(self.distinct_media or [0])),
            "group_sizes": {str(size): count for size, count in sizes},
            "units_cut_by_steps": self.units_cut,
            "tokens": self.tokens,
            "tokens_separate": self.separate_tokens,
            "tokens_saved": self.separate_tokens / max(self.tokens, 1),
            "flops": self.flops,
            "flops_separate": self.separate_flops,
            "flops_saved": self.separate_flops / self.flops if self.flops else 1.0,
        }


def histogram(values: Sequence[int] | Any, num_bins: int = 30) -> list[tuple[int, int, int]]:
    """(lower edge, upper edge, count) of integer sizes in equal bins."""
    if not len(values):
        return []
    low, high = int(np.min(values)), int(np.max(values))
    bins = min(num_bins, high - low + 1)
    counts, edges = np.histogram(values, bins=bins, range=(low, high + 1))
    return [(int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def total_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum of several counters."""
    out: Counter[str] = Counter()
    for part in parts:
        out.update(part)
    return dict(sorted(out.items()))
