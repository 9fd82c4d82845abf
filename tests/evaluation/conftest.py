"""What the tests of the score share: the features of emoji200, computed once a session."""

from __future__ import annotations

import pytest

from ldm.evaluation.features import EfficientNetLite0
from ldm.evaluation.model import Judge
from ldm.evaluation.pairs import PairScorer


@pytest.fixture(scope="session")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="session")
def scorer(network: EfficientNetLite0) -> PairScorer:
    """Fitted on all 800 images: about 15 seconds on two cores."""
    return PairScorer("emoji200", network)


@pytest.fixture(scope="session")
def judge(scorer: PairScorer) -> Judge:
    """Of emoji200."""
    return Judge("emoji200", scorer)


@pytest.fixture(scope="session")
def judge48(scorer: PairScorer) -> Judge:
    """Of what the bundled model draws."""
    return Judge("emoji48", scorer)
