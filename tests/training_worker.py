"""A training run in a process of its own, for tests that kill it or start two of it: prints one line of JSON.

python training_worker.py '{"out": …, "config": {…}, "pause": 0.05, "uneven": true}'
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

import torch
import torch.nn.functional as F

from llmcourse.model import GPT, GPTConfig
from llmcourse.training import TrainConfig, causal_lm_loss, train


def model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=32, d_model=32, n_layers=2, n_heads=2, context=32, dropout=dropout))


class Rows(torch.utils.data.Dataset):
    """Rows of tokens with noise that a model can partly learn."""

    def __init__(self, n: int = 64, length: int = 17):
        g = torch.Generator().manual_seed(1)
        start = torch.randint(0, 32, (n, 1), generator=g)
        self.rows = (start + torch.arange(length) * 3 + torch.randint(0, 2, (n, length), generator=g)) % 32

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.rows[i]


def uneven_loss(model, batch):
    """Only targets below a limit that depends on the row count: micro-batches have very different target counts."""
    targets = batch[:, 1:].flatten()
    losses = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), targets, reduction="none")
    keep = (torch.arange(1, batch.shape[1]) <= 1 + batch[:, :1] % 16).flatten()
    return losses[keep]


def partial_loss(model, batch):
    """Only embedding and head: the blocks get no gradient."""
    logits = model.head(model.embed(batch[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


def digest(model: torch.nn.Module) -> str:
    state = model.state_dict()
    return hashlib.sha256(b"".join(state[k].detach().contiguous().numpy().tobytes() for k in sorted(state))).hexdigest()


def dying(loss_fn, step: int, note: str):
    """The second process kills itself in this step, once: the note is there when it has been started again."""
    import os
    import signal
    from pathlib import Path

    calls = iter(range(1, step))

    def loss(model, batch):
        if os.environ["RANK"] == "1" and not Path(note).exists() and next(calls, None) is None:
            Path(note).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(model, batch)

    return loss


def shard_by_hand() -> None:
    """accelerate shards on GPUs only; this does on CPUs what its FSDP2 does.

    Blocks, then the rest, then the optimizer's references.
    """
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from llmcourse import training

    class Sharding(Accelerator):
        def prepare(self, module, optimizer):
            old = {id(p): name for name, p in module.named_parameters()}
            mesh = init_device_mesh("cpu", (self.num_processes,))
            for block in module.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
            new = dict(module.named_parameters())
            for group in optimizer.param_groups:
                group["params"] = [new[old[id(p)]] for p in group["params"]]
            return module, super().prepare(optimizer)

    training.accelerator = lambda cfg, rt: Sharding(cpu=True)


def main(job: dict) -> dict:
    torch.set_num_threads(1)
    if job.get("shard"):
        shard_by_hand()
    net = model(job.get("dropout", 0.0))
    loss_fn = uneven_loss if job.get("uneven") else partial_loss if job.get("partial") else causal_lm_loss
    if job.get("pause"):
        inner = loss_fn

        def loss_fn(model, batch):  # slow enough to be killed in the middle
            time.sleep(job["pause"])
            return inner(model, batch)

    if job.get("dies_at"):
        loss_fn = dying(loss_fn, job["dies_at"], job["weights"] + ".note")
    data = Rows()
    result = train(
        net,
        (data, data if job["config"].get("eval_every") else None),
        TrainConfig(**job["config"]),
        loss_fn=loss_fn,
        out=job.get("out"),
    )
    if job.get("shard"):
        from llmcourse.checkpoints import joined_weights

        whole = joined_weights(net)  # the run has put its shards away; all processes join their pieces
        net = model()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(whole[name])
    found = {
        "digest": digest(net),
        "losses": result.losses,
        "val": result.val,
        "resumed": result.resumed,
        "world_size": result.world_size,
    }
    if job.get("weights"):
        import os

        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(net.state_dict(), job["weights"])
    return found


if __name__ == "__main__":
    found = main(json.loads(sys.argv[1]))
    import os

    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(found), flush=True)
