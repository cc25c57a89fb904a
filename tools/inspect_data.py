"""See what a recipe really feeds the model, as one static page.

    python tools/inspect_data.py configs/tiny/stage1_qwen3vl.yaml --out data.html
    python tools/inspect_data.py configs/stage2/qwen2_5vl_7b_interleaved.yaml --source vsi590k --num 5 --out data.html

Per source: counts, rejects with reasons, histograms. Per sample: media at model resolution with marks and frame times,
every token coloured by label and kind with its position as tooltip, the shareable prefix, and the text that is trained
on, decoded from the labels. Per pack: its segments and who branches from whom. All text is escaped, nothing is loaded
from elsewhere.

Exit codes: 2 configuration or checkpoint, 3 data.
"""

import argparse
import json
import sys
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.errors import ConfigError, DataError, SpatialVLMError, run_command

MIXTURE_DRAWS = 10_000
REJECTS_SHOWN = 20
HISTOGRAMS = {
    "LLM tokens": "tokens", "supervised tokens": "label_tokens", "ViT patches": "patches", "frames": "frames",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML recipe of a stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--out", type=Path, required=True, help="page to write")
    parser.add_argument("--source", help="only this source")
    parser.add_argument("--num", type=int, default=6, help="samples per source")
    parser.add_argument("--packs", type=int, default=4, help="packs of the first step")
    parser.add_argument("--world", type=int, default=2, help="data-parallel ranks of the plan")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides, TrainConfig)
        page = inspect(config, args)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3 if isinstance(error, DataError) else 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(f"{args.out}: {len(page) / 1e6:.1f} MB")
    return 0


def inspect(config: TrainConfig, args: argparse.Namespace) -> str:
    """The page."""
    from spatialvlm.data.page import Page
    from spatialvlm.data.sample import World
    from spatialvlm.synthesis.formats import DIALECT_OF, FormatExpander
    from spatialvlm.synthesis.marks import draw_marks
    from spatialvlm.training.preview import preview_loader

    names = [source.name for source in config.data.sources]
    if args.source is not None and args.source not in names:
        raise ConfigError(f"--source {args.source}: the recipe has {', '.join(names)}")
    loader = preview_loader(
        config,
        World(0, args.world),
        expand_format=lambda family: FormatExpander(
            DIALECT_OF[family], marked=config.data.marked_formats
        ),
        report=partial(print, file=sys.stderr),
        draw_marks=draw_marks,
    )
    page = Page(
        f"Data of {args.config.name}",
        f"{loader.mixture.length:,} samples, {loader.num_steps:,} optimizer steps; "
        f"template {loader.lengths.encoder.template.family}, packs of at most {config.packing.max_tokens:,} tokens",
    )
    chosen = [n for n, name in enumerate(names) if args.source in (None, name)]
    add_overview(page, loader, chosen)
    add_packs(page, loader, args.packs)
    for number in chosen:
        add_source(page, loader, number, args.num)
    return page.html()


def add_overview(page: Any, loader: Any, chosen: list[int]) -> None:
    """Source table and mixture."""
    from spatialvlm.data.page import shares_figure, shares_table, table
    from spatialvlm.data.summary import source_summary

    count = min(MIXTURE_DRAWS, max(loader.mixture.length, 1))
    draws = loader.mixture.draws(0, count)
    shares = loader.shares(draws, loader.lengths.lookup(draws))
    rows = []
    for number in chosen:
        s = source_summary(loader.lengths, loader.mixture, number)
        left_out = [f"{reason} {count}" for reason, count in s["rejected"].items()]
        notes = [f"{name.replace('_', ' ')} {count}" for name, count in s["notes"].items()]
        rows.append([
            s["source"], s["family"], s["format"], s["rows"], s["drawn_rows"], s["measured"], s["tokens"]["p50"], s["tokens"]["max"],
            s["label_tokens"]["p50"], ", ".join(left_out) or "none", ", ".join(notes) or "none",
        ])  # fmt: skip
    head = (
        "source", "family", "format", "rows", "drawn from", "measured", "tokens p50", "tokens max", "labels p50", "left out", "notes",
    )  # fmt: skip
    page.add("<h2>Sources</h2>" + table(head, rows))
    units = {
        unit: getattr(shares, unit) for unit in ("samples", "tokens", "label_tokens", "patches")
    }
    page.add(
        f"<h2>Mixture of the first {count:,} samples</h2>"
        + shares_figure(units)
        + shares_table(units)
    )
    for text in loader.mixture.warnings:
        page.add(f"<p class=note>{escape(text)}</p>")


def add_packs(page: Any, loader: Any, num_packs: int) -> None:
    """Packs of the first step."""
    from spatialvlm.data.page import pack_bar

    plan = next(loader.plans()).plan
    page.add(
        "<h2>Packs of the first step</h2><p class=note>Full colour: a shared prefix or a single sample; lighter: questions "
        "that branch from the prefix to their left. Hover for details.</p>"
    )
    shown = 0
    for micro, packs in enumerate(plan.packs):
        for rank, pack in enumerate(packs):
            if shown == num_packs:
                return
            encoder = loader.lengths.encoder
            prepared = [encoder.prepare(draw, pixels=False) for draw in pack.draws]
            page.add(f"<h3>micro-step {micro}, rank {rank}</h3>")
            page.add(pack_bar(pack, [p.encoded for p in prepared], [p.uid for p in prepared]))
            shown += 1


def add_source(page: Any, loader: Any, number: int, num: int) -> None:
    """Histograms, samples and rejects of one source."""
    import numpy as np

    from spatialvlm.data.page import histogram_figure, legend, sample_card, table
    from spatialvlm.data.prepare import load_pixels

    encoder = loader.lengths.encoder
    index = encoder.indices[number]
    records = loader.lengths.records[number]
    known = records[records["tokens"] > 0]
    page.add(f"<h2>{escape(index.source.name)}</h2>")
    if len(known) < len(records):
        page.add(f"<p class=note>Sizes of the {len(known):,} rows measured so far.</p>")
    page.add("<div class=grid>")
    for title, column in HISTOGRAMS.items():
        page.add(histogram_figure(f"{title} per sample", known[column]))
    page.add("</div>")
    rows = np.flatnonzero(loader.lengths.usable(number))
    page.add(f"<h3>{min(num, len(rows))} of {len(rows):,} samples, evenly spaced</h3>{legend()}")
    for row in rows[np.linspace(0, len(rows) - 1, min(num, len(rows)), dtype=int)].tolist():
        sample, fitted = encoder.fitted(number, row)
        store = encoder.media[number].store
        try:
            pixels = load_pixels(sample, fitted.media, store, encoder.layout, encoder.draw_marks)
        except DataError as error:
            page.add(table(["uid", "reason", "message"], [[sample.uid, error.reason, error]]))
            continue
        file = index.source.files[int(index.column("file")[row])]
        where = f"{file}, row {int(index.column('row')[row])}"
        page.add(sample_card(page, sample, fitted.encoded, pixels, encoder.template, where))
    rejects = index_rejects(index) + [
        [index.uid(row), "measured", loader.lengths.message(number, row)]
        for row in np.flatnonzero(loader.lengths.reasons[number])[:REJECTS_SHOWN].tolist()
    ]
    if rejects:
        page.add("<h3>Left out</h3>" + table(["uid", "reason", "message"], rejects))


def index_rejects(index: Any) -> list[list[str]]:
    """First rows that were rejected while indexing."""
    path = index.folder / "rejected.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()[:REJECTS_SHOWN]
    return [[row["uid"], row["reason"], row["message"]] for row in map(json.loads, lines)]


if __name__ == "__main__":
    sys.exit(run_command(main))
