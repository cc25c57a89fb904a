"""Prompts for generation: the same tokens as in training, up to the answer.

A group is one media prefix with several questions. Positions, placeholders and pixels come from the same
code as training batches, so a model is asked exactly as it was taught.
"""

from __future__ import annotations

from collections.abc import Sequence

from spatialvlm.data.collate import Prepared, collate
from spatialvlm.data.encode import encode_prompt
from spatialvlm.data.hooks import DrawMarks
from spatialvlm.data.media.plan import MediaPolicy
from spatialvlm.data.media.store import MediaStore
from spatialvlm.data.prefix import common_prefix
from spatialvlm.data.prepare import load_pixels, plan_sample_media
from spatialvlm.data.sample import Sample
from spatialvlm.data.template import ChatTemplate
from spatialvlm.errors import DataError
from spatialvlm.sequence.layout import TokenLayout
from spatialvlm.typing import Batch, ModalityFlags


def encode_prompt_group(
    samples: Sequence[Sample],
    store: MediaStore,
    policy: MediaPolicy,
    template: ChatTemplate,
    layout: TokenLayout,
    *,
    draw_marks: DrawMarks | None = None,
    max_length: int | None = None,
) -> Batch:
    """Prompts about the same media as one pack: a prefix and one branch per prompt.

    A trailing assistant turn of a sample (the reference answer) is left out. One prompt alone, or prompts
    without media, become root segments.

    Args:
        samples: Samples with equal media, marks and text up to the last medium.
        store: Access to their media.
        policy: Size and sampling rules.
        template: Of the checkpoint.
        layout: Of the run.
        draw_marks: Hook for rows with marks.
        max_length: Longest prompt; ``None`` = any.

    Raises:
        DataError: The prompts cannot share a prefix, or one is too long.
        MediaError: A medium cannot be read.
    """
    first = samples[0]
    infos = plan_sample_media(first, store, policy, layout)
    pixels = load_pixels(first, infos, store, layout, draw_marks)
    prepared = []
    for sample in samples:
        if sample.media != first.media or sample.marks != first.marks:
            raise DataError(
                f"{sample.uid} and {first.uid} have different media; put them into separate groups"
            )
        encoded = encode_prompt(sample, infos, template, layout)
        if max_length is not None and len(encoded.input_ids) > max_length:
            raise DataError(
                f"the prompt of {sample.uid} has {len(encoded.input_ids)} tokens, more than {max_length}; lower the "
                "number of frames or pixels, or raise the limit",
                reason="overlong",
            )
        prepared.append(Prepared(sample.uid, encoded, pixels, sample.weight))
    together = tuple(range(len(prepared)))
    if len(prepared) > 1 and first.media and not common_prefix([p.encoded for p in prepared]):
        raise DataError(
            f"the prompts of {first.uid} and {samples[1].uid} differ before the end of their media; put them into "
            "separate groups"
        )
    kinds = {ref.kind for ref in first.media}
    flags = ModalityFlags(
        image="image" in kinds,
        video="video" in kinds,
        geometry=any(m.group >= 0 for m in pixels),
        boundary=True,
    )
    groups = [together] if first.media else [(i,) for i in together]
    return collate(
        prepared,
        groups,
        flags=flags,
        position_rows=layout.num_position_rows,
        pad_id=template.pad_id,
    )
