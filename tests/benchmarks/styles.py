"""Does the style word change the style, and keep the concept? Over all pairs of styles, from the same noise.

    python -m tests.benchmarks.styles                 # 40 concepts of emoji200 in four styles; 5 minutes on two cores

Each concept is drawn in all four styles from the same noise. Of a change from style a to style b:
*changes*, the style probe calls the picture of b what was asked, and not what it calls that of a;
*keeps*, the picture of b is nearest to its concept (R@1, by other hands), of the concepts for which that of a is.
"""

from __future__ import annotations

import sys

import numpy as np

import ldm
from ldm.data import STYLES, emoji_dataset
from ldm.evaluation.features import cat
from ldm.evaluation.figures import mean
from ldm.evaluation.pairs import PairScorer, hash_order
from ldm.evaluation.report import table
from tests.benchmarks.common import machine, write


def main(limit: int = 40) -> None:
    """Measure, and write docs/model-card.md."""
    model, scorer = ldm.load("emoji"), PairScorer("emoji200")
    train = emoji_dataset("emoji200", "train")
    captions = {(s.meta["concept"], s.meta["style"]): s.caption for s in (train[i] for i in range(len(train)))}
    whole = [c for c in hash_order(scorer.concepts) if all((c, style) in captions for style in STYLES)][:limit]
    ranks, said = {}, {}
    for style in STYLES:
        out = model.sample([captions[concept, style] for concept in whole], seed=[7] * len(whole), batch_size=15)
        features = cat([scorer.network(images) for images in out.images.split(32)])
        scores = scorer.score(features, whole, [style] * len(whole))
        ranks[style], said[style] = scores.rank(), scores.predicted_styles
    matrix = [[a, *(f"{sum(s == b for s in said[a]) / len(whole):.2f}" for b in STYLES),
               f"{mean('R@1', (ranks[a] <= 1).double().numpy(), whole)}"] for a in STYLES]  # fmt: skip
    rows = []
    for a in STYLES:
        for b in STYLES:
            if a != b:
                changed = [float(y == b and x != b) for x, y in zip(said[a], said[b], strict=True)]
                right = [i for i in range(len(whole)) if ranks[a][i] <= 1]
                kept = mean("keeps", (ranks[b][right] <= 1).double().numpy(), [whole[i] for i in right])
                rows.append([a, b, f"{mean('changes', np.array(changed), whole)}", f"{kept} of {len(right)}"])
    where = f"{machine()}. {len(whole)} training concepts of emoji200 in four styles, from the same noise."
    content = [where, "", table(["asked for", *(f"said {b}" for b in STYLES), "concept R@1"], matrix), "",
               table(["from", "to", "changes", "keeps"], rows)]  # fmt: skip
    sys.stdout.write("\n".join(content) + "\n")
    if limit == 40:
        write("model-card.md", "styles", content)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
