"""Join geometry features with visual tokens: SSR (arXiv 2603.00409) eq. 2-4 and its alternatives.

``pre_projector`` adds in the width of the vision tower, ``post_projector`` in the width of the language
model. ``interleaved`` and ``sequential`` make extra (spatial) tokens and leave the visual ones alone;
``in_place`` changes the visual tokens themselves::

                     extra tokens                    visual tokens become
    pre_projector    projector_3d(v + trans(s))      projector(v + trans(s))
    post_projector   projector(v) + post(s)          projector(v) + post(s)
"""

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvlm.errors import AlignmentError, ConfigError, GeometryError
from spatialvlm.models.geometry.align import (
    TEMPORAL_MERGES,
    TemporalMerge,
    frame_slots,
    frames_of_media,
    merge_time,
    resample,
    to_merge_units,
)
from spatialvlm.models.geometry.base import GeometryFeatures
from spatialvlm.models.geometry.blocks import linear
from spatialvlm.sequence.positions import Insertion
from spatialvlm.sequence.sizes import Size

Fusion = Literal["pre_projector", "post_projector"]
POST_HIDDEN = 4096  # hidden width of the post-projector MLP unless told otherwise
Grid = tuple[int, int, int]


class FusionOutput(NamedTuple):
    """What the branch adds to one forward.

    Attributes:
        spatial_tokens: Rows for ``token_kind`` 3 and 4, in sequence order; none with ``in_place``.
        visual_tokens: Rows for ``token_kind`` 1 and 2; changed only by ``in_place``.
        norm_ratio: Sum of ``|s'| / |v|`` over fused rows, and their number; float32, detached.
        anchor: Zero that depends on every module of the branch. Add it to the embeddings: then the
            graph has the same modules on every rank, whatever media a rank holds.
    """

    spatial_tokens: Float[Tensor, "M D"]
    visual_tokens: Float[Tensor, "N D"]
    norm_ratio: Float[Tensor, " 2"]
    anchor: Float[Tensor, ""]


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 whatever the dtype of input, weights or autocast."""

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Normalise; the result is float32."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class FeatureMlp(nn.Module):
    """Norm per frame and layer, merge over time (and over a merge unit), two linear layers.

    Args:
        feature_dim: Channels of one layer's features.
        num_layers: Feature layers; each has its own norm, channels are concatenated.
        slots: Frames that remain side by side after the temporal merge.
        patches: Patches that make one output row: 1, or a whole merge unit.
        hidden: Width between the linear layers.
        out: Width of the output.
        mode: Temporal merge.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        num_layers: int,
        slots: int,
        patches: int,
        hidden: int,
        out: int,
        mode: TemporalMerge,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.mode: TemporalMerge = mode
        self.norm = nn.ModuleList(
            Float32LayerNorm(feature_dim, eps=1e-5, device=device, dtype=dtype)
            for _ in range(num_layers)
        )
        width = patches * slots * num_layers * feature_dim
        self.fc1 = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, device=device, dtype=dtype)

    def forward(self, layers: Sequence[Float[Tensor, "N tau C"]]) -> Float[Tensor, "R D"]:
        """Features of all patches in merge-unit order, one tensor per layer."""
        normed = [norm(x) for norm, x in zip(self.norm, layers, strict=True)]
        merged = merge_time(torch.cat(normed, dim=-1), self.mode)  # [N, slots * layers * C]
        hidden = linear(self.fc1, merged.reshape(-1, self.fc1.in_features))
        return linear(self.fc2, F.gelu(hidden))


class GeometryFusion(nn.Module):
    """The trainable part of the geometry branch.

    Args:
        projector: The backbone's vision projector, complete (not partitioned). It is copied for
            ``projector_3d`` where one exists, and never kept.
        flatten_units: Whether the projector takes a merge unit as one row (InternVL) or as
            consecutive rows (Qwen).
        vision_dim: Width of the vision tower in front of its projector.
        text_dim: Width of the language model.
        feature_dim: Channels of one layer of geometry features.
        num_layers: Layers of geometry features.
        tau: Frames per temporal unit.
        merge_size: Patches per token along each side.
        fusion: ``pre_projector`` or ``post_projector``.
        insertion: ``interleaved``, ``sequential`` or ``in_place``.
        temporal_merge: ``concat``, ``mean`` or ``first``.
        hidden: Hidden width of the MLPs; ``None`` = ``vision_dim`` (4096 for ``post_projector``).
        camera_token: Make one token per unit from the encoder's camera token.
        init: ``warm`` starts with spatial tokens equal to their visual twins; ``scratch`` starts
            from random weights, as in the paper.
        detach_vit: Stop the gradient of spatial tokens in front of the vision tower.

    Raises:
        ConfigError: An unknown choice, or a combination without meaning.
        GeometryError: The projector is partitioned, so that a copy would be empty.
    """

    def __init__(
        self,
        projector: nn.Module,
        *,
        flatten_units: bool,
        vision_dim: int,
        text_dim: int,
        feature_dim: int,
        num_layers: int = 1,
        tau: int = 2,
        merge_size: int = 2,
        fusion: Fusion = "pre_projector",
        insertion: Insertion = "interleaved",
        temporal_merge: TemporalMerge = "concat",
        hidden: int | None = None,
        camera_token: bool = False,
        init: Literal["warm", "scratch"] = "warm",
        detach_vit: bool = False,
    ) -> None:
        super().__init__()
        for name, value, valid in (
            ("fusion", fusion, ("pre_projector", "post_projector")),
            ("insertion", insertion, ("interleaved", "sequential", "in_place")),
            ("temporal_merge", temporal_merge, TEMPORAL_MERGES),
            ("init", init, ("warm", "scratch")),
        ):
            if value not in valid:
                raise ConfigError(f"geometry.{name}={value!r} is not one of: {', '.join(valid)}")
        if camera_token and insertion == "in_place":
            raise ConfigError(
                "geometry.camera_token=true has no place with geometry.insertion=in_place; "
                "use interleaved or sequential"
            )
        weight = next(projector.parameters())
        if weight.numel() == 0:
            raise GeometryError(
                "the vision projector is partitioned (0 elements on this rank); build the fusion "
                "modules before sharding, or under deepspeed.zero.GatheredParameters"
            )
        self.flatten_units = flatten_units
        self.tau, self.merge_size = tau, merge_size
        self.vision_dim, self.feature_dim, self.num_layers = vision_dim, feature_dim, num_layers
        self.insertion: Insertion = insertion
        self.detach_vit = detach_vit

        def mlp(layers: int, patches: int, width: int, out: int) -> FeatureMlp:
            return FeatureMlp(
                feature_dim=feature_dim,
                num_layers=layers,
                slots=tau if temporal_merge == "concat" else 1,
                patches=patches,
                hidden=hidden or width,
                out=out,
                mode=temporal_merge,
                device=weight.device,
                dtype=weight.dtype,
            )

        pre = fusion == "pre_projector"
        self.trans = mlp(num_layers, 1, vision_dim, vision_dim) if pre else None
        self.post = None if pre else mlp(num_layers, merge_size**2, POST_HIDDEN, text_dim)
        self.camera = mlp(1, 1, vision_dim, text_dim) if camera_token else None
        extra = insertion != "in_place"
        self.projector_3d = copy.deepcopy(projector).requires_grad_() if pre and extra else None
        self.initialise(init)

    @torch.no_grad()
    def initialise(self, init: Literal["warm", "scratch"]) -> None:
        """Set the starting weights; never call it on a resumed model.

        Args:
            init: ``warm`` keeps the copy of the projector and zeroes the last linear layer of every
                MLP; ``scratch`` draws all linear weights from N(0, 0.02).
        """
        for module in self.modules():
            in_copy = self.projector_3d is not None and any(
                module is part for part in self.projector_3d.modules()
            )
            if in_copy and init == "warm":
                continue
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and not list(module.children()):  # LayerNorm, RMSNorm
                for name, parameter in module.named_parameters():
                    nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
        if init == "warm":
            for mlp in (self.trans, self.post, self.camera):
                if mlp is not None:
                    nn.init.zeros_(mlp.fc2.weight)
                    nn.init.zeros_(mlp.fc2.bias)

    def forward(
        self,
        vision: Float[Tensor, "P V"],
        visual_tokens: Float[Tensor, "N D"],
        features: Sequence[GeometryFeatures],
        media_grid: Sequence[Grid],
        media_group: Sequence[int],
        projector: nn.Module,
        media_content: Sequence[Size | None] | None = None,
    ) -> FusionOutput:
        """Fuse all media of one forward in one call of every MLP.

        Args:
            vision: States of the vision tower in front of its projector, merge-unit order, all
                media. At least one merge unit, also without geometry.
            visual_tokens: The projector's output for ``vision``.
            features: One entry per geometry group.
            media_grid: ``(T, gh, gw)`` of every medium, in sequence order; plain integers.
            media_group: Geometry group of every medium, -1 = none.
            projector: The backbone's vision projector.
            media_content: Rows and columns, from the top left, of every medium's features that hold
                image content and no padding; ``None`` = all.

        Returns:
            Tokens and the anchor of the graph. Without geometry the modules run on the first merge
            unit with zero features, and only the anchor depends on them.

        Raises:
            AlignmentError: Features, grids and visual states do not fit together.
        """
        patches = [units * rows * cols for units, rows, cols in media_grid]
        if not features:
            return self._dummy(vision, visual_tokens, projector)
        if sum(patches) != len(vision):
            raise AlignmentError(
                f"media of grids {list(media_grid)} have {sum(patches)} patches, the vision tower "
                f"returned {len(vision)}"
            )
        layers, camera = self._gather(features, media_grid, media_group, media_content)
        chosen = [group >= 0 for group in media_group]
        unit = self.merge_size**2
        vision_g = _select(vision, patches, chosen)
        tokens_g = _select(visual_tokens, [count // unit for count in patches], chosen)
        fused, ratio = self._fuse(vision_g, tokens_g, layers, projector)
        anchor = fused.new_zeros((), dtype=torch.float32)
        if self.insertion == "in_place":
            # When every medium has geometry, nothing else keeps the 2D tokens in the graph.
            anchor = 0.0 * visual_tokens[:1].float().sum()
            rows = _replace(visual_tokens, fused, [count // unit for count in patches], chosen)
            return FusionOutput(fused[:0], rows, ratio, anchor)
        grids = [grid for grid, keep in zip(media_grid, chosen, strict=True) if keep]
        groups = [group for group in media_group if group >= 0]
        return FusionOutput(
            self._arrange(fused, camera, grids, groups), visual_tokens, ratio, anchor
        )

    def _fuse(
        self,
        vision: Float[Tensor, "P V"],
        visual_tokens: Float[Tensor, "N D"],
        layers: Sequence[Float[Tensor, "P tau C"]],
        projector: nn.Module,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, " 2"]]:
        """Tokens of media with geometry, and the sums of the norm ratio."""
        if self.trans is not None:
            base = vision.detach() if self.detach_vit else vision
            added = self.trans(layers).to(base.dtype)
            fused = base + added
            if self.flatten_units:
                fused = fused.reshape(len(fused) // self.merge_size**2, -1)
            head = projector if self.projector_3d is None else self.projector_3d
            return head(fused), _norm_ratio(added, base)
        assert self.post is not None
        base = visual_tokens.detach() if self.detach_vit else visual_tokens
        added = self.post(layers).to(base.dtype)
        return base + added, _norm_ratio(added, base)

    def _dummy(self, vision: Tensor, visual_tokens: Tensor, projector: nn.Module) -> FusionOutput:
        """Run every module on the first merge unit of real states with zero features."""
        none = visual_tokens[:0]
        zero = torch.zeros((), device=vision.device)
        ratio = torch.zeros(2, device=vision.device)
        if not torch.is_grad_enabled():
            return FusionOutput(none, visual_tokens, ratio, zero)
        unit = self.merge_size**2
        if len(vision) < unit:
            raise AlignmentError(
                f"a forward without geometry needs {unit} states of a dummy image, got {len(vision)}"
            )
        zeros = vision.new_zeros(unit, self.tau, self.feature_dim)
        fused, _ = self._fuse(
            vision[:unit], visual_tokens[:1], [zeros] * self.num_layers, projector
        )
        total = fused.float().sum()
        if self.camera is not None:
            total = total + self.camera([zeros[:1]]).float().sum()
        return FusionOutput(none, visual_tokens, ratio, 0.0 * total)

    def _gather(
        self,
        features: Sequence[GeometryFeatures],
        media_grid: Sequence[Grid],
        media_group: Sequence[int],
        media_content: Sequence[Size | None] | None,
    ) -> tuple[list[Float[Tensor, "P tau C"]], Float[Tensor, "T tau C"] | None]:
        """Features of all media with geometry in merge-unit order, per layer, and camera rows."""
        frames = frames_of_media([f.grid[0] for f in features], media_grid, media_group, self.tau)
        per_layer: list[list[Tensor]] = [[] for _ in range(self.num_layers)]
        camera: list[Tensor] = []
        contents = [None] * len(frames) if media_content is None else media_content
        for grid, group, own, content in zip(
            media_grid, media_group, frames, contents, strict=True
        ):
            if own is None:
                continue
            feature = features[group]
            if len(feature.layers) != self.num_layers:
                raise AlignmentError(
                    f"the encoder returned layers {sorted(feature.layers)}, the fusion was built for "
                    f"{self.num_layers}"
                )
            for layer, parts in zip(sorted(feature.layers), per_layer, strict=True):
                resampled = resample(
                    feature.layers[layer][own], grid[1:], content
                )  # [S, gh, gw, C]
                slots = frame_slots(resampled, self.tau)  # [T, tau, gh, gw, C]
                parts.append(to_merge_units(slots.movedim(1, 3), self.merge_size))
            if self.camera is not None:
                if feature.special is None:
                    raise AlignmentError(
                        "geometry.camera_token=true, but the encoder returned no special tokens; "
                        "call it with return_special=True"
                    )
                camera.append(frame_slots(feature.special[own, 0], self.tau))
        return [torch.cat(parts) for parts in per_layer], torch.cat(camera) if camera else None

    def _arrange(
        self,
        tokens: Float[Tensor, "N D"],
        camera_rows: Float[Tensor, "T tau C"] | None,
        grids: Sequence[Grid],
        groups: Sequence[int],
    ) -> Float[Tensor, "M D"]:
        """Append camera tokens to their units and bring media into sequence order."""
        area = self.merge_size**2
        pieces = list(torch.split(tokens, [t * h * w // area for t, h, w in grids]))
        if self.camera is not None and camera_rows is not None:
            cameras = torch.split(self.camera([camera_rows]), [t for t, _, _ in grids])
            pieces = [
                torch.cat([piece.view(len(cam), -1, piece.shape[-1]), cam[:, None]], 1).flatten(
                    0, 1
                )
                for piece, cam in zip(pieces, cameras, strict=True)
            ]
        if self.insertion == "sequential":  # a group's tokens stand behind its last medium
            last = {group: index for index, group in enumerate(groups)}
            order = sorted(range(len(pieces)), key=lambda index: (last[groups[index]], index))
            pieces = [pieces[index] for index in order]
        return torch.cat(pieces)


def _select(rows: Tensor, counts: Sequence[int], chosen: Sequence[bool]) -> Tensor:
    """Rows of the chosen media; ``counts`` rows per medium."""
    if all(chosen):
        return rows
    parts = torch.split(rows, list(counts))
    return torch.cat([part for part, keep in zip(parts, chosen, strict=True) if keep])


def _replace(rows: Tensor, new: Tensor, counts: Sequence[int], chosen: Sequence[bool]) -> Tensor:
    """``rows`` with those of the chosen media replaced by ``new``."""
    if all(chosen):
        return new.to(rows.dtype)
    parts = list(torch.split(rows, list(counts)))
    sizes = [count for count, keep in zip(counts, chosen, strict=True) if keep]
    replacements = iter(torch.split(new.to(rows.dtype), sizes))
    return torch.cat(
        [next(replacements) if keep else part for part, keep in zip(parts, chosen, strict=True)]
    )


@torch.no_grad()
def _norm_ratio(added: Float[Tensor, "N D"], base: Float[Tensor, "N D"]) -> Float[Tensor, " 2"]:
    """Sum of ``|added| / |base|`` over rows, and the number of rows."""
    ratio = added.float().norm(dim=-1) / base.float().norm(dim=-1).clamp_min(1e-12)
    return torch.stack([ratio.sum(), torch.full_like(ratio[0], len(ratio))])
