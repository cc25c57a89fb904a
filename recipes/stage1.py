r"""Stage 1 (SSR-2D): fine-tune a vision-language model on spatial data, without the geometry branch.

    accelerate launch --config_file configs/accelerate/cpu1.yaml  recipes/stage1.py configs/tiny/stage1_qwen3vl.yaml
    accelerate launch --config_file configs/accelerate/zero2.yaml recipes/stage1.py \
        configs/stage1/qwen2_5vl_7b_ssr2d.yaml run.dir=runs/stage1
    python recipes/stage1.py CONFIG --dry-run        # groups, data, memory; needs neither weights nor a GPU

Features and their keys:
- decoupled learning rates (``optim.*_lr``, null freezes a part); low-rank adapters (``lora``)
- mixture of families, 1:1 by default (``data.families``); packs and shared prefixes (``packing``, ``shared_prefix``)
- DDP, DeepSpeed ZeRO-1/2/3 by the launcher's file; FSDP2 with ``parallel.strategy=fsdp2``
- checkpoints (``checkpoint.every``); ``run.resume=auto`` continues the newest valid one, bit for bit on a CPU
- metrics.jsonl and report.html always; wandb and TensorBoard with ``log.*``

Exit codes: 0 finished or saved after a signal, 2 configuration, 3 data, 4 non-finite gradients, 5 hang, 1 any other
failure; ``run.json`` says which. See docs/training.md.
"""

import sys
from functools import partial

from spatialvlm.config import TrainConfig
from spatialvlm.training.entry import Arguments, run_recipe


def main(config: TrainConfig, arguments: Arguments) -> None:
    """Train stage 1 from a validated configuration."""
    # Imported here, so that a wrong recipe is answered before torch is loaded.
    from spatialvlm.evaluation.build import build_probe, together
    from spatialvlm.models.build import build_layout
    from spatialvlm.models.generation import generate
    from spatialvlm.synthesis.formats import DIALECT_OF, FormatExpander
    from spatialvlm.synthesis.marks import draw_marks
    from spatialvlm.training import build
    from spatialvlm.training.distributed import leave, start_processes
    from spatialvlm.training.finish import close_run
    from spatialvlm.training.loop import train
    from spatialvlm.training.run import open_run
    from spatialvlm.training.session import build_session
    from spatialvlm.training.state import seed_everything

    processes = start_processes(
        timeout_s=config.parallel.timeout_s, expected=config.parallel.world_size
    )
    run = open_run(config, arguments, processes)
    if run.done:
        return leave(processes)
    seed_everything(config.run.seed, rank=processes.rank)

    layout = build_layout(run.base, config.geometry)
    model, groups, cost = build.build_trainable(config, run)
    engine = build.build_engine(config, model, groups, processes)
    state, guard = run.resume(engine)

    load = build.build_load(config, run, layout, cost, draw_marks)
    # Only training rows change their wording; held-out questions and benchmarks are asked as written.
    expand = FormatExpander(DIALECT_OF[layout.family], marked=config.data.marked_formats)
    loader = load(config, expand_format=expand, state=state.loader or None)
    probe = build_probe(
        config,
        run.path,
        run.base,
        layout,
        model,
        generate,
        processes,
        restore=partial(build.training_mode, model),
        draw_marks=draw_marks,
    )
    evaluate = together(build.build_held_out(config, load, model, processes), probe)
    session = build_session(config, run, state, guard, loader, engine, cost)
    outcome = train(
        session.run,
        state,
        engine,
        session.steps,
        record=session.record,
        save=session.save,
        guard=guard,
        stop=session.stop,
        watch=session.watch,
        eval_fn=build.forgiving(evaluate, run),
    )
    close_run(config, run, state, engine, session, outcome)
    return leave(processes)


def describe(config: TrainConfig) -> None:
    """Print groups, data, and memory of the recipe."""
    from spatialvlm.training.dry_run import dry_run

    dry_run(config)


if __name__ == "__main__":
    sys.exit(run_recipe(main, describe, stage=1, doc=__doc__))
