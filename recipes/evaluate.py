r"""Answer benchmarks with a checkpoint and score the answers.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/evaluate.py configs/eval/demo.yaml \
        model.init_from=runs/demo/stage2/final run.dir=runs/demo/eval_stage2
    accelerate launch recipes/evaluate.py configs/eval/vsi_bench.yaml model.init_from=runs/stage2/final
    python recipes/evaluate.py configs/eval/vsi_bench.yaml evaluation.score_only=true   # no model, no torch

- any number of processes: questions about the same media stay together, every process writes its own file
- killed runs continue (``run.resume=auto``), also with another number of processes; nothing is asked twice
- the media of several questions are encoded once (``evaluation.shared_prefix``); decoding is greedy
- ``evaluation.media=drop`` is the blind baseline, ``blank`` and ``shuffle`` are its stricter variants

Run folder: ``<benchmark>/{predictions.jsonl, manifest.json, result.json, per_item.csv, report.html}``, and
``summary.csv``, ``report.html``, ``run.json``, ``config.resolved.yaml``, ``environment.json`` beside them; every page has
its charts as PNG and CSV in ``report_plots/``.

Exit codes: 0 everything scored, 2 configuration, 3 data, 130 interrupted, 1 any other failure. See docs/evaluation.md.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from spatialvlm.config.evaluation import EvalConfig
from spatialvlm.config.load import dump_yaml, load_config
from spatialvlm.errors import USER_ERRORS, ConfigError, DataError, EvaluationError
from spatialvlm.evaluation.build import open_benchmarks
from spatialvlm.evaluation.predictions import read_manifest, read_predictions
from spatialvlm.evaluation.report import text_table, write_report
from spatialvlm.evaluation.schema import Benchmark
from spatialvlm.evaluation.scoring import Result, score, write_result


def score_folder(
    config: EvalConfig, benchmark: Benchmark, folder: Path, *, partial: bool
) -> Result:
    """Score ``predictions.jsonl`` and write the benchmark's results."""
    section = config.evaluation
    predictions, _ = read_predictions(folder / "predictions.jsonl")
    result = score(
        benchmark,
        predictions,
        section.protocol,
        section.unparsed,
        section.seed,
        allow_partial=partial,
        strip_think=section.strip_think,
        manifest=read_manifest(folder),
    )
    write_result(result, folder)
    write_report([folder], folder / "report.html")
    print(result.line(), flush=True)
    return result


class Asker:
    """The checkpoint under test, and who else is asking."""

    def __init__(self, config: EvalConfig) -> None:
        from spatialvlm.evaluation.subject import Subject
        from spatialvlm.training.distributed import start_processes

        assert config.model is not None
        self.config = config
        self.processes = start_processes(timeout_s=3600)
        self.subject = Subject(
            config.model.init_from,
            device=self.processes.device,
            dtype=config.evaluation.dtype,
            revision=config.model.revision,
            geometry_source=config.model.geometry_source,
            allow_encoder_mismatch=config.model.allow_encoder_mismatch,
            max_pixels=config.evaluation.max_pixels,
        )

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over all weight files: an index stays the same when a model is trained again in its place."""
        from spatialvlm.evaluation.reading import sha256_of

        files = sorted(p for p in self.subject.weights.glob("*.safetensors") if p.is_file())
        listed = "".join(f"{path.name} {sha256_of(path)}\n" for path in files)
        return hashlib.sha256(listed.encode()).hexdigest()

    def manifest(self, benchmark: Benchmark) -> dict[str, Any]:
        """How the answers are made; a resumed run must agree with it."""
        from spatialvlm import __version__
        from spatialvlm.training.state import git_revision

        section, model = self.config.evaluation, self.config.model
        assert model is not None
        return {
            "benchmark": benchmark.spec.name,
            "data_file": str(benchmark.path),
            "media_root": str(benchmark.media_root),
            "data_sha256": benchmark.sha256,
            "protocol": section.protocol,
            "media": section.media,
            "frames": section.frames,
            "frame_policy": section.frame_policy,
            "max_pixels": section.max_pixels,
            "decoding": {
                "do_sample": False,
                "max_new_tokens": section.max_new_tokens or benchmark.spec.max_new_tokens,
            },
            "limit": section.limit,
            "limit_seed": section.limit_seed,
            "checkpoint": str(model.init_from),
            "checkpoint_sha256": self.weights_sha256,
            "revision": model.revision,
            "geometry_source": model.geometry_source,
            "template": self.subject.template.fingerprint,
            "dtype": section.dtype,
            "batch_size": section.batch_size,
            "seed": section.seed,
            "world_size": self.processes.size,
            "package_version": __version__,
            "git_commit": git_revision(Path(__file__).resolve().parents[1])["commit"],
        }

    def ask(self, benchmark: Benchmark, folder: Path) -> None:
        """Answer one benchmark into its folder."""
        from spatialvlm.evaluation.asks import limited, make_asks
        from spatialvlm.evaluation.generate import Place, answer, check_manifest, merge
        from spatialvlm.synthesis.marks import draw_marks

        section, processes = self.config.evaluation, self.processes
        overwrite = self.config.run.overwrite or self.config.run.resume == "none"
        processes.on_main(
            lambda: check_manifest(folder, self.manifest(benchmark), overwrite=overwrite)
        )
        items = limited(benchmark.items, section.limit, section.limit_seed)
        asks = make_asks(
            benchmark,
            items,
            protocol=section.protocol,
            media=section.media,
            seed=section.seed,
            allow_absolute=section.allow_absolute_media,
        )
        generator = self.subject.generator(
            benchmark.media_root,
            frames=section.frames,
            frame_policy=section.frame_policy,
            draw_marks=draw_marks,
            scratch=folder / "blank",
        )
        answer(
            benchmark,
            asks,
            generator,
            folder,
            protocol=section.protocol,
            place=Place(processes.rank, processes.size),
            max_new_tokens=section.max_new_tokens,
            batch_size=8 if section.batch_size == "auto" else section.batch_size,
            adapt_batch=section.batch_size == "auto",
            shared_prefix=section.shared_prefix,
            num_workers=section.num_workers,
            prefetch=section.prefetch,
            max_failures=section.max_failures,
            quiet=section.quiet,
        )
        processes.barrier()
        processes.on_main(lambda: str(merge(folder, asks, max_failures=section.max_failures)))


def write_state(folder: Path, state: str, reason: str = "") -> None:
    """``run.json``: what became of the run."""
    text = json.dumps({"kind": "evaluation", "state": state, "reason": reason})
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")


def write_environment(
    folder: Path, config: EvalConfig, asker: Asker, recipe: str, overrides: Sequence[str]
) -> None:
    """``environment.json``: versions and machines; called by all processes."""
    from spatialvlm.training.state import environment

    hosts = set(asker.processes.gather(socket.gethostname()))
    if asker.processes.is_main:
        facts = environment(
            world_size=asker.processes.size,
            hosts=len(hosts),
            seed=config.evaluation.seed,
            recipe=recipe,
            overrides=overrides,
        )
        text = json.dumps(facts, indent=1) + "\n"
        (folder / "environment.json").write_text(text, encoding="utf-8")


def main(config: EvalConfig, recipe: str, overrides: Sequence[str]) -> int:
    """Generate (unless ``score_only``), score, report; returns the exit code."""
    section = config.evaluation
    benchmarks = {found.spec.name: found for found in open_benchmarks(section)}
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    asker = None if section.score_only else Asker(config)
    main_process = asker is None or asker.processes.is_main
    if main_process:
        write_state(folder, "running")
        (folder / "config.resolved.yaml").write_text(dump_yaml(config), encoding="utf-8")
    if asker is not None:
        write_environment(folder, config, asker, recipe, overrides)
    failed: list[str] = []
    for name, benchmark in benchmarks.items():
        if main_process:  # scores of an earlier run are not those of a benchmark that fails now
            (folder / name / "result.json").unlink(missing_ok=True)
        try:
            if asker is not None:
                asker.ask(benchmark, folder / name)
            if main_process:
                score_folder(config, benchmark, folder / name, partial=section.limit is not None)
        except (DataError, EvaluationError) as error:
            if len(benchmarks) == 1 or (asker is not None and asker.processes.size > 1):
                raise
            failed.append(f"{name}: {error}")
            print(f"{type(error).__name__}: {failed[-1]}", file=sys.stderr)
    if main_process and len(failed) < len(benchmarks):
        found = write_report([folder], folder / "report.html")
        (folder / "report.csv").replace(folder / "summary.csv")
        print(text_table(found), flush=True)
    if main_process:
        write_state(folder, "failed" if failed else "done", "; ".join(failed))
    if asker is not None:
        from spatialvlm.training.distributed import leave

        leave(asker.processes)
    return 1 if failed else 0


def run(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    arguments = parser.parse_args(argv)
    folder: Path | None = None
    try:
        config = load_config(arguments.config, arguments.overrides, EvalConfig)
        folder = Path(config.run.dir)
        return main(config, str(arguments.config), arguments.overrides)
    except USER_ERRORS as error:
        unnamed = isinstance(error, OSError) and error.filename is None  # a write to an open file
        where = f" in run.dir={folder}" if unnamed else ""
        print(f"{type(error).__name__}: {error}{where}", file=sys.stderr)
        note_end(folder, "failed", f"{type(error).__name__}: {error}")
        return 2 if isinstance(error, ConfigError) else 3 if isinstance(error, DataError) else 1
    except KeyboardInterrupt:
        note_end(folder, "stopped", "interrupted; the same command continues")
        return 130


def note_end(folder: Path | None, state: str, reason: str) -> None:
    """Say in ``run.json`` why a run that had begun did not finish."""
    begun = folder is not None and (folder / "run.json").is_file()
    if begun and folder is not None and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # a full disk may be why
            write_state(folder, state, reason)


if __name__ == "__main__":
    sys.exit(run())
