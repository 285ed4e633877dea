"""Train with FSDP2, save, load, continue: `torchrun --nproc-per-node 2 examples/fsdp2.py [folder]`.

Runs on CPUs over gloo and on GPUs over NCCL, with any number of processes.
"""

import os
import sys
import tempfile

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_adam import FusedAdamW, param_groups

device = "cuda" if torch.cuda.is_available() else "cpu"


def build(mesh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).to(
        device, torch.bfloat16
    )
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard: parameters are DTensors then, and so is the state, 6 bytes per parameter
    # next to the weights.
    groups = param_groups(model, weight_decay=0.1)
    return model, FusedAdamW(groups, lr=1e-2, precision="split32-bf16", max_grad_norm=1.0)


def train(model, optimizer, first, last):
    rank = distributed.get_rank()
    for step in range(first, last):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * step + rank)).to(
            device, torch.bfloat16
        )
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()  # one norm over all shards, one update of this rank's
        if rank == 0 and step % 5 == 4:
            norm = optimizer.grad_norm.item()
            print(f"step {step + 1}: loss {loss.item():.4f}, gradient norm {norm:.4f}")


def main(folder):
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    model, optimizer = build(mesh)
    train(model, optimizer, 0, 10)
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    model, optimizer = build(mesh)  # or with another number of processes
    # To see state where there is none, get_state_dict takes a step without gradients, and leaves it
    # counted.
    optimizer.init_state()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, 10, 20)


if __name__ == "__main__":
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()
    folder = [
        sys.argv[1]
        if len(sys.argv) > 1
        else tempfile.mkdtemp()
        if distributed.get_rank() == 0
        else None
    ]
    distributed.broadcast_object_list(folder)
    main(folder[0])
    distributed.destroy_process_group()
