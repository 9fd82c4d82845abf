"""Data: shards, their index, the global order, buckets, transforms, emoji. Captions stay text, images stay tensors."""

from ldm.data.buckets import Buckets
from ldm.data.dataset import Sample, ShardDataset, find_tars, write_catalogue
from ldm.data.emoji import HANDS, STYLES, emoji_dataset
from ldm.data.order import Order, WindowedOrder
from ldm.data.sets import FixedSet, PositionSampler, TrainingSet, captions
from ldm.data.shards import build_index, write_shard
from ldm.data.transforms import BadSample, decode_image, fit, to_tensor

__all__ = [
    "HANDS",
    "STYLES",
    "BadSample",
    "Buckets",
    "FixedSet",
    "Order",
    "PositionSampler",
    "Sample",
    "ShardDataset",
    "TrainingSet",
    "WindowedOrder",
    "build_index",
    "captions",
    "decode_image",
    "emoji_dataset",
    "find_tars",
    "fit",
    "to_tensor",
    "write_catalogue",
    "write_shard",
]
