"""FSDP2 on two gloo processes: each with half of the batch, together the loss and gradient of one with all of it.

The processes are forked in a fresh interpreter (`python -m tests.core.test_sharding FOLDER OUT`), so that torch and
diffusers are imported once and no thread of pytest's is forked along.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes

from draftcli.config import ShardingConfig
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine import sharding
from draftcli.core.engine.sharding import make_mesh
from draftcli.core.models.loading import load_parts
from draftcli.errors import InputError
from tests.tiny import batch, tiny_config, tiny_model

RANKS = 2
CASES = {
    "lora": {},
    "lora after a base pass": {},
    "full": {"peft": {"peft_scheme": "none"}},
    "recomputed": {"sharding": {"activation_checkpointing": True}},
    "steps again, a smaller prefix": {"sharding": {"recompute_steps": True, "prefix_batch_size": 1}},
    "two copies": {"sharding": {"strategy": "fsdp", "shard_size": 1}, "peft": {"peft_scheme": "none"}},
    "bf16": {"model": {"precision": "bf16"}},
    "bf16 in full": {"model": {"precision": "bf16"}, "peft": {"peft_scheme": "none"}},
}
COMPILED = {
    "compiled": {"sharding": {"compile": True, "activation_checkpointing": True}},
    "compiled in full": {"sharding": {"compile": True}, "peft": {"peft_scheme": "none"}},
}


def model_of(case, folder):
    sharding.COMPILER = "aot_eager"  # all of torch.compile but the C++ compiler
    images = 1 if "again" in case else 4
    return tiny_model(folder, 0.05, **(CASES | COMPILED)[case], trainer={"micro_batch_size": images})


def trained_names(model):
    return [name for name, parameter in model.unet.named_parameters() if parameter.requires_grad]


def read_once(rank: int, folder: Path) -> dict[str, bool]:
    """Whether a process has no weights where it should have none, and the right ones once they are split."""
    cfg = tiny_config(folder, peft={"peft_scheme": "none"}, sharding={"strategy": "fsdp"})
    model = SDXLDRaFTPModel(cfg)
    base = model.base_unet
    held = [any(not p.is_meta for p in network.parameters()) for network in (model.unet, base)]
    model.configure_sharded_model()
    expected = load_parts(cfg.model, trained_in_full=True).unet.state_dict()
    found = [{k: p.full_tensor() for k, p in network.state_dict().items()} for network in (model.unet, base)]
    equal = [all(torch.equal(tensors[name], expected[name]) for name in expected) for tensors in found]
    return {"read": held == [rank == 0, False], "equal": all(equal)}


def one_rank(rank: int, folder: str, out: str, *cases: str) -> None:
    """What each process does: the cases, each on its half of the batch. Rank 0 writes what came of it."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=RANKS)
    for case in cases:
        model = model_of(case, Path(folder))
        model.configure_sharded_model()
        assert all(type(p).__name__ == "DTensor" for p in model.unet.parameters())
        assert not any(type(p).__name__ == "DTensor" for p in model.vae.parameters())
        half = batch(4).split(2)[rank]
        if case == "lora after a base pass":
            with model.base_weights():
                model.generate(half, model.initial_noise(half))
        trained = trained_names(model)
        _, metrics = model.get_loss_and_metrics(half)
        summed = torch.tensor([metrics["loss"], metrics["reward"], metrics["kl_penalty"]], dtype=torch.float64)
        dist.all_reduce(summed)
        gradient = {name: p.grad.full_tensor() for name, p in model.unet.named_parameters() if p.grad is not None}
        assert list(gradient) == trained
        if rank == 0:
            save_file({k: v.contiguous() for k, v in gradient.items()}, f"{out}/{case}.safetensors")
            Path(out, f"{case}.json").write_text(json.dumps((summed / RANKS).tolist()))
    Path(out, f"read-{rank}.json").write_text(json.dumps(read_once(rank, Path(folder))))
    copies = make_mesh(ShardingConfig(strategy="fsdp", shard_size=1, timeout_minutes=3), torch.device("cpu"))
    for name in ("replicate", "shard"):
        assert copies.get_group(name)._get_backend(torch.device("cpu")).options._timeout.seconds == 180
    dist.all_reduce(torch.zeros(1))  # nobody leaves while another is still connecting
    dist.destroy_process_group()


def gradients(cases, folder, out):
    """`out`, with each case's gradient and mean metrics by two processes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.test_sharding", folder, out, *cases],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def sharded(tiny_sdxl, tmp_path_factory):
    return gradients(CASES, tiny_sdxl, tmp_path_factory.mktemp("sharded"))


def check_against_one(case, tiny_sdxl, sharded):
    model = model_of(case, tiny_sdxl)
    _, metrics = model.get_loss_and_metrics(batch(4))
    loss, reward, kl = json.loads((sharded / f"{case}.json").read_text())
    # bf16 rounds by batch size, to 8 bits
    tolerance = 2e-2 if "bf16" in case else 1e-9
    assert [loss, reward, kl] == pytest.approx([metrics[k] for k in ("loss", "reward", "kl_penalty")], abs=tolerance)
    gradient = load_file(sharded / f"{case}.safetensors")
    parameters = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    assert gradient.keys() == parameters.keys()
    found = torch.cat([gradient[name].flatten() for name in parameters])
    expected = torch.cat([p.grad.flatten() for p in parameters.values()])
    assert expected.norm() > 1e-4
    assert (found - expected).norm() <= (0.1 if "bf16" in case else 1e-9) * expected.norm()
    assert found.dtype == (torch.float32 if "bf16" in case else torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_equal_one(sharded, tiny_sdxl, case):
    check_against_one(case, tiny_sdxl, sharded)


@pytest.mark.slow(reason="blocks are traced and compiled in three processes")
def test_two_sharded_processes_with_compiled_blocks_equal_one(tiny_sdxl, tmp_path):
    gradients(COMPILED, tiny_sdxl, tmp_path)
    for case in COMPILED:
        check_against_one(case, tiny_sdxl, tmp_path)


def test_process_0_alone_reads_the_network_that_is_split(sharded):
    for rank in range(RANKS):
        assert json.loads((sharded / f"read-{rank}.json").read_text()) == {"read": True, "equal": True}


def test_a_share_that_does_not_divide_the_processes_names_those_that_do():
    settings = ShardingConfig(strategy="fsdp", shard_size=4)
    with (
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(dist, "get_world_size", return_value=6),
        pytest.raises(InputError, match="shard_size 4 does not divide the 6 processes; those that do: 1, 2, 3, 6"),
    ):
        make_mesh(settings, torch.device("cpu"))


def test_sharding_needs_several_processes(tiny_sdxl):
    with pytest.raises(InputError, match="torchrun"):
        tiny_model(tiny_sdxl).configure_sharded_model()


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    start_processes(one_rank, args=tuple(sys.argv[1:]), nprocs=RANKS, start_method="fork")
