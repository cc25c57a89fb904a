"""Memory before the first byte is allocated: states per strategy, activations, head.

All formulas are plain arithmetic on a backbone's ``config.json``, so ``--dry-run`` needs neither weights nor a
GPU. States: Adam with fp32 master weights and moments (Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spatialvlm.errors import ConfigError

GEOMETRY_ENCODER_GB = 1.77
"""VGGT's first 23 aggregator pairs in bf16."""
GB = 1e9
VISION_BYTES = {"qwen2_5_vl": 30, "qwen3_vl": 22, "internvl": 20}
"""``Decoder.vision_bytes`` by ``model_type``: a fused query-key-value keeps its whole result (6) beside its rotated
parts; RMSNorm keeps fp32 copies (8)."""
Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a language model or of a vision encoder that decide activation memory."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 0
    qk_norm: bool = False
    gated: bool = True
    """SwiGLU MLP (three matrices) or a plain two-matrix MLP."""
    vision_bytes: int = 0
    """Bytes per patch and unit of ``hidden`` that a vision block saves beside its MLP; 0 = a language-model layer."""

    def activation_bytes(self) -> int:
        """Bytes one layer saves per token for its backward pass, bf16 with flash or SDPA attention.

        Counts with saved-tensor hooks differ by less than 0.2 % (left out: rotary tables, 256 to 640 bytes that all
        layers share).
        """
        d_kv = self.kv_heads * self.head_dim
        mlp = 8 * self.intermediate if self.gated else 4 * self.intermediate
        if self.vision_bytes:
            return mlp + self.vision_bytes * self.hidden + 4 * self.heads + 8
        saved = mlp + 20 * self.hidden + 4 * d_kv + 4 * self.heads + 264
        if self.qk_norm:
            saved += 6 * (self.heads + self.kv_heads) * self.head_dim + 4 * (
                self.heads + self.kv_heads
            )
        return saved

    def checkpoint_bytes(self) -> int:
        """Bytes per token and layer when only the layer's input is kept."""
        return 2 * self.hidden


def text_decoder(config: Mapping[str, Any]) -> Decoder:
    """Language model of a backbone ``config.json``."""
    text = config["text_config"]
    heads = text["num_attention_heads"]
    return Decoder(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab=text["vocab_size"],
        qk_norm=text.get("model_type", "").startswith("qwen3"),
    )


def vision_decoder(config: Mapping[str, Any]) -> Decoder:
    """Vision encoder of a backbone ``config.json``, per patch."""
    vision = config["vision_config"]
    heads = vision.get("num_heads") or vision["num_attention_heads"]
    return Decoder(
        layers=vision.get("depth") or vision["num_hidden_layers"],
        hidden=vision["hidden_size"],
        intermediate=vision["intermediate_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=vision["hidden_size"] // heads,
        gated=config["model_type"] == "qwen2_5_vl",
        vision_bytes=VISION_BYTES[config["model_type"]],
    )


def state_bytes(
    strategy: Strategy,
    *,
    trainable: int,
    frozen: int,
    world: int,
    bf16: bool = True,
    live: int = 0,
    bucket: int = 0,
) -> float:
    """Weights, gradients, masters and moments per device, in bytes.

    Args:
        strategy: How the model is spread.
        trainable: Trainable parameters.
        frozen: Frozen parameters, kept in the compute type.
        world: Devices.
        bf16: Compute in bf16 (else fp32).
        live: Bytes of gathered blocks under zero3 and fsdp2.
        bucket: Elements of a reduce bucket.
    """
    compute = 2 if bf16 else 4
    if strategy == "ddp":
        total = 16.0 * trainable + compute * frozen
    elif strategy == "zero1":
        total = 2 * compute * trainable + 12 * trainable / world + compute * frozen
    elif strategy == "zero2":
        total = compute * trainable + 16 * trainable / world + compute * frozen
    elif strategy == "zero3":
        total = (compute + 16) * trainable / world + compute * frozen / world + live
    else:
        total = 16 * trainable / world + compute * frozen / world + live
    return total + compute * bucket


def activation_bytes(
    text: Decoder,
    vision: Decoder,
    *,
    tokens: int,
    patches: int,
    head_rows: int,
    supervised: int,
    checkpoint_text: bool,
    checkpoint_vision: bool,
    vision_trains: bool,
) -> dict[str, float]:
    """Activations of one pack, by component, in bytes.

    Args:
        text: Language model.
        vision: Vision encoder.
        tokens: Language-model tokens of the pack.
        patches: Vision patches of the pack.
        head_rows: ``memory.head_rows``.
        supervised: Supervised positions of the pack.
        checkpoint_text: Recompute decoder layers.
        checkpoint_vision: Recompute vision blocks.
        vision_trains: Vision encoder or projector keep activations at all.
    """

    def stack(decoder: Decoder, count: int, recompute: bool) -> float:
        one = float(decoder.activation_bytes() * count)
        if recompute:
            return decoder.layers * decoder.checkpoint_bytes() * count + one
        return decoder.layers * one

    return {
        "language model": stack(text, tokens, checkpoint_text),
        "vision encoder": stack(vision, patches, checkpoint_vision) if vision_trains else 0.0,
        "head": 12.0 * min(supervised, head_rows) * text.vocab,
    }


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Estimate of one strategy and world size, in GB per device."""

    strategy: Strategy
    world: int
    states: float
    activations: float
    total: float
    largest: str
    fits: bool | None
    """``None`` without a known device."""


def memory_table(
    *,
    trainable: int,
    frozen: int,
    worlds: tuple[int, ...],
    activations: Mapping[str, float],
    largest_block: int,
    geometry: bool,
    bf16: bool,
    device_bytes: float | None,
    bucket: int = 200_000_000,
) -> list[MemoryRow]:
    """Rows for every strategy and world size.

    Args:
        trainable: Trainable parameters.
        frozen: Frozen parameters.
        worlds: Numbers of devices to print.
        activations: From :func:`activation_bytes`.
        largest_block: Parameters of the largest wrapped block (live under zero3, fsdp2).
        geometry: The frozen geometry encoder is resident too.
        bf16: Compute type.
        device_bytes: Memory of the device; 10 % are kept in reserve.
        bucket: Elements of a ZeRO reduce bucket.
    """
    active = sum(activations.values())
    encoder = GEOMETRY_ENCODER_GB * GB if geometry else 0.0
    rows = []
    for strategy in STRATEGIES:
        for world in worlds:
            states = state_bytes(
                strategy,
                trainable=trainable,
                frozen=frozen,
                world=world,
                bf16=bf16,
                live=2 * (2 if bf16 else 4) * largest_block,
                bucket=bucket if strategy.startswith("zero") and bf16 else 0,
            )
            total = states + active + encoder
            items = {"states": states, **activations, "geometry encoder": encoder}
            rows.append(
                MemoryRow(
                    strategy,
                    world,
                    states / GB,
                    active / GB,
                    total / GB,
                    max(items, key=lambda name: items[name]),
                    None if device_bytes is None else total <= 0.9 * device_bytes,
                )
            )
    return rows


def format_memory(rows: list[MemoryRow]) -> str:
    """The table as text."""
    lines = ["strategy  devices  states GB  activations GB  total GB  largest item         fits"]
    for row in rows:
        fits = {None: "?", True: "yes", False: "no"}[row.fits]
        lines.append(
            f"{row.strategy:8}  {row.world:7d}  {row.states:9.1f}  {row.activations:14.1f}  {row.total:8.1f}  "
            f"{row.largest:19}  {fits}"
        )
    return "\n".join(lines)


def require_fit(row: MemoryRow, *, strict: bool, device_gb: float) -> str | None:
    """Warning for a configuration that is not expected to fit.

    Raises:
        ConfigError: It does not fit and ``memory.strict`` is set.
    """
    if row.fits is not False:
        return None
    text = (
        f"{row.strategy} on {row.world} devices needs about {row.total:.1f} GB of {device_gb:.1f} GB per device "
        f"(largest: {row.largest}). Lower packing.max_tokens, turn on memory.checkpoint_language_model, or shard "
        "more (zero3, fsdp2, more devices)."
    )
    if strict:
        raise ConfigError(text)
    return text
