"""The mathematics of diffusion as pure functions; a model is only a callable here."""

from ldm.diffusion.grids import GRIDS, Grid, make_grid
from ldm.diffusion.guidance import guided
from ldm.diffusion.loss import min_snr_weight, per_sample_error
from ldm.diffusion.objective import Draw, Objective
from ldm.diffusion.prediction import PREDICTIONS, Prediction, target, to_eps, to_x0
from ldm.diffusion.samplers import SAMPLERS, Sampler, choose, evaluations
from ldm.diffusion.schedule import Flow, NoisePath, Schedule, make_path

__all__ = [
    "GRIDS", "PREDICTIONS", "SAMPLERS", "Draw", "Flow", "Grid", "NoisePath", "Objective", "Prediction", "Sampler",
    "Schedule", "choose", "evaluations", "guided", "make_grid", "make_path", "min_snr_weight", "per_sample_error",
    "target", "to_eps", "to_x0",
]  # fmt: skip
