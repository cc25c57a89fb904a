"""The data path of a recipe without its weights, for tools that look before a run."""

from __future__ import annotations

from collections.abc import Callable

from spatialvlm.config import TrainConfig
from spatialvlm.data.build import build_data
from spatialvlm.data.hooks import DrawMarks, ExpandFormat
from spatialvlm.data.loader import StepLoader
from spatialvlm.data.sample import World
from spatialvlm.models.build import build_layout, build_meta_model
from spatialvlm.models.directory import find_folder
from spatialvlm.training.build import SceneLists, build_cost, build_groups


def preview_loader(
    config: TrainConfig,
    world: World,
    *,
    expand_format: Callable[[str], ExpandFormat],
    draw_marks: DrawMarks | None = None,
    workers: int = 1,
    verify_files: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> StepLoader:
    """Index, measure and order the sources of a recipe; costs follow from the model's shapes.

    Args:
        config: The recipe.
        world: Rank and number of ranks of the plan.
        expand_format: Family -> hook that realises instruction formats.
        draw_marks: Hook that draws marks; needed to load pixels.
        workers: Processes that index and measure.
        verify_files: Compare the data files whole with those that were indexed.
        report: Called with one line of text per stage of the work.

    Raises:
        ConfigError: The recipe and its files do not fit together.
        DataError: Rows are blocked, broken beyond the budget, or too long.
    """
    folder = find_folder(config.model.init_from)
    model = build_meta_model(folder / "config.json", config.geometry, config.lora)
    build_groups(config, model)
    blocked = SceneLists(config.data.decontamination.lists)
    layout = build_layout(folder, config.geometry)
    return build_data(
        config,
        folder,
        layout,
        build_cost(config, model).balance,
        world,
        blocked=blocked,
        blocked_key=blocked.key,
        draw_marks=draw_marks,
        expand_format=expand_format(layout.family),
        workers=workers,
        verify_files=verify_files,
        report=report,
    )
