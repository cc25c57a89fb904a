"""The model under test: a checkpoint with everything that generation needs, loaded once.

The recipe, the audits and the lmms-eval adapter use this; nothing here is imported by scorers and reports.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialvlm.errors import OutOfMemoryError
from spatialvlm.evaluation.prompts import Messages

if TYPE_CHECKING:
    import torch

    from spatialvlm.data.hooks import DrawMarks
    from spatialvlm.evaluation.model_generator import PackGenerator


class Subject:
    """A model directory, plain, with a geometry branch, or adapters on the base they name.

    Args:
        name: Directory or hub id.
        device: Where the model runs.
        dtype: ``bf16`` or ``fp32`` weights and compute.
        revision: Hub revision.
        geometry_source: Encoder weights; ``None`` = as recorded in the directory.
        allow_encoder_mismatch: Accept another encoder than the one used in training.
        max_pixels: Largest picture after resizing; ``None`` = the checkpoint's.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        device: "torch.device | str" = "cpu",
        dtype: Literal["bf16", "fp32"] = "fp32",
        revision: str | None = None,
        geometry_source: str | None = None,
        allow_encoder_mismatch: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        import torch

        from spatialvlm.config.geometry import GeometryConfig
        from spatialvlm.data.media.plan import MediaPolicy
        from spatialvlm.data.template import ChatTemplate, load_processor
        from spatialvlm.models.build import build_layout, build_model
        from spatialvlm.models.directory import find_folder, saved_geometry
        from spatialvlm.models.lora import merge_saved

        folder, adapters = _base_of(find_folder(name, revision))
        # Adapters of a stage-2 run lie beside the fusion that was trained with them.
        branch = adapters if adapters is not None and saved_geometry(adapters) else folder
        saved = saved_geometry(branch)
        geometry = GeometryConfig.model_validate(saved["geometry"]) if saved else None
        if geometry is not None:
            changes: dict[str, Any] = {"allow_encoder_mismatch": allow_encoder_mismatch}
            if geometry_source:
                changes["source"] = geometry_source
            geometry = geometry.model_copy(update=changes)
        self.weights = adapters or folder
        self.geometry = geometry.default_flag if geometry is not None else "auto"
        self.layout = build_layout(folder, geometry)
        self.template = ChatTemplate.from_checkpoint(folder)
        self.policy = MediaPolicy.from_processor(load_processor(folder)).with_budget(
            max_pixels=max_pixels, temporal=self.layout.tau
        )
        weights = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.model = build_model(folder, geometry, dtype=weights, device=device)
        if adapters is not None:
            merge_saved(self.model, adapters)
        self.model.eval()

    def complete(self, packs: list[Any], max_new_tokens: int) -> list[list[list[int]]]:
        """Greedy completions of prompt packs.

        Raises:
            OutOfMemoryError: The device's memory is exhausted.
        """
        import torch

        from spatialvlm.models.generation import generate

        try:
            return generate(self.model, packs, max_new_tokens)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{error}; lower evaluation.batch_size or set it to auto"
            ) from None

    def generator(
        self,
        root: Path,
        *,
        frames: int = 32,
        frame_policy: str = "linspace",
        draw_marks: "DrawMarks | None" = None,
        scratch: Path | None = None,
    ) -> "PackGenerator":
        """A generator over media below ``root``."""
        from spatialvlm.evaluation.model_generator import PackGenerator

        return PackGenerator(
            self.complete,
            self.template,
            self.layout,
            self.policy,
            root=root,
            frames=frames,
            frame_policy=frame_policy,
            geometry=self.geometry,
            draw_marks=draw_marks,
            scratch=scratch,
        )

    # ------------------------------------------------------------------------------- reading text, for the audit

    def letters(self, messages: Messages, letters: Sequence[str]) -> Mapping[str, float]:
        """Log-probability of each letter as the first token of the answer to a text-only prompt."""
        import torch

        from spatialvlm.models.device import to_device

        pack = to_device(self.generator(Path()).prepare([messages]), self.model.device)
        with torch.no_grad():
            hidden, _ = self.model.hidden_states(pack)
            logs = self.model.backbone.lm_head(hidden[0, -1]).float().log_softmax(-1)
        return {x: float(logs[int(self.template.encode(x)[0])]) for x in letters}

    def number(self, messages: Messages) -> str:
        """At most ten generated tokens."""
        from spatialvlm.evaluation.generate import GenConfig

        generator = self.generator(Path())
        return generator.generate([generator.prepare([messages])], GenConfig(10))[0][0].text


def _base_of(folder: Path) -> tuple[Path, Path | None]:
    """Model directory, and the adapters on top of it if ``folder`` holds only adapters."""
    from spatialvlm.models.directory import find_folder

    description = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not description.is_file():
        return folder, None
    base = json.loads(description.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return find_folder(base), folder
