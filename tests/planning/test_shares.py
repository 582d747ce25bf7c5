"""What each of two FSDP2 processes holds, against the plan. Forked in a fresh interpreter, as tests/core/test_sharding.

The real weights are bytes of DTensors' local parts, their gradients' and AdamW's moments' after one step.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from draftcli.planning.shares import per_rank
from tests.tiny import batch, tiny_config, tiny_model

RANKS = 2
CASES = {
    "lora": {"peft": {"rank": 2}},
    "full": {"peft": {"peft_scheme": "none"}},
    "two copies": {"peft": {"peft_scheme": "none"}, "sharding": {"strategy": "fsdp", "shard_size": 1}},
}


def local_bytes(tensors) -> int:
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def one_rank(rank: int, folder: str, out: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=RANKS)
    found = {}
    for case, sections in CASES.items():
        model = tiny_model(Path(folder), 0.05, **sections)
        model.configure_sharded_model()
        weights = model.trainable_parameters
        optimizer = torch.optim.AdamW(weights)
        networks = [model.unet, *filter(None, [model.base_unet])]
        frozen = local_bytes(p for network in networks for p in network.parameters() if not p.requires_grad)
        model.get_loss_and_metrics(batch(4).split(2)[rank])
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        found[case] = {
            "trained": local_bytes(weights),
            "gradient": local_bytes(w.grad for w in weights),
            "moments": local_bytes(moments),
            "frozen": frozen,  # once it has run, the base's root stays gathered: that is counted in `gathered`
        }
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def held(tiny_sdxl, tmp_path_factory):
    """By rank and case."""
    out = tmp_path_factory.mktemp("shares")
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.test_shares", tiny_sdxl, out],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_what_the_plan_says(held, tiny_sdxl, case):
    planned = per_rank(tiny_config(tiny_sdxl, **CASES[case]), tiny_sdxl, (RANKS,))[RANKS]
    first, second = (held[rank][case] for rank in range(RANKS))
    assert first["trained"] == planned["trained"] > 0
    assert first["gradient"] == planned["trained"]
    assert first["moments"] == 2 * planned["trained"]
    assert first["frozen"] == planned["frozen"] > 0
    assert second["trained"] <= planned["trained"], "the first process has the largest part"


def test_sdxl_in_full_falls_as_one_over_the_ranks():
    from draftcli.config import load_config
    from draftcli.core.models.sdxl import SDXL_CONFIG

    shares = per_rank(load_config("sdxl-full"), SDXL_CONFIG, (1, 2, 4, 8, 16))
    assert shares[1]["trained"] == 4 * 2_567_463_684
    for ranks, share in shares.items():
        for part in ("trained", "frozen"):
            assert share[part] == pytest.approx(shares[1][part] / ranks, rel=0.01)
        assert share["whole"] == shares[1]["whole"]


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    start_processes(one_rank, args=tuple(sys.argv[1:3]), nprocs=RANKS, start_method="fork")
