"""The model under one of three wrappers behind one small interface: plain/DDP, DeepSpeed ZeRO, FSDP2.

An engine owns the wrapped model and the optimizer. The loop asks it for five things: run a micro-step, go
backward, norms per part, apply or skip the step, and its state as slices.

DeepSpeed internals that are touched, probed when the engine is built:

| attribute | stage | used for |
|---|---|---|
| ``bit16_groups``, ``single_partition_of_fp32_groups``, ``_hp_mapping`` | 1, 2 | slices |
| ``averaged_gradients``, ``params_in_partition``, ``get_grad_norm_direct`` | 1, 2 | norm per group |
| ``fp16_groups``, ``fp32_partitioned_groups_flat``, ``grad_position`` | 3 | slices |
| ``_get_norm_groups``, ``sub_group_to_group_id`` | 3 | norm per group |
| ``fp16_partitioned_groups_flat``, ``_unflatten_partitioned_parameters``, ``persistent_parameters`` | 3 | refresh after loading |
"""

# ruff: noqa: D102 - the methods are documented once, in Engine
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spatialvlm.errors import ConfigError
from spatialvlm.training.distributed import Processes, group_timeout
from spatialvlm.training.optim import Group
from spatialvlm.training.slices import (
    Slice,
    fsdp2_slices,
    replicated_slices,
    set_adam_step,
    zero3_slices,
    zero12_slices,
)
from spatialvlm.typing import Batch, LossOutput

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
"""Builds the optimizer over a (possibly sharded) model; parameters are looked up by name."""


class Engine(ABC):
    """A wrapped model and its optimizer."""

    strategy: Strategy
    model: nn.Module
    """The plain model inside the wrapper."""
    optimizer: torch.optim.Optimizer
    groups: Sequence[Group]

    @abstractmethod
    def __call__(self, batch: Batch) -> LossOutput:
        """Forward of one micro-batch through the wrapper."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of one forward and backward; gradients are reduced in the last one of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the wrapper averages them over ranks."""

    @abstractmethod
    def grad_norms(self, *, due: bool) -> dict[str, Tensor] | None:
        """Norm of every part and ``total``, before clipping; ZeRO answers only when ``due``."""

    @abstractmethod
    def step(self, norms: Mapping[str, Tensor] | None) -> bool:
        """Clip and apply the gradients, or skip when they are not finite; equal on all ranks."""

    @abstractmethod
    def slices(self, *, loading: bool) -> list[Slice]:
        """Views of this rank's fp32 weights and moments."""

    @abstractmethod
    def discard(self) -> None:
        """Forget accumulated gradients without a step."""

    def frozen(self, trained: Container[str]) -> dict[str, Tensor]:
        """Whole weights that are not in ``trained``, by name, on the CPU; a collective under zero3 and fsdp2."""
        return {
            name: self._whole(parameter)
            for name, parameter in self.model.named_parameters()
            if name not in trained
        }

    def whole_weights(self) -> AbstractContextManager[Any]:
        """Whole compute weights on every rank, for generation past the wrapper; entered and left by all ranks.

        Inside, forward passes need no other rank, so every rank may run as many as it likes.
        """
        return nullcontext()

    def _whole(self, parameter: Tensor) -> Tensor:
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return full.detach().cpu()

    def after_load(self, adam_step: int) -> None:
        """Make compute copies follow the masters that were just written."""
        set_adam_step(self.optimizer, adam_step)


def _total(norms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([n.float() for n in norms.values()]).square().sum().sqrt()


class _TorchEngine(Engine):
    """What plain, DDP and FSDP2 share: ordinary gradients and an ordinary optimizer."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        max_grad_norm: float,
    ) -> None:
        self.model = model
        self.groups = groups
        self.optimizer = optimizer
        self.processes = processes
        self.max_grad_norm = max_grad_norm
        self._checked = False

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def grad_norms(self, *, due: bool) -> dict[str, Tensor]:
        del due
        if not self._checked:
            self._every_parameter_has_a_gradient()
        grads: dict[str, list[Tensor]] = {}
        for group, live in zip(self.groups, self.optimizer.param_groups, strict=True):
            own = grads.setdefault(group.part, [])
            own += [p.grad for p in live["params"] if p.grad is not None]
        norms = {part: self._norm(tensors) for part, tensors in grads.items()}
        return {**norms, "total": _total(norms)}

    def _norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Norm over a part; on a CPU in float64, where fp32 sums of squares lose a digit in large tensors."""
        exact = torch.float64 if self.processes.device.type == "cpu" else None
        each = [torch.linalg.vector_norm(t, dtype=exact) for t in tensors]
        whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in each]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(whole)).float()
        return norm

    def step(self, norms: Mapping[str, Tensor] | None) -> bool:
        assert norms is not None
        total = norms["total"]
        applied = bool(torch.isfinite(total))
        if applied:
            scale = torch.clamp(self.max_grad_norm / (total + 1e-6), max=1.0)
            if float(scale) < 1.0:
                local = [
                    p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                    for live in self.optimizer.param_groups
                    for p in live["params"]
                    if p.grad is not None
                ]
                torch._foreach_mul_(local, float(scale))
            self.optimizer.step()
        self.discard()
        return applied

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _every_parameter_has_a_gradient(self) -> None:
        missing = [
            fqn
            for group, live in zip(self.groups, self.optimizer.param_groups, strict=True)
            for fqn, p in zip(group.fqns, live["params"], strict=True)
            if p.grad is None
        ]
        if missing:
            raise ConfigError(
                f"{len(missing)} trainable parameters received no gradient in the first step, e.g. {missing[:3]}. "
                "Freeze them, or use them in every forward (their graph must be equal on all ranks)."
            )
        self._checked = True


class Ddp(_TorchEngine):
    """One process, or DistributedDataParallel: fp32 weights everywhere, bf16 compute by autocast."""

    strategy: Strategy = "ddp"

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        make_optimizer: OptimizerFactory,
        processes: Processes,
        *,
        max_grad_norm: float,
        bf16: bool,
    ) -> None:
        super().__init__(model, groups, make_optimizer(model), processes, max_grad_norm)
        self.bf16 = bf16
        self.wrapped: nn.Module = model
        if processes.size > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(
                model,
                # No device_ids: they would move the tensors that the model reads on the host to the device again.
                gradient_as_bucket_view=True,
                forward_sync_buffers=False,
            )

    def __call__(self, batch: Batch) -> LossOutput:
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.bf16):
            out: LossOutput = self.wrapped(batch)
        return out

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        if last or self.wrapped is self.model:
            return nullcontext()
        return self.wrapped.no_sync()  # type: ignore[operator, no-any-return]

    def discard(self) -> None:
        # Gradients stay views of the reduction buckets; new ones would take 4 bytes per parameter beside them.
        self.optimizer.zero_grad(set_to_none=self.wrapped is self.model)

    def slices(self, *, loading: bool) -> list[Slice]:
        return replicated_slices(
            self.model,
            self.optimizer,
            self.groups,
            self.processes.rank,
            self.processes.size,
            loading=loading,
        )


class Fsdp2(_TorchEngine):
    """``fully_shard`` on every block and on the root; fp32 shards, bf16 all-gather, fp32 reduction.

    Gradients are reduced in every micro-step, as under ZeRO-2: kept back until the last one they would be whole on
    every rank, 4 bytes per parameter.
    """

    strategy: Strategy = "fsdp2"

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        make_optimizer: OptimizerFactory,
        processes: Processes,
        *,
        max_grad_norm: float,
        bf16: bool,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(processes.device.type, (processes.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        sharded = fully_shard(model, mesh=mesh, mp_policy=policy)
        assert isinstance(sharded, FSDPModule)
        self.sharded = sharded
        super().__init__(model, groups, make_optimizer(model), processes, max_grad_norm)

    def __call__(self, batch: Batch) -> LossOutput:
        out: LossOutput = self.model(batch)
        return out

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        del last
        return nullcontext()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        self.sharded.set_reshard_after_forward(False)
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
            # As fully_shard had it: the root keeps its weights between forward and backward.
            self.sharded.set_reshard_after_forward(True)
            self.sharded.set_reshard_after_forward(False, recurse=False)

    def slices(self, *, loading: bool) -> list[Slice]:
        del loading
        return fsdp2_slices(
            self.model, self.optimizer, self.groups, self.processes.rank, self.processes.size
        )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Decoder layers and vision blocks: the members of the outermost module lists that hold parameters."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        for block in module:
            inside.update(id(child) for child in block.modules())
            if any(True for _ in block.parameters()):
                found.append(block)
    return found


class Zero(Engine):
    """DeepSpeed ZeRO-1, -2 or -3; accumulation borders are set by the loop, never by DeepSpeed."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        make_optimizer: OptimizerFactory,
        processes: Processes,
        *,
        settings: Mapping[str, Any],
    ) -> None:
        import deepspeed

        self.stage = int(settings["zero_optimization"]["stage"])
        self.strategy = f"zero{self.stage}"  # type: ignore[assignment]
        self.model = model
        self.groups = groups
        self.processes = processes
        named = dict(model.named_parameters())
        self._fqn_of = {id(named[fqn]): fqn for group in groups for fqn in group.fqns}
        base = make_optimizer(model)
        with group_timeout(processes.timeout_s):
            engine, _, _, _ = deepspeed.initialize(
                model=model, optimizer=base, config=dict(settings), dist_init_required=False
            )
        self.engine = engine
        self.zero = engine.optimizer
        self.optimizer = self.zero.optimizer
        self._probe(deepspeed.__version__)

    def _probe(self, version: str) -> None:
        wanted = {
            3: "fp16_groups fp32_partitioned_groups_flat grad_position _get_norm_groups sub_group_to_group_id "
            "fp16_partitioned_groups_flat _unflatten_partitioned_parameters persistent_parameters",
        }.get(self.stage, "bit16_groups single_partition_of_fp32_groups averaged_gradients params_in_partition "
                          "get_grad_norm_direct")  # fmt: skip
        missing = [name for name in wanted.split() if not hasattr(self.zero, name)]
        if missing:
            raise ConfigError(
                f"deepspeed {version} lacks {missing} of {type(self.zero).__name__}, which checkpoints and norms "
                "need. Supported: 0.19. Remove data_types.grad_accum_dtype from a ZeRO-1 file if it is set."
            )
        masters = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        assert all(m.dtype == torch.float32 for m in masters), "master weights must be fp32"

    def __call__(self, batch: Batch) -> LossOutput:
        out: LossOutput = self.engine(batch)
        return out

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def grad_norms(self, *, due: bool) -> dict[str, Tensor] | None:
        if not due:
            return None
        squares: dict[str, Tensor] = {}
        if self.stage == 3:
            owners = self.zero.sub_group_to_group_id
            pairs = [(owners[i], norm) for i, norm in enumerate(self.zero._get_norm_groups())]
        else:
            pairs = [
                (i, self.zero.get_grad_norm_direct(self.zero.averaged_gradients[i], self.zero.params_in_partition[i]))
                for i in range(len(self.groups))
            ]  # fmt: skip
        for index, norm in pairs:
            part = self.groups[index].part
            # DeepSpeed reports a non-finite norm as -1.
            square = torch.where(norm < 0, torch.nan, norm.float().square())
            squares[part] = squares.get(part, torch.zeros_like(square)) + square
        norms = {part: value.sqrt() for part, value in squares.items()}
        return {**norms, "total": _total(norms)}

    def step(self, norms: Mapping[str, Tensor] | None) -> bool:
        del norms
        before = self.engine.skipped_steps
        self.engine.step()
        return bool(self.engine.skipped_steps == before)

    def discard(self) -> None:
        self.engine.zero_grad()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        whole = unwrap_model_for_generation(self.engine)
        whole.__enter__()
        try:
            yield
        finally:
            # DeepSpeed puts its hooks back only after a block that raised nothing.
            whole.__exit__(None, None, None)

    def slices(self, *, loading: bool) -> list[Slice]:
        del loading
        if self.stage == 3:
            return zero3_slices(self.zero, self._fqn_of, self.processes.rank)
        return zero12_slices(self.zero, self._fqn_of)

    def _whole(self, parameter: Tensor) -> Tensor:
        if self.stage < 3:
            return super()._whole(parameter)
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()

    @torch.no_grad()
    def after_load(self, adam_step: int) -> None:
        super().after_load(adam_step)
        if self.stage == 3:
            for index, master in enumerate(self.zero.fp32_partitioned_groups_flat):
                self.zero.fp16_partitioned_groups_flat[index].data.copy_(master.data)
                self.zero._unflatten_partitioned_parameters(index)
            persistent = self.zero.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
            return
        for index, master in enumerate(self.zero.single_partition_of_fp32_groups):
            parts = self.zero.parallel_partitioned_bit16_groups[index]
            parts[self.processes.rank].data.copy_(master.data)
            if self.processes.size > 1:
                torch.distributed.all_gather(list(parts), parts[self.processes.rank].clone())


def deepspeed_settings(
    json_file: Mapping[str, Any], *, bf16: bool, max_grad_norm: float, reduce_dtype: str
) -> dict[str, Any]:
    """The JSON of ``configs/deepspeed`` with the recipe's values written into its "auto" places.

    Raises:
        ConfigError: The JSON sets what the recipe decides, or something that is not supported.
    """
    recipe_key = {
        "train_micro_batch_size_per_gpu": "packing and step",
        "gradient_accumulation_steps": "step.global_batch_size",
        "gradient_clipping": "optim.max_grad_norm",
    }
    problems: list[str] = []
    for key, where in recipe_key.items():
        if json_file.get(key, "auto") != "auto":
            problems.append(
                f'{key}={json_file[key]}: write "auto"; the recipe decides with {where}'
            )
    if json_file.get("bf16", {}).get("enabled", "auto") != "auto":
        problems.append('bf16.enabled: write "auto"; the recipe decides with precision')
    for key, where in (
        ("optimizer", "optim"),
        ("scheduler", "schedule"),
        ("train_batch_size", "step.global_batch_size"),
        ("activation_checkpointing", "memory"),
    ):
        if key in json_file:
            problems.append(f"{key}: remove it; the recipe decides with {where}")
    if json_file.get("fp16"):
        problems.append("fp16: refused; use precision: bf16")
    zero = json_file.get("zero_optimization", {})
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        problems.append(f"zero_optimization.stage={stage!r} is not one of 1, 2, 3")
    problems += [f"zero_optimization.{key}: offload is refused" for key in zero if "offload" in key]
    if stage == 1 and json_file.get("data_types", {}).get("grad_accum_dtype"):
        problems.append(
            "data_types.grad_accum_dtype: remove it with stage 1, it silently selects another optimizer class"
        )
    if problems:
        raise ConfigError("The DeepSpeed JSON is not usable:\n  " + "\n  ".join(problems))
    settings = dict(json_file)
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = max_grad_norm
    # check_grad_overflow: bf16 steps with NaN or Inf are skipped like fp32 ones.
    settings["bf16"] = (
        {"enabled": bf16, "check_grad_overflow": True} if bf16 else {"enabled": False}
    )
    settings["communication_data_type"] = "bf16" if bf16 and reduce_dtype == "bf16" else "fp32"
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    return settings


def make_engine(
    strategy: Strategy,
    model: nn.Module,
    groups: Sequence[Group],
    make_optimizer: OptimizerFactory,
    processes: Processes,
    *,
    max_grad_norm: float,
    bf16: bool,
    deepspeed: Mapping[str, Any] | None = None,
) -> Engine:
    """Wrap ``model`` for training.

    Args:
        strategy: How the model is spread over ranks.
        model: The plain model on its device; parameters are fp32 unless frozen.
        groups: Planned optimizer groups.
        make_optimizer: Called once, after sharding under FSDP2 and before it otherwise.
        processes: Ranks and device.
        max_grad_norm: Clipping bound on the global norm.
        bf16: Compute in bfloat16.
        deepspeed: Complete DeepSpeed settings, required for ``zero*``.
    """
    if strategy == "ddp":
        return Ddp(model, groups, make_optimizer, processes, max_grad_norm=max_grad_norm, bf16=bf16)
    if strategy == "fsdp2":
        return Fsdp2(
            model, groups, make_optimizer, processes, max_grad_norm=max_grad_norm, bf16=bf16
        )
    assert deepspeed is not None
    return Zero(model, groups, make_optimizer, processes, settings=deepspeed)
