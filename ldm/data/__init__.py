"""Data: shards, their index, the global order, transforms, the emoji set. Captions stay text, images stay tensors."""

from ldm.data.emoji import HANDS, STYLES, emoji_dataset
from ldm.data.order import Order
from ldm.data.sets import FixedSet, PositionSampler, TrainingSet, captions
from ldm.data.shards import Sample, ShardDataset, build_index, write_shard
from ldm.data.transforms import decode_image, fit, to_tensor

__all__ = [
    "HANDS",
    "STYLES",
    "FixedSet",
    "Order",
    "PositionSampler",
    "Sample",
    "ShardDataset",
    "TrainingSet",
    "build_index",
    "captions",
    "decode_image",
    "emoji_dataset",
    "fit",
    "to_tensor",
    "write_shard",
]
