"""Whatever is asked for: pictures as the contract says, or one clear line; never a silent change."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.diffusion import GRIDS, SAMPLERS
from ldm.pipeline import LatentDiffusion
from tests.conftest import tiny_model

_MODEL: list[LatentDiffusion] = []


def _model() -> LatentDiffusion:
    if not _MODEL:
        _MODEL.append(tiny_model())
    return _MODEL[0]


TEXT = st.text(max_size=30)
REQUESTS = st.fixed_dictionaries(
    {"prompt": st.one_of(TEXT, st.lists(TEXT, max_size=3))},
    optional={
        "negative_prompt": st.one_of(TEXT, st.lists(TEXT, max_size=3)),
        "num_images": st.sampled_from([0, 1, 2, True, 1.0]),
        "guidance_scale": st.one_of(st.none(), st.floats(0, 30), st.sampled_from([-1.0, 1.0, math.nan, math.inf, "7"])),
        "sampler": st.sampled_from([*SAMPLERS, "auto", "dimm", ""]),
        "grid": st.sampled_from([None, *GRIDS, "karass"]),
        "seed": st.one_of(
            st.none(), st.integers(-(2**70), 2**70), st.lists(st.integers(0, 9), max_size=4), st.just(0.5)
        ),
        "height": st.one_of(st.none(), st.sampled_from([8, 24, 40, 0, -8, 12, 36, True, 24.0])),
        "width": st.one_of(st.none(), st.sampled_from([8, 32, 63])),
        "guidance_interval": st.one_of(st.none(), st.tuples(st.floats(-10, 1100), st.floats(-10, 1100))),
        "guidance_rescale": st.floats(-0.2, 1.2),
        "resize": st.sampled_from(["native", "interpolate", "refine", "crop"]),
        "strength": st.sampled_from([None, 0.5]),
        "batch_size": st.sampled_from([1, 3, 0]),
    },
)
STEPS = st.one_of(st.integers(1, 12), st.sampled_from([0, -1, 1001, 2.0, True, "5"]))


def check(request: dict[str, Any]) -> None:
    """The contract of ``sample``, for one request."""
    said = ""
    try:
        out = _model().sample(**request)
    except ValueError as error:
        said = str(error)
    if said:
        assert len(said) > 20
        assert "\n" not in said
        return
    prompts = [request["prompt"]] if isinstance(request["prompt"], str) else request["prompt"]
    n = len(prompts) * request.get("num_images", 1)
    assert out.images.shape == (n, 3, request.get("height") or 32, request.get("width") or 32)
    assert torch.isfinite(out.images).all()
    assert out.images.abs().max() <= 1.0
    assert out.prompts == [prompt for prompt in prompts for _ in range(n // len(prompts))]
    seed = request.get("seed", 0)
    if isinstance(seed, list):
        assert out.seeds == seed
    else:
        assert out.seeds == [out.seeds[0] + i for i in range(n)]
        assert seed is None or out.seeds[0] == seed
    for name in ("steps", "guidance_scale", "sampler", "grid"):  # nothing given was changed in silence
        if request.get(name) is not None and request.get("sampler") != "auto":
            assert out.settings[name] == request[name]
    assert out.settings["negative_prompts"] is not None


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(REQUESTS, STEPS)
def test_a_request_gives_pictures_or_one_clear_line(request: dict[str, Any], steps: Any) -> None:
    check({**request, "steps": steps})


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.sampled_from([*sorted(SAMPLERS), "auto"]), st.integers(1, 1000), st.floats(0, 30), st.sampled_from(sorted(GRIDS))
)
def test_any_number_of_steps_gives_a_picture(sampler: str, steps: int, scale: float, grid: str) -> None:
    request: dict[str, Any] = {"prompt": "a red square", "sampler": sampler, "guidance_scale": scale, "steps": steps}
    check({**request, "height": 8, "width": 8, **({} if sampler == "auto" else {"grid": grid})})
