"""Any folder, CSV or parquet of images and captions → shards with their index."""

from __future__ import annotations

import csv
import io
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.shards import IMAGES, write_shard
from ldm.data.transforms import decode_image

IMAGE_COLUMNS = ("image", "path", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text")
OTHER_IMAGES = (".avif", ".bmp", ".gif", ".heic", ".tif", ".tiff")  # refused by name: skipping would lose data
_Item = tuple[str, str, bytes, str]  # key, what an error calls it, encoded image, caption


def pack(
    source: str | Path,  # a folder of images with same-name .txt, a .csv or a .parquet
    out: str | Path,  # the folder to make
    size: int | None = None,  # pixels: a longer shorter side is reduced to it; None keeps every file as it is
    shard_bytes: int = 256 * 2**20,  # of images in a shard, about
) -> list[Path]:
    """Write shards with their index; the folder appears under its name only once all of it is there.

    In a folder the key is the image's path, made safe; in a table it is the row's number. Tables have a column
    ``image`` (or path, image_path, file_name) with a path relative to the table or, in a parquet, the bytes, and a
    column ``caption`` (or text).

    Returns:
        The shards.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: ``out`` exists, an image cannot be decoded, a caption is missing; names the file or row.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or table; give a folder of images, a .csv or a .parquet")
    if out.exists():
        raise ValueError(f"{out} is there already; name a folder that is not, or remove it first")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size={size} is no size in pixels; give at least 1, or none to keep the files as they are")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} is no size; give at least 1")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        names = []
        items = _folder(source) if source.is_dir() else _table(source)
        for number, samples in enumerate(_shards(items, size, shard_bytes)):
            names.append(f"{number:05d}.tar")
            write_shard(building / names[-1], samples)
        if not names:
            raise ValueError(f"{source}: no image with a caption in it; each is KEY.webp|png|jpg and KEY.txt, or a row")
        building.chmod(0o755)  # mkdtemp's 0700 would lock colleagues out
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return [out / name for name in names]


def _shards(items: Iterable[_Item], size: int | None, shard_bytes: int) -> Iterator[list[tuple[str, dict[str, bytes]]]]:
    samples: list[tuple[str, dict[str, bytes]]] = []
    held = 0
    for key, name, encoded, caption in items:  # one at a time: a large folder is never in memory
        extension, data = _image(encoded, name, size)
        if samples and held + len(data) > shard_bytes:
            yield samples
            samples, held = [], 0
        samples.append((key, {extension: data, "txt": caption.encode()}))
        held += len(data)
    if samples:
        yield samples


def _image(data: bytes, name: str, size: int | None) -> tuple[str, bytes]:
    """Extension and bytes of an image that is known to decode, reduced if asked."""
    image = decode_image(data, name)
    if size is None or min(image.size) <= size:
        with Image.open(io.BytesIO(data)) as header:
            return {"WEBP": "webp", "PNG": "png", "JPEG": "jpg"}[str(header.format)], data
    scale = size / min(image.size)
    reduced = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    reduced.save(buffer, "WEBP", quality=95, method=6)
    return "webp", buffer.getvalue()


def _folder(source: Path) -> Iterator[_Item]:
    images: dict[str, Path] = {}
    for path in sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if path.suffix.lower() in OTHER_IMAGES:
            raise ValueError(f"{path}: {path.suffix} is not read; convert it to webp, png or jpg")
        if path.suffix.lower().lstrip(".") in IMAGES:
            plain = re.sub(r"[^A-Za-z0-9_\-]+", "_", path.relative_to(source).with_suffix("").as_posix())
            key, count = plain, 1
            while key in images:  # "a b" and "a_b" are two pictures
                count += 1
                key = f"{plain}-{count}"
            images[key] = path
    for key, path in sorted(images.items()):
        text = path.with_suffix(".txt")
        caption = _caption(text.read_bytes() if text.is_file() else None, str(path), f"write it into {text.name}")
        yield key, str(path), path.read_bytes(), caption


def _table(source: Path) -> Iterator[_Item]:
    for number, row in enumerate(_rows(source)):
        name, key = f"{source}, row {number + 1}", f"{number:09d}"
        image = _cell(source, row, IMAGE_COLUMNS)
        caption = _caption(_cell(source, row, CAPTION_COLUMNS), name, "fill that cell")
        if isinstance(image, dict):  # as the datasets library stores images
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            path = source.parent / image
            if not path.is_file():
                raise ValueError(f"{name}: its image {path} does not exist; paths are relative to the table")
            yield key, f"{name}, {path}", path.read_bytes(), caption
        elif isinstance(image, bytes) and image:
            yield key, name, image, caption
        else:
            raise ValueError(f"{name}: no image in it; put a path or the bytes of a file there")


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    if source.suffix == ".csv":
        with open(source, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
        return
    if source.suffix != ".parquet":
        raise ValueError(f"{source}: cannot be packed; the rule is a folder of images, a .csv or a .parquet")
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{source}: a parquet is read by pyarrow, which is missing; pip install pyarrow") from None
    with parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _cell(source: Path, row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """What stands in the first of these columns that is there."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{source}: none of the columns {', '.join(names)} among {', '.join(map(str, row))}; rename one")


def _caption(text: bytes | str | None, name: str, remedy: str) -> str:
    try:
        caption = (text.decode("utf-8-sig") if isinstance(text, bytes) else text or "").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: its caption is not UTF-8; save it as UTF-8") from None
    if not caption:
        raise ValueError(f"{name}: no caption; every image has one, {remedy}")
    return caption
