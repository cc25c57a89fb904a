"""Which parameter belongs to which part of the model, by object identity.

Substrings of names are never consulted: the deepest module that a backbone lists owns a parameter, adapters own
themselves, and a shared tensor (tied head) counts once, in ``embeddings``.
"""

from __future__ import annotations

from torch import nn

from spatialvlm.errors import ConfigError
from spatialvlm.models.lora import adapter_tensors
from spatialvlm.models.spatial_vlm import SpatialVLM

PARTS = ("language_model", "vision_encoder", "projector", "geometry_fusion", "embeddings", "lora")


def split_parts(model: SpatialVLM) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """All parameters of a model by part, in model order. Call it before sharding.

    Args:
        model: With or without adapters (LoRA, DoRA).

    Returns:
        Part -> (name, parameter); parts without parameters are left out. Adapter tensors are in ``lora``.

    Raises:
        ConfigError: A parameter is in no part.
    """
    owner: dict[int, str] = {}
    listed = [(part, module) for part, modules in model.parts().items() for module in modules]
    depth = {id(module): name.count(".") for name, module in model.named_modules()}
    for part, module in sorted(
        listed, key=lambda item: depth[id(item[1])]
    ):  # deeper modules overwrite
        owner.update({id(parameter): part for parameter in module.parameters()})
    owner.update({id(parameter): "embeddings" for parameter in embedding_parameters(model)})
    owner.update({id(parameter): "lora" for parameter in adapter_tensors(model).values()})

    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owner:
            raise ConfigError(
                f"parameter {name} belongs to no part; list its module in the backbone adapter's parts()"
            )
        parts[owner[id(parameter)]].append((name, parameter))
    return {part: members for part, members in parts.items() if members}


def embedding_parameters(model: SpatialVLM) -> list[nn.Parameter]:
    """Input embedding table and output head; one tensor when tied."""
    return [
        parameter for module in model.parts()["embeddings"] for parameter in module.parameters()
    ]


def freeze_modules(model: nn.Module) -> None:
    """Put modules without trainable parameters into eval mode; call it after each ``model.train()``."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
