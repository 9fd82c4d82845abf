"""What ``ldm plan`` foretells beside what trainings take, on configurations that its probe did not run.

    python -m tests.benchmarks.plan                  # writes docs/scale.md; about 6 minutes
    python -m tests.benchmarks.plan steps=2 rounds=1 # a look; writes nothing

The trainings are whole ones, by ``train.py``; their time is that of steps, their memory the most of the process.
"""

from __future__ import annotations

import re
import subprocess
import sys

from ldm.cli.settings import value_of
from ldm.evaluation.report import table
from tests.benchmarks.common import machine, write
from tests.benchmarks.training import measure, never, ours

CASES = {
    "UNet of 36 M, batch 32, bfloat16": [
        "experiment=emoji/diffusion", "unet.widths=[128,256,320]", "unet.attention=[true,true,true]",
        "unet.num_heads=8", "data.batch_size=32", "trainer.precision=bf16-mixed",
    ],
    "UNet of 11 M, two blocks a level, batch 16, float32": [
        "experiment=emoji/diffusion", "unet.widths=[64,96,160]", "unet.num_blocks=2", "unet.num_heads=4",
    ],
    "autoencoder of 3 M, batch 8, float32": ["experiment=emoji/autoencoder", "autoencoder.widths=[64,128]"],
}  # fmt: skip


def foretold(arguments: list[str]) -> tuple[float, float]:
    """Images/s and GB that ``ldm plan`` says."""
    command = [sys.executable, "-m", "ldm.cli", "plan", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(float(re.search(pattern, said)[1].replace(",", "")) for pattern in  # type: ignore[index,return-value]
                 (r"speed: ([\d,.]+) images/s", r"memory a device: ([\d.]+) GB"))  # fmt: skip


def main(arguments: list[str]) -> None:
    """One case after the other: the plan, the training, the plan again, whose mean counts."""
    usual = {"rounds": 5, "steps": 4}
    given = {key: value_of(key, value) for key, value in (argument.split("=", 1) for argument in arguments)}
    rounds, steps = {**usual, **given}.values()
    rows: list[list[object]] = []
    for name, settings in CASES.items():
        before = foretold(settings)
        batch = 8 if "autoencoder" in name else next((int(s.split("=")[1]) for s in settings if "batch" in s), 16)
        seconds, memory = measure({name: (ours, ([*settings, *never()],))}, rounds, steps)[name]
        after = foretold(settings)
        planned = [batch * (1 / before[0] + 1 / after[0]) / 2, (before[1] + after[1]) / 2]
        rows.append([name, f"{planned[0]:.3f}", f"{seconds:.3f}", f"{planned[0] / seconds - 1:+.0%}",
                     f"{planned[1]:.2f}", f"{memory:.2f}", f"{planned[1] / memory - 1:+.0%}"])  # fmt: skip
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    heads = ["training", "s a step, planned", "measured", "off", "GB, planned", "measured", "off"]
    content = table(heads, rows)
    where = f"{machine()}. Medians of {rounds} × {steps} steps; two plans each, one before and one after."
    sys.stdout.write(f"{where}\n\n{content}\n")
    if {**usual, **given} == usual:
        write("scale.md", "plan", [where, "", content])


if __name__ == "__main__":
    main(sys.argv[1:])
