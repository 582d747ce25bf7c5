"""What 8 bits save and cost: the frozen base (model.quantize) and AdamW's moments (optim.name adamw8bit), toy size.

    python benchmarks/eight_bit.py            a CPU, two minutes; needs the extra `bitsandbytes`

Both sides have the same weights, LoRA (its B away from zero), prompts and seeds. Seconds are the processor's, the best
of rounds taken in turn, as the machine may be shared. Last, one product of SDXL's size, where the price is another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import draftcli
from draftcli.core.batch import Batch
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine.eight_bit import EightBitLinear
from draftcli.training.optimizer import make_optimizer, moment_bytes

PROMPTS = ["a red circle", "two blue squares on a lawn", "a small green triangle on the left", "night"]


def toy(*settings: str) -> SDXLDRaFTPModel:
    cfg = draftcli.load_config("toy", ["model.device=cpu", "trainer.micro_batch_size=4", *settings])
    model = SDXLDRaFTPModel(cfg)
    model.reward_model = draftcli.get_reward_model(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.trainable_parameters if cfg.peft.peft_scheme == "lora" else ():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return model


def seconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The processor's, of each work: the best of `rounds`, in turn."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            began = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - began)
    return best


def base(rounds: int) -> None:
    print("frozen base, 8 pictures of 64 x 64, N = 10, float32")
    batch = Batch(PROMPTS * 2, list(range(8)), (64, 64), [None] * 8)
    for k in (1, 4):
        models = {name: toy(f"draftp.truncation_steps={k}", *more) for name, more in SIDES.items()}
        gradients, errors = {}, []
        for name, model in models.items():
            model.get_loss_and_metrics(batch)
            gradients[name] = torch.cat([p.grad.flatten() for p in model.trainable_parameters if p.grad is not None])
        cosine = F.cosine_similarity(gradients["8 bits"], gradients["float32"], 0)
        if k == 1:
            for name, model in models.items():
                layers = [
                    m
                    for block in model.unet.modules()
                    if type(block).__name__ == "BasicTransformerBlock"
                    for n, m in block.named_modules()
                    if isinstance(m, nn.Linear | EightBitLinear) and ".lora_" not in n
                ]
                held = sum(t.nbytes for m in layers for t in (*m.parameters(), *m.buffers()))
                unet = sum(t.nbytes for t in (*model.unet.parameters(), *model.unet.buffers()))
                print(
                    f"  {name}: {len(layers)} linear layers {held / 1e6:.2f} MB, the UNet with LoRA {unet / 1e6:.2f} MB"
                )
            plain, ours = models["float32"], models["8 bits"]
            with torch.no_grad():
                cond = plain.encode(batch)
                x = plain.networks.start(batch)
                for i in range(len(plain.schedule)):
                    level = plain.schedule.level(i)
                    found = plain.networks.tuned(cond)(x, level)
                    errors.append(float((ours.networks.tuned(cond)(x, level) - found).norm() / found.norm()))
                    x = x + found * (float(plain.schedule.sigmas[i + 1]) - float(plain.schedule.sigmas[i]))
            print(f"  guided eps, relative error over the 10 levels: {min(errors):.4f} to {max(errors):.4f}")
        took = seconds({name: lambda m=m: m.get_loss_and_metrics(batch) for name, m in models.items()}, rounds)
        rates = ", ".join(f"{name} {8 / s:.2f}" for name, s in took.items())
        print(f"  K = {k}: cosine of the LoRA's gradients {cosine:.5f}; images a second {rates}")


SIDES = {"float32": (), "float32, never folded": ("sharding.fold_lora=false",), "8 bits": ("model.quantize=8bit",)}


def moments(rounds: int) -> None:
    model = toy("peft.peft_scheme=none")
    weights = model.trainable_parameters
    print(f"moments, the toy's whole UNet, {sum(w.numel() for w in weights):,} weights")
    optimizers = {}
    for name in ("adamw", "adamw8bit"):
        own = [w.detach().clone().requires_grad_() for w in weights]
        for weight in own:
            weight.grad = torch.randn_like(weight)
        optimizers[name] = make_optimizer(own, model.cfg.optim.model_copy(update={"name": name}))
        optimizers[name].step()
    took = seconds({name: optimizer.step for name, optimizer in optimizers.items()}, 3 * rounds)
    for name in optimizers:
        print(f"  {name}: {moment_bytes(weights, name) / 1e6:.2f} MB, a step {1e3 * took[name]:.0f} ms")


def product(rounds: int) -> None:
    print("one product of SDXL's size, 1,280 to 10,240, forward and backward to the input")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1024, 4096):
            plain = nn.Linear(1280, 10240).to(dtype).requires_grad_(False)
            x = torch.randn(tokens, 1280, dtype=dtype, requires_grad=True)
            layers = {"plain": plain, "8 bits": EightBitLinear(plain)}
            took = seconds(
                {n: lambda layer=layer, x=x: layer(x).sum().backward() for n, layer in layers.items()}, rounds
            )
            price = took["8 bits"] / took["plain"] - 1
            name = str(dtype).removeprefix("torch.")
            print(f"  {name}, {tokens} tokens: {took['plain']:.3f} s, in 8 bits {took['8 bits']:.3f} s ({price:+.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base(options.rounds)
    moments(options.rounds)
    product(options.rounds)


if __name__ == "__main__":
    main()
