"""Is this machine, with this model, ready to train? Each check tries the real thing and reports one line."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch

from draftcli.config import Config
from draftcli.core.batch import Batch
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.eight_bit import check_installed
from draftcli.core.engine.runtime import Runtime, choose_runtime
from draftcli.core.engine.sharding import compiled, working_attention
from draftcli.core.models.loading import model_path
from draftcli.errors import DraftpError, InputError

State = Literal["ok", "warning", "failed"]
HUB_TIMEOUT = 3.0  # seconds for the hub to answer
ROOM = 20e9  # bytes: a download of SDXL and a reward, and a run's checkpoints


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: was checked.
        state: only `failed` keeps a training from working.
        words: what was found, and what to do about it.
    """

    what: str
    state: State
    words: str


def examine(cfg: Config, folder: Path) -> Iterator[Finding]:
    """Make every check, one finding after the other.

    Args:
        cfg: settings of the training to be. Its model is loaded.
        folder: where runs would be stored.
    """
    yield Finding("python, torch", "ok", f"Python {platform.python_version()}, torch {torch.__version__}")
    try:
        runtime = choose_runtime(cfg.model.device, cfg.model.precision)
    except InputError as error:
        yield Finding("device", "failed", str(error))
        return
    yield _device(runtime.device, runtime.reason)
    yield _computes(runtime.device, runtime.dtype)
    yield _attention(runtime)
    yield _disk(folder)
    yield _hub(is_needed=not Path(model_path(cfg.model.pretrained)).exists())
    if cfg.sharding.compile:
        yield _compiles(runtime)
    # The rest is checked on the plain network: all of its blocks would take minutes to compile.
    cfg = cfg.model_copy(update={"sharding": cfg.sharding.model_copy(update={"compile": False})})
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            check_installed(cfg)
            model = DRaFTPModel(cfg)
    except DraftpError as error:
        yield Finding("model", "failed", str(error))
        return
    # What libraries say is for their developers.
    yield from (Finding("model", "warning", str(w.message)) for w in said if "draftcli" in w.filename)
    yield Finding("model", "ok", f"{cfg.model.pretrained}, {len(model.trainable_parameters)} tensors to train")
    for what, check in (
        ("VAE", _vae_is_finite),
        ("adapters off", _off_is_base),
        ("gradient", _every_weight_gets_gradient),
    ):
        yield _checked(what, check, model)


def _checked(what: str, check: Callable[[DRaFTPModel], Finding], model: DRaFTPModel) -> Finding:
    try:
        return check(model)
    except RuntimeError as error:  # torch's own, where a kernel or memory is missing
        return Finding(what, "failed", " ".join(str(error).split())[:200])


def _device(device: torch.device, reason: str) -> Finding:
    if device.type == "cpu":
        return Finding("device", "warning", f"{reason}; the toy preset works, SDXL would take weeks")
    memory = f", {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB" if device.type == "cuda" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Finding("device", "ok", f"{name}{memory}; {reason}")


def _computes(device: torch.device, dtype: torch.dtype) -> Finding:
    a = torch.ones(64, 64, device=device, dtype=dtype)
    right = bool(((a @ a) == 64).all())
    name = str(dtype).removeprefix("torch.")
    return (
        Finding("dtype", "ok", f"{name} computes")
        if right
        else Finding("dtype", "failed", f"{name} multiplies wrongly")
    )


def _attention(runtime: Runtime) -> Finding:
    if fused := [name for name in working_attention(runtime) if name != "math"]:
        return Finding("attention", "ok", f"torch's {', '.join(fused)} (sharding.attention)")
    return Finding("attention", "warning", "no fused kernel: memory grows with the square of the number of pixels")


def _compiles(runtime: Runtime) -> Finding:
    """A small function by torch.compile, forward and backward."""
    x = torch.ones(8, 8, device=runtime.device, dtype=runtime.dtype, requires_grad=True)
    try:
        compiled(torch.sin)(x).sum().backward()
    except DraftpError as error:
        return Finding("compile", "failed", str(error))
    return Finding("compile", "ok", "torch.compile works; the first step takes minutes longer")


def _disk(folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding("disk", "failed", f"{there} cannot be written to; choose another --output")
    words = f"{free / 1e9:.0f} GB free at {there}"
    if free < 1e9:
        return Finding("disk", "failed", f"{words}: too little for a run")
    return Finding("disk", "ok" if free >= ROOM else "warning", words)


def _hub(is_needed: bool) -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = address.hostname or "huggingface.co", address.port or (80 if address.scheme == "http" else 443)
    reasons = ["HF_HUB_OFFLINE is set"] if offline else [f"{host} does not answer within {HUB_TIMEOUT:g} s"]

    def call() -> None:
        try:
            socket.create_connection((host, port), timeout=HUB_TIMEOUT).close()
            reasons.clear()
        except OSError as error:
            reasons[:] = [f"{host} does not answer ({error.strerror or type(error).__name__})"]

    if not offline:  # in a thread, as looking up a name has no time-out
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        caller.join(HUB_TIMEOUT)
    if not reasons:
        return Finding("hub", "ok", f"{host} answers")
    need = "the model must be in the cache" if is_needed else "the model is a local folder"
    return Finding("hub", "warning", f"{reasons[0]}; {need}; rewards from the hub need it too")


def _batch(model: DRaFTPModel) -> Batch:
    """One small picture: only the network's output counts here, not its quality."""
    return Batch(["a red circle"], [0], (64, 64), [None])


@torch.no_grad()
def _vae_is_finite(model: DRaFTPModel) -> Finding:
    """Decode latents as large as pictures have them; SDXL's own VAE overflows in float16 inside."""
    dtype = str(next(model.vae.parameters()).dtype).removeprefix("torch.")
    latents = model.initial_noise(_batch(model)).to(model.runtime.device, model.runtime.latent_dtype)
    bad: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: bad.append(name) if _overflows(out) else None)
        for name, module in model.vae.named_modules()
        if not list(module.children())
    ]
    model.decode(3 * latents)
    for hook in hooks:
        hook.remove()
    if bad:
        advice = "set model.vae_precision=fp32, or model.vae to one that is safe in fp16"
        return Finding("VAE", "failed", f"not finite in {dtype}, first after {bad[0]}; {advice}")
    return Finding("VAE", "ok", f"finite in {dtype}")


def _overflows(output: object) -> bool:
    return isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all())


@torch.no_grad()
def _off_is_base(model: DRaFTPModel) -> Finding:
    """The output of the frozen base must not change by a bit when the trained weights do."""
    batch = _batch(model)
    cond = model.encode(batch)
    x, level = model.networks.at_first_level(model.initial_noise(batch)), model.schedule.level(len(model.schedule) - 1)
    x = x / model.schedule.init_scale
    base = model.networks.base(cond)
    before = base(x, level)
    with _moved(model):
        after, tuned = base(x, level), model.networks.tuned(cond)(x, level)
    if not torch.equal(before, after):
        return Finding("adapters off", "failed", "the base changes with the trained weights: the KL penalty is wrong")
    if torch.equal(tuned, before):
        return Finding("adapters off", "failed", "the trained weights do not change the UNet's output")
    return Finding("adapters off", "ok", "equals the base, bit for bit")


def _every_weight_gets_gradient(model: DRaFTPModel) -> Finding:
    """Of one UNet call, with every trained weight moved first: while a LoRA's B is 0 its A has no gradient."""
    batch = _batch(model)
    cond = model.encode(batch)
    x, level = model.networks.at_first_level(model.initial_noise(batch)), model.schedule.level(len(model.schedule) - 1)
    with _moved(model):
        eps = model.networks.tuned(cond)(x / model.schedule.init_scale, level)
        (eps * torch.randn(eps.shape, generator=torch.Generator().manual_seed(0)).to(eps)).sum().backward()
    trained = [(name, p) for name, p in model.unet.named_parameters() if p.requires_grad]
    without = [n for n, p in trained if p.grad is None or not bool(p.grad.any())]
    broken = [n for n, p in trained if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    for _, parameter in trained:
        parameter.grad = None
    if without:
        return Finding("gradient", "failed", f"{len(without)} of {len(trained)} tensors get none, such as {without[0]}")
    if broken:
        return Finding("gradient", "failed", f"{len(broken)} of {len(trained)} are not finite, such as {broken[0]}")
    return Finding("gradient", "ok", f"reaches each of the {len(trained)} tensors")


@contextmanager
def _moved(model: DRaFTPModel) -> Iterator[None]:
    """Inside, every trained weight is a little elsewhere; afterwards it is what it was, bit for bit."""
    weights, generator = model.trainable_parameters, torch.Generator().manual_seed(0)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator).to(weight))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
