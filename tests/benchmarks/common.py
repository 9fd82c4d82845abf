"""What the benchmarks share: interleaved timings, the machine's peak, and a table written into a page of the docs."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

DOCS = Path(__file__).resolve().parents[2] / "docs"


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; one of each a round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def gemm_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP a second of a square matrix product, the best of ten."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def fill(module: nn.Module) -> nn.Module:
    """Random weights of a plain size, quickly: a network of constants runs into denormal numbers, which are slow."""
    block = 0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in module.parameters():
            n = parameter.numel()
            flat = block.repeat(-(-n // block.numel()))[:n]
            parameter.copy_(flat.view(parameter.shape) if parameter.ndim > 1 else torch.ones(parameter.shape))
    return module.eval()


def machine() -> str:
    """One line: processor, cores, versions, date."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    extra = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    return (
        f"{names[0] if names else platform.processor()} ({', '.join(extra)}), {torch.get_num_threads()} threads{gpu}; "
        f"{packages}; {date.today().isoformat()}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def write(page: str, name: str, content: Iterable[str]) -> None:
    """Put a text between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a page; they must be there."""
    path = DOCS / page
    text = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no markers {begin} and {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n" + "\n".join(content).rstrip() + f"\n{end}{after}")
