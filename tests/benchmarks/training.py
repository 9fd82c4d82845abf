"""Images a second of training: ours through ``train.py``, and diffusers' modules in the loop of its own examples.

    python -m tests.benchmarks.training                  # 38 M UNet, batches of 32; about 10 minutes, 10 GB
    python -m tests.benchmarks.training rounds=1 steps=1 batch=8 widths=[64,128,160]     # a look; writes nothing

Each variant trains in a process of its own, on the same cached latents and captions, and waits while another one's
steps are timed: a round takes some steps of each. Ours is the whole of a training: Lightning, guard, average, log.
On a machine with a GPU the variants are others, with ``torch.compile`` on both sides, and batches of 256.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm.cli import train
from ldm.cli.building import build
from ldm.cli.settings import value_of
from ldm.cli.training import compose
from ldm.data import PositionSampler
from ldm.evaluation.report import table
from ldm.training.cache import collate
from ldm.training.callbacks import Speed
from ldm.unet import UNet
from tests.benchmarks.common import gemm_peak, machine, write

GPU = torch.cuda.is_available()
DEVICE, HERE = ("cuda", "gpu") if GPU else ("cpu", "cpu")
NEVER = 10**9
WIDTHS = [128, 256, 320]
OURS: dict[str, tuple[str, ...]] = (
    {"ours, compile=false": ("trainer=gpu", "trainer.compile=false"), "ours (trainer=gpu)": ("trainer=gpu",)}
    if GPU
    else {
        "ours, float32 (default)": ("trainer.precision=32-true",),
        "ours, trainer.precision=auto": ("trainer.precision=auto",),
    }
)
THEIRS: dict[str, dict[str, bool]] = (
    {
        "diffusers, bfloat16 autocast": {"autocast": True, "fused": True},
        "diffusers, bfloat16 autocast, compiled": {"autocast": True, "fused": True, "compiled": True},
    }
    if GPU
    else {
        "diffusers, float32 (its default)": {},
        "diffusers, bfloat16 autocast": {"autocast": True},
        "diffusers, bfloat16 autocast, fused AdamW, foreach EMA": {"autocast": True, "fused": True},
        "diffusers, the same, channels-last": {"autocast": True, "fused": True, "channels_last": True},
        "diffusers, the same, attention by plain products": {"autocast": True, "fused": True, "plain": True},
    }
)


class Gate:
    """Called before each step: lets as many pass as the other end asks for, and tells it how long they took."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.left, self.start = pipe, 0, 0.0

    def __call__(self) -> None:
        faulthandler.cancel_dump_traceback_later()  # it has started
        if self.left == 0:
            if GPU:
                torch.cuda.synchronize()
            self.pipe.send((time.perf_counter() - self.start, peak_memory()))
            self.left = self.pipe.recv()
            if self.left == 0:
                os._exit(0)
            self.start = time.perf_counter()
        self.left -= 1


def peak_memory() -> float:
    """GB, the most since the last call: of the GPU, or of the process."""
    if GPU:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def settings(batch: int, widths: list[int], *more: str) -> list[str]:
    """A training of the UNet that is measured, on the cached latents of emoji48."""
    return [
        "experiment=emoji/diffusion",
        f"data.batch_size={batch}",
        f"data.num_workers={6 if GPU else 0}",
        f"unet.widths={widths}".replace(" ", ""),
        "unet.attention=[true,true,true]",
        "unet.num_heads=8",
        *never(),
        *more,
    ]


def never() -> list[str]:
    """No pictures, validations and checkpoints between the steps."""
    return [f"trainer.max_steps={NEVER}", "samples.every=0", f"validation.every={NEVER}", f"checkpoint.every={NEVER}"]


def ours(pipe: Connection, arguments: list[str]) -> None:
    """A process that trains by ``train.py``."""
    gate, begin = Gate(pipe), Speed.on_train_batch_start

    def on_train_batch_start(self: Speed, *args: Any) -> None:
        gate()
        begin(self, *args)

    Speed.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),  # an error is raised through it, and told
    ):
        train([*arguments, f"output={folder}/run"])


def theirs(pipe: Connection, arguments: list[str], how: Mapping[str, bool]) -> None:
    """A process that trains diffusers' UNet as ``train_text_to_image.py`` does, on the cache."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    cfg, _ = compose([*arguments, "output=nowhere"])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        module, data, _ = build(cfg)
    unet = peer(list(cfg.unet.widths), cfg.unet.context_dim).to(DEVICE)
    if how.get("channels_last"):
        unet.to(memory_format=torch.channels_last)
    if how.get("plain"):
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
    if how.get("compiled"):
        unet.compile()
    ema = EMAModel(unet.parameters(), decay=0.999, foreach=how.get("fused", False))
    ema.to(DEVICE)
    adam = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=how.get("fused", False))
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / 200))
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
    mean, std = (
        getattr(module.model.autoencoder, f"latent_{name}").to(DEVICE)[:, None, None] for name in ("mean", "std")
    )
    null, gate = module.model.null_context.to(DEVICE), Gate(pipe)
    loader = torch.utils.data.DataLoader(
        data.train_set,
        cfg.data.batch_size,
        sampler=PositionSampler(cfg.data.batch_size, 0, NEVER, 0, 1, 1),
        num_workers=cfg.data.num_workers,
        pin_memory=GPU,
        collate_fn=collate,
    )
    for batch in loader:
        gate()
        means, stds = batch["moments"].to(DEVICE).unbind(1)
        z = (means + stds * torch.randn_like(means) - mean) / std
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),), device=DEVICE)
        dropped = torch.rand(len(z), device=DEVICE)[:, None, None] < 0.1
        context = batch["context"].to(DEVICE)
        context = torch.where(dropped, null, F.pad(context, (0, 0, 0, null.shape[-2] - context.shape[1])))
        noisy, target = scheduler.add_noise(z, noise, t), scheduler.get_velocity(z, noise, t)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=how.get("autocast", False)):
            prediction = unet(noisy, t, context).sample
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adam.step()
        rate.step()
        adam.zero_grad()
        ema.step(unet.parameters())


def peer(widths: list[int], context_dim: int) -> Any:
    """diffusers' UNet of the same size."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        cross_attention_dim=context_dim,
        attention_head_dim=8,  # the number of heads
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
    ).train()


def start(run: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    """A process, which says where it is if it has not come to its first step after a minute."""
    faulthandler.dump_traceback_later(60)
    # Of the processes that read data: as the children of a spawned one they would be spawned, and import all of this.
    multiprocessing.set_start_method("fork", force=True)
    run(pipe, *arguments)


def measure(workers: Mapping[str, tuple[Callable[..., None], Any]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Median seconds of a step and peak GB of each; interleaved, after a round that is not counted."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, (run, arguments) in workers.items():
        pipes[name], end = spawn.Pipe()
        process = spawn.Process(target=start, args=(run, end, *arguments), daemon=not GPU)  # a daemon has no workers
        process.start()
        atexit.register(process.kill)  # or this process would wait at its end for one that waits for its next step
        end.close()  # so that one that dies is missed at once
        if not GPU:
            pipes[name].recv()  # ready: one after the other, so that none disturbs another's start
    begun = time.perf_counter()
    for name, pipe in pipes.items() if GPU else ():  # together
        pipe.recv()
        sys.stderr.write(f"{name}: ready after {time.perf_counter() - begun:.0f} s\n")
    times: dict[str, list[float]] = {name: [] for name in pipes}
    memory = dict.fromkeys(pipes, 0.0)
    for pipe in pipes.values():  # not counted, and together: what compiles takes a minute
        pipe.send(steps)
    for pipe in pipes.values():
        pipe.recv()
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(steps)
            seconds, peak = pipe.recv()
            times[name].append(seconds / steps)
            memory[name] = max(memory[name], peak)
    for pipe in pipes.values():
        pipe.send(0)
    return {name: [statistics.median(each), memory[name]] for name, each in times.items()}


def main(arguments: list[str]) -> None:
    """Measure, and write docs/scale.md unless the size is another than the usual one."""
    given = {key: value_of(key, value) for key, value in (argument.split("=", 1) for argument in arguments)}
    usual = {"rounds": 5, "steps": 20 if GPU else 3, "batch": 256 if GPU else 32, "widths": WIDTHS}
    rounds, steps, batch, widths = {**usual, **given}.values()
    peaks = {name: _peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    workers: dict[str, tuple[Callable[..., None], Any]] = {
        **{name: (theirs, (settings(batch, widths, f"trainer={HERE}"), how)) for name, how in THEIRS.items()},
        **{name: (ours, (settings(batch, widths, *more),)) for name, more in OURS.items()},
    }
    # What compiles comes last: where a GPU's time is short, the eager pair has its row in the first minute.
    compiled = {name: work for name, work in workers.items() if GPU and name.endswith(("compiled", "(trainer=gpu)"))}
    found = {}
    for group in ({name: work for name, work in workers.items() if name not in compiled}, compiled):
        found |= measure(group, rounds, steps) if group else {}
        sys.stderr.write("".join(f"{name}: {batch / found[name][0]:.1f} images/s\n" for name in group))
    network = UNet(widths, [True] * len(widths), 1, 8, 384)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.ones(1, 77, 384)).sum().backward()
    work = counter.get_total_flops()
    rows: list[list[object]] = []
    first = next(iter(found.values()))[0]
    best = min(seconds for name, (seconds, _) in found.items() if name in THEIRS)
    for name, (seconds, memory) in found.items():
        full = not GPU and ("float32" in name)
        share = work * batch / seconds / peaks["float32" if full else "bfloat16"]
        rows.append([name, f"{batch / seconds:.1f}", f"{first / seconds:.2f}", f"{best / seconds:.2f}",
                     f"{memory:.2f}", f"{share:.0%}"])  # fmt: skip
    where = (
        f"{machine()}; matrix product of {8192 if GPU else 2048}²: float32 {peaks['float32'] / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {peaks['bfloat16'] / 1e9:.0f}. UNet of {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M, "
        f"{work / 1e9:.2f} GFLOP an image forward and backward, 16×16 latents, batch {batch}. "
        f"Medians of {rounds} × {steps} steps, interleaved."
    )
    heads = ["training", "images/s", "× diffusers' default", "× diffusers' best", "peak GB", "of the peak"]
    content = table(heads, rows)
    sys.stdout.write(f"{where}\n\n{content}\n")
    if {**usual, **given} == usual:
        write("scale.md", "training on a GPU" if GPU else "training", [where, "", content])


def _peak(dtype: torch.dtype) -> float:
    """FLOP a second of a matrix product here."""
    if not GPU:
        return gemm_peak(dtype)
    a, best = torch.randn(8192, 8192, device=DEVICE, dtype=dtype), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 8192**3 / best


if __name__ == "__main__":
    main(sys.argv[1:])
