"""Two gloo processes: weights are whole inside the pause, and training goes on as if there had been none."""

import datetime as dt
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from spatialvlm.training.distributed import Processes
from tests.unit.training.engine_worker import engine_for, run_steps


class Failure(Exception):  # noqa: N818
    pass


def main():
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    rank = dist.get_rank()
    processes = Processes(rank, 2, torch.device("cpu"), 60.0, dist.new_group(backend="gloo"))
    result = {}
    for strategy in ("zero2", "zero3", "fsdp2"):
        plain = engine_for(strategy, processes)
        expected = [run_steps(plain, processes, n, n + 2)[0] for n in (0, 2, 4)]
        engine = engine_for(strategy, processes)
        found = [run_steps(engine, processes, 0, 2)[0]]
        shapes = {
            name: list(p.shape) for name, p in engine_for("ddp", processes).model.named_parameters()
        }
        with engine.whole_weights(), torch.no_grad():
            parameters = dict(engine.model.named_parameters())
            whole = {name: list(p.shape) for name, p in parameters.items()} == shapes
            sums = [float(p.double().sum()) for p in parameters.values()]
            if rank == 0:  # one rank reads the weights more often than the other
                for module in engine.model.modules():
                    if isinstance(module, torch.nn.Linear):
                        module(torch.zeros(1, module.in_features))
        found.append(run_steps(engine, processes, 2, 4)[0])
        try:
            with engine.whole_weights():
                raise Failure
        except Failure:
            pass
        found.append(run_steps(engine, processes, 4, 6)[0])
        result[strategy] = {
            "whole": all(processes.gather(whole)),
            "equal": len({tuple(s) for s in processes.gather(sums)}) == 1,
            "same": found == expected,
        }
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
