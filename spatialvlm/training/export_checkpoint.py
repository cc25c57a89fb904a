"""A model directory from the checkpoint of an unfinished run, without its processes."""

from __future__ import annotations

from pathlib import Path

import torch

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.errors import CheckpointError
from spatialvlm.models.build import build_model
from spatialvlm.training.base import check_base, same_base
from spatialvlm.training.build import build_groups, load_dtype
from spatialvlm.training.checkpoint_files import SliceReader, verify
from spatialvlm.training.export import full_state, write_model


def export_checkpoint(checkpoint: Path, target: Path, *, trust_remote_code: bool = False) -> Path:
    """Write what ``final/`` of a run would hold if it had ended at this checkpoint; one process, on the CPU.

    Args:
        checkpoint: ``step-*`` folder of a run, of any strategy and number of processes. The weights it started from
            must still be where ``model.init_from`` says.
        target: New directory.
        trust_remote_code: Let the initial weights' own Python files run, as the run was allowed to.

    Returns:
        The directory.

    Raises:
        CheckpointError: The checkpoint is damaged, its initial weights are gone or changed, or ``target`` cannot be written.
    """
    verify(checkpoint)
    if target.exists():
        raise CheckpointError(f"{target} exists; choose a new directory")
    config = load_config(checkpoint / "config.resolved.yaml", [], TrainConfig)
    base, lineage = check_base(config, trust_remote_code=trust_remote_code)
    same_base(config, lineage, checkpoint)
    model = build_model(
        base,
        config.geometry,
        attention="auto",
        dtype=load_dtype(config),
        device=torch.device("cpu"),
        trust_remote_code=trust_remote_code,
    )
    build_groups(config, model)
    loaded = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    write_model(config, base, model, full_state(model, SliceReader(checkpoint), loaded), target)
    return target
