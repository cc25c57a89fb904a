"""The model that trains: a backbone, optionally with the geometry branch, from a pack to its loss.

    frames ─→ vision encoder ─→ visual tokens ────────────────┐
       └────→ geometry encoder (frozen) ─→ fusion ─→ spatial tokens ─→ language model ─→ supervised rows ─→ loss

The order of the forward is the same for every family, fusion and insertion mode; what differs between families is
in :mod:`spatialvlm.models.backbones`, what differs between modes in :mod:`spatialvlm.models.geometry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spatialvlm.errors import AlignmentError
from spatialvlm.models.attention import VISION_ATTENTION, Tree
from spatialvlm.models.backbones import Backbone, VisionOutput
from spatialvlm.models.backbones.base import Part
from spatialvlm.models.branch import GeometryBranch
from spatialvlm.models.geometry.fusion import FusionOutput, GeometryFusion
from spatialvlm.models.head import HeadOutput, SupervisedHead
from spatialvlm.sequence.pixels import prepare
from spatialvlm.typing import KIND_CAMERA, KIND_IMAGE, KIND_SPATIAL, KIND_VIDEO, Batch, LossOutput


class Embedded(NamedTuple):
    """A pack in front of the language model.

    Attributes:
        embeds: ``[1, T, D]``; visual positions hold their placeholder's embedding.
        visual: bool ``[1, T]``.
        visual_tokens: ``[N, D]``, in the order of the visual positions.
        deepstack: Per layer ``[N, D]``.
        norm_ratio: Sum and count ``[2]`` of the fusion.
    """

    embeds: Tensor
    visual: Tensor
    visual_tokens: Tensor
    deepstack: list[Tensor]
    norm_ratio: Tensor


class SpatialVLM(nn.Module):
    """A vision-language model that reads packs.

    Args:
        adapter: Backbone of one family; its model becomes the submodule ``backbone``.
        fusion: Trainable part of the geometry branch; ``None`` = 2D (SSR-2D).
        geometry: The rest of the branch, with the frozen encoder; not a module.
        head_rows: Supervised rows whose logits are held at once.
        source: Directory the model came from; its tokenizer and processor files are copied when saving.

    Attributes:
        backbone: The ``transformers`` model, in its own names and layout.
    """

    def __init__(
        self,
        adapter: Backbone,
        *,
        fusion: GeometryFusion | None = None,
        geometry: GeometryBranch | None = None,
        head_rows: int = 1024,
        source: Path | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.backbone: Any = adapter.model
        self.backbone.lm_head = SupervisedHead(adapter.model.lm_head, head_rows)
        self.fusion = fusion
        self.geometry = geometry
        self.source = source

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        attention: str = "auto",
        vision_attention: str = VISION_ATTENTION,
        geometry: Mapping[str, Any] | Literal["saved"] | None = "saved",
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        head_rows: int = 1024,
        linear_patches: bool = True,
        trust_remote_code: bool = False,
    ) -> SpatialVLM:
        """Load a Hugging Face directory, or one of ours with a geometry branch.

        Args:
            name: Directory or hub id.
            attention: ``auto``, or one of :data:`~spatialvlm.models.attention.TREE_ATTENTION`.
            vision_attention: Attention of the vision encoder, a name ``transformers`` knows.
            geometry: ``saved``: as the directory says; ``None``: 2D; a geometry section as plain values: create the
                branch, or, if the directory has one, check that they agree.
            revision: Hub revision.
            dtype: Of the weights.
            device: Where the model and the encoder go.
            head_rows: Supervised rows whose logits are held at once.
            linear_patches: Compute patch convolutions as matrix products.
            trust_remote_code: Run the model class that the directory brings along, instead of the library's.

        Raises:
            CheckpointError: No such model, or broken files.
            ConfigError: An unsupported model type, or a geometry section that does not fit the directory.
            FingerprintError: Another encoder than the one the branch was trained with.
        """
        from spatialvlm.models import directory

        return directory.load(
            name,
            attention=attention,
            vision_attention=vision_attention,
            geometry=geometry,
            revision=revision,
            dtype=dtype,
            device=device,
            head_rows=head_rows,
            linear_patches=linear_patches,
            trust_remote_code=trust_remote_code,
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write a directory that ``transformers`` loads as the 2D model and :meth:`from_pretrained` as this one.

        Adapters are merged; :func:`~spatialvlm.models.lora.save_adapters` writes them alone.

        Args:
            folder: Created if needed.
            state_dict: Complete weights in this model's names, when an engine has sharded them.
            dtype: Stored dtype; ``None`` = as they are.
        """
        from spatialvlm.models import directory

        return directory.save(self, folder, state_dict=state_dict, dtype=dtype)

    def parts(self) -> dict[Part, list[nn.Module]]:
        """Modules of every part; the deepest listed module owns a parameter."""
        parts = self.adapter.parts()
        if self.fusion is not None:
            parts["geometry_fusion"] = [self.fusion]
        return parts

    @property
    def device(self) -> torch.device:
        """Device of the embedding table."""
        return self.adapter.embeddings.weight.device

    def forward(self, batch: Batch) -> LossOutput:
        """Loss of one pack.

        Args:
            batch: See :class:`~spatialvlm.typing.Batch`. Segments, shapes and grids may stay on the CPU.

        Returns:
            Numerators; the caller divides by the denominator of the step.

        Raises:
            AlignmentError: Visual or spatial positions and features differ in number.
            ValueError: Positions do not fit the sequence or the segments.
        """
        hidden, norm_ratio = self.hidden_states(batch)
        rows = hidden[0].index_select(0, batch["logit_index"])
        output: HeadOutput = self.backbone.lm_head(rows, batch["target_ids"])
        weight = batch["loss_weight"]
        weighted = weight * output.cross_entropy
        supervised = weight > 0
        num_samples = batch["source_index"].numel()
        zeros = torch.zeros(num_samples, device=weighted.device)
        return LossOutput(
            loss_sum=weighted.sum(),
            sample_loss=zeros.index_add(0, batch["sample_index"], weighted.detach()),
            sample_weight=zeros.index_add(0, batch["sample_index"], weight),
            sample_wrong=zeros.index_add(
                0, batch["sample_index"], (supervised & ~output.correct).float()
            ),
            num_correct=(output.correct & supervised).sum(),
            num_supervised=supervised.sum(),
            geometry_norm_ratio=norm_ratio,
        )

    def hidden_states(self, batch: Batch, cache: Any = None) -> tuple[Tensor, Tensor]:
        """Run everything up to the head.

        Args:
            batch: A pack.
            cache: A ``transformers`` cache that receives the keys and values of the pack (generation).

        Returns:
            Hidden states ``[1, T, D]`` after the final norm, and the norm ratio's sum and count ``[2]``.
        """
        tree = Tree.from_tensors(
            batch["segment_start"], batch["segment_len"], batch["segment_parent"]
        )
        check_positions(batch["position_ids"], tree, rows=4 if self.adapter.uses_mrope else 1)
        embedded = self.embed(batch)
        embeds = scatter(embedded.embeds, embedded.visual, embedded.visual_tokens, "visual", batch)
        hidden = self.adapter.read(
            embeds,
            batch["position_ids"],
            tree=tree,
            cache=cache,
            visual=embedded.visual,
            deepstack=embedded.deepstack,
        )
        return hidden, embedded.norm_ratio

    def embed(self, batch: Batch) -> Embedded:
        """Embeddings with spatial tokens in place; visual tokens still beside them.

        Raises:
            AlignmentError: Spatial positions and features differ in number.
        """
        kind = batch["token_kind"]
        visual = (kind == KIND_IMAGE) | (kind == KIND_VIDEO)
        spatial = (kind == KIND_SPATIAL) | (kind == KIND_CAMERA)
        # The row of the spatial placeholder is never used: it gets no gradient and need not exist.
        embeds: Tensor = self.adapter.embeddings(batch["input_ids"].masked_fill(spatial, 0))
        nothing = embeds.new_zeros(0, embeds.shape[-1])
        visual_tokens, spatial_tokens, deepstack = nothing, nothing, []
        norm_ratio = torch.zeros(2, device=embeds.device)
        has_media = "frames_u8" in batch and batch["frames_u8"].numel() > 0
        seen = self._see(batch) if has_media else self._see_dummy()
        if seen is not None:
            # Without media the same graph with no rows: ZeRO-3 hangs when one rank's order of gradients differs.
            rows = slice(None) if has_media else slice(0)
            visual_tokens, deepstack = seen.tokens[rows], [part[rows] for part in seen.deepstack]
            if self.fusion is not None:
                fused = self._fuse(batch, seen, has_media)
                spatial_tokens, norm_ratio = fused.spatial_tokens, fused.norm_ratio
                visual_tokens = fused.visual_tokens if has_media else visual_tokens
                embeds = embeds + fused.anchor.to(embeds.dtype)
        embeds = scatter(embeds, spatial, spatial_tokens, "spatial", batch)
        return Embedded(embeds, visual, visual_tokens, deepstack, norm_ratio)

    def _see(self, batch: Batch) -> VisionOutput:
        """The one vision pass of a forward."""
        shapes = [(s, h, w) for s, h, w in batch["frame_shapes"].tolist()]
        grids = batch["media_grid_thw"]
        dtype = self.adapter.embeddings.weight.dtype
        pixels = prepare(
            batch["frames_u8"], shapes, grids[:, 0].tolist(), self.adapter.pixels, dtype
        )
        return self.adapter.see(pixels, grids.to(pixels.device))

    def _see_dummy(self) -> VisionOutput | None:
        """The vision pass of a pack without media, needed while anything behind it trains.

        Data-parallel engines expect the same modules in every micro-step on every rank; with one rank text-only
        they crash, or finish with wrong gradients.
        """
        modules = [self.adapter.vision_encoder, *self.adapter.projectors]
        modules += [] if self.fusion is None else [self.fusion]
        if not torch.is_grad_enabled() or not any(
            p.requires_grad for m in modules for p in m.parameters()
        ):
            return None
        weight = self.adapter.embeddings.weight
        return self.adapter.see(*self.adapter.dummy_pixels(weight.device, weight.dtype))

    def _fuse(self, batch: Batch, seen: VisionOutput, has_media: bool) -> FusionOutput:
        """One call of the fusion modules on all geometry groups, or on a dummy."""
        assert self.fusion is not None
        assert self.geometry is not None
        output: FusionOutput = self.fusion(
            seen.patches,
            seen.tokens,
            self.geometry.features(batch) if has_media else [],
            [(t, h, w) for t, h, w in batch["media_grid_thw"].tolist()] if has_media else [],
            batch["media_group"].tolist() if has_media else [],
            self.adapter.projector,
            self.geometry.content(batch),
        )
        return output


def scatter(embeds: Tensor, where: Tensor, tokens: Tensor, name: str, batch: Batch) -> Tensor:
    """Put tokens at marked positions, in order.

    Args:
        embeds: ``[1, T, D]``.
        where: bool ``[1, T]`` with as many true values as ``tokens`` has rows.
        tokens: ``[N, D]``.
        name: Kind of token, for the message.
        batch: The pack, for the message.

    Raises:
        AlignmentError: The numbers differ.
    """
    positions = where[0].nonzero()[:, 0]
    if len(positions) != len(tokens):
        raise AlignmentError(
            f"pack of {', '.join(batch.get('uids', ['?'])[:8])}: {len(positions)} {name} positions in the sequence, "
            f"{len(tokens)} {name} tokens computed (grids {batch['media_grid_thw'].tolist() if 'media_grid_thw' in batch else []}); layout and media disagree"
        )
    return embeds.index_copy(1, positions, tokens.to(embeds.dtype).unsqueeze(0))


def check_positions(position_ids: Tensor, tree: Tree, rows: int) -> None:
    """Positions must belong to this pack: every root starts at 0, every branch continues its prefix.

    Raises:
        ValueError: Another shape, or row 0 does not follow the segments.
    """
    expected = (rows, 1, tree.total) if rows > 1 else (1, tree.total)
    if tuple(position_ids.shape) != expected:
        raise ValueError(
            f"position_ids have shape {tuple(position_ids.shape)}, this pack needs {expected}"
            + (
                ": row 0 counts the tokens of each sample, rows 1-3 are time, height, width"
                if rows > 1
                else ""
            )
        )
    counter = position_ids[0, 0] if rows > 1 else position_ids[0]
    first = counter[torch.tensor(tree.start, device=counter.device)].tolist()
    wanted = [0 if up < 0 else tree.length[up] for up in tree.parent]
    if first != wanted:
        raise ValueError(
            f"positions of the segments start at {first}, expected {wanted}: a root restarts at 0, a branch continues "
            "its prefix; was the pack collated with other segments?"
        )
