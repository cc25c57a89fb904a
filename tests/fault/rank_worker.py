"""Hung ranks, a broken sample and signals to one rank of two forked processes; writes ``ranks.json``.

python tests/fault/rank_worker.py OUT
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SIGNALS = {
    "term": "loop.data@3:1:SIGTERM",
    "usr1": "loop.data@3:0:SIGUSR1",
    "term_in_save": "save.write@4:1:SIGTERM",
}
"""A signal at a step border or inside a save, on one rank."""


def main() -> int:
    """Run all cases."""
    out = Path(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    import deepspeed  # noqa: F401
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401

    import spatialvlm.training.finish  # noqa: F401

    spec = importlib.util.spec_from_file_location(
        "kill_harness", ROOT / "benchmarks" / "kill_harness.py"
    )
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    config = harness.write_inputs(out)
    bench = harness.Bench(out / "runs", config, "zero2", 2)
    found: dict[str, object] = {"straight": bench.run(bench.straight)[0]}

    text = config.read_text().replace(
        "stage: 1", "stage: 1\nparallel: {timeout_s: 6.0, first_step_timeout_s: 60.0}"
    )
    impatient = out / "impatient.yaml"
    impatient.write_text(text)
    hung = harness.Bench(out / "runs", impatient, "zero2", 2)
    for late in (0, 1):  # rank 0 also keeps the heartbeats
        run_dir = out / "runs" / f"hung{late}"
        codes, seconds = hung.run(run_dir, fault=f"loop.data@3:{late}:stop")
        dump = run_dir / f"hang-rank{1 - late}.txt"
        found[f"hung{late}"] = [codes, seconds, dump.read_text() if dump.is_file() else ""]

    broken = harness.write_inputs(out / "broken")
    text = broken.read_text().replace("{name: squares,", "{name: squares, max_bad_fraction: 0.0,")
    broken.write_text(text)
    for number in range(0, 16, 4):
        image = out / "broken" / "rows" / f"{number:03d}.png"
        image.write_bytes(image.read_bytes()[:150])
    strict = harness.Bench(out / "runs", broken, "zero2", 2)
    codes, _ = strict.run(out / "runs" / "strict")
    found["broken"] = [codes, (out / "runs" / "strict.log").read_text()[-2000:]]

    for name, fault in SIGNALS.items():
        run_dir = out / "runs" / name
        codes, _ = bench.run(run_dir, fault=fault)
        record = json.loads((run_dir / "run.json").read_text())
        folders = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        again, _ = bench.run(run_dir)
        same = again == [0, 0] and bench.result(run_dir) == bench.result(bench.straight)
        found[name] = [codes, record["state"], record["step"], record["reason"], folders, same]
    (out / "ranks.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
