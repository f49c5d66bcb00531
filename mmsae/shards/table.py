"""Parquet files of images and captions: one row is one sample.

The image is a struct ``{bytes, path}``, as ``datasets`` writes it, or binary; the caption is a string, a list of them,
or what ``--caption-field`` says. All other columns become the sample's json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from mmsae.shards.faults import FaultLog
from mmsae.shards.group import Group
from mmsae.shards.opened import opened
from mmsae.shards.shard import Found, Shard
from mmsae.types import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGES = ("image", "jpg", "png", "jpeg", "webp", "img", "picture", "photo", "image_bytes")
"""Names of image columns that are known, best first, in any case."""
CAPTIONS = ("txt", "caption", "captions", "text", "sentences", "sentence", "alt_text", "description")
"""Names of caption columns that are known, best first, in any case."""
OWN = ("__key__", "__url__")
"""Columns of webdataset's that are no metadata."""
UNIT_BYTES = 256 << 20
"""Compressed bytes of a unit: of a larger file some row groups make one."""
ROWS = 64
"""Rows that are read at once: their images are in memory."""

_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


class Columns(NamedTuple):
    """Which columns of a table are what."""

    image: str  #: The image; empty: there is none.
    caption: str  #: The caption where ``--caption-field`` says none; empty: there is none.
    others: list[str]  #: What becomes the sample's json: every column but the image, and other binary ones.


def table_columns(schema: pa.Schema, named: dict[str, str], path: str) -> Columns:
    """What is what, by the names that the user gave, those that are known, or a type that one column alone has.

    Raises:
        InputError: A column that was named is not there, or holds nothing of the kind.
    """
    pictures = [f.name for f in schema if _is_image(f.type)]
    image = named.get("image", "")
    if image and image not in schema.names:
        raise InputError(f"{path} has no column {image}; it has {', '.join(schema.names)}")
    if image and image not in pictures:
        raise InputError(
            f"{path}: column {image} is of type {schema.field(image).type}; images are binary or a struct with bytes"
        )
    image = image or _known(pictures, IMAGES) or (pictures[0] if len(pictures) == 1 else "")
    texts = [f.name for f in schema if not _is_image(f.type) and not _is_binary(f.type)]
    others = [n for n in texts if n not in OWN]
    return Columns(image, _known(others, CAPTIONS), others)


def check_columns(unit: Shard, need: Collection[str], caption_field: str = "") -> None:
    """Refuse a table that has no column for what every sample must have, before its first row is counted as a fault.

    Raises:
        InputError: Names the columns that there are.
    """
    with _table(unit) as file:
        if file is None:
            return  # unreadable: counted where it is read
        schema = file.schema_arrow
        found = table_columns(schema, unit.options, unit.file)
    has = f"{unit.file} has the columns {', '.join(schema.names)}"
    if "image" in need and not found.image:
        raise InputError(f"{has}, and none of them is known as the image: name it, as FILE.parquet#image=COLUMN")
    field = caption_field.split("[")[0]
    if "caption" in need and field and field not in schema.names and "json" not in schema.names:
        raise InputError(f"{has}, and no {field}, which --caption-field names")
    if "caption" in need and not field and not found.caption and "json" not in schema.names:
        raise InputError(f"{has}, and none of them is known as the caption: name it with --caption-field")


def table_units(shard: Shard, metadata: pq.FileMetaData | None, unit_bytes: int | None = None) -> list[Shard]:
    """The units of a table: the file, or row groups of a large one.

    ``metadata`` is its footer, None where that cannot be read: then the file is one unit, whose reading will tell.
    """
    most = UNIT_BYTES if unit_bytes is None else unit_bytes
    if metadata is None or shard.size <= most or metadata.num_row_groups < 2:
        return [shard]
    sizes = [_compressed(metadata.row_group(g)) for g in range(metadata.num_row_groups)]
    bounds, held = [0], 0
    for g, size in enumerate(sizes):
        if held and held + size > most:
            bounds.append(g)
            held = 0
        held += size
    bounds.append(len(sizes))
    units = []
    for a, b in pairwise(bounds):
        found = Found(sum(sizes[a:b]), shard.tag or f"{shard.size} bytes")
        about = vars(shard) | {"groups": (a, b), "found": found, "name": f"{shard.base}#{a:05d}"}
        units.append(Shard(f"{shard.file}#groups={a}-{b - 1}", **about))
    return units


def read_footer(file: BinaryIO | str) -> pq.FileMetaData | None:
    """The footer of a parquet file; None where that is no parquet, or cut."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError):
        return None


def table_groups(unit: Shard, faults: FaultLog, read: bool = True) -> Iterator[Group]:
    """The samples of a table, in the order of its rows; the number of the row is the key where there is no ``__key__``.

    A null image or caption leaves out that field. A file that cannot be read further is counted as one dropped sample,
    ``truncated_shard`` or ``broken_shard``. Without ``read`` contents are left out and sizes are means, since only the
    footer and one row are read.
    """
    import pyarrow as pa

    try:
        with _table(unit) as file:
            if file is None:
                kind, detail = _what_is_wrong(unit)
                faults.seen()
                faults.add(kind, unit.name, "", detail)
                return
            yield from _rows(unit, file) if read else _sizes(unit, file)
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        faults.seen()
        faults.add("broken_shard", unit.name, "", (str(e).splitlines() or [""])[0][:200])


@contextmanager
def _table(unit: Shard) -> Iterator[pq.ParquetFile | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(unit) as stream:
        try:
            file = pq.ParquetFile(stream)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError):
            file = None
        yield file


def _what_is_wrong(unit: Shard) -> tuple[str, str]:
    with opened(unit) as file:
        begins = file.read(4) == b"PAR1"
        size = file.seek(0, 2)
        file.seek(max(0, size - 4))
        ends = file.read(4) == b"PAR1"
    if begins and not ends:
        return "truncated_shard", f"{size} bytes, without parquet's mark at the end"
    return "broken_shard", "not a parquet file" if not begins else "its footer is damaged"


def _row_groups(unit: Shard, file: pq.ParquetFile) -> range:
    return range(*(unit.groups or (0, file.num_row_groups)))


def _rows(unit: Shard, file: pq.ParquetFile) -> Iterator[Group]:
    found = table_columns(file.schema_arrow, unit.options, unit.file)
    chosen = _row_groups(unit, file)
    at = sum(file.metadata.row_group(g).num_rows for g in range(chosen.start))
    own = [n for n in file.schema_arrow.names if n == "__key__"]
    wanted = [*([found.image] if found.image else []), *found.others, *own]
    for batch in file.iter_batches(ROWS, row_groups=list(chosen), columns=wanted, use_threads=False):
        values = {n: _values(batch.column(n)) for n in (*found.others, *own)}
        images = _bytes_of(batch.column(found.image)) if found.image else [None] * len(batch)
        for i, image in enumerate(images):
            yield _sample(found, {n: v[i] for n, v in values.items()}, image, at + i)
        at += len(batch)


def _sample(found: Columns, row: dict[str, Any], image: bytes | None, number: int) -> Group:
    key = str(row.pop("__key__", None) or f"{number:09d}")
    inner, broken = row.pop("json", None), b""
    if isinstance(inner, str):
        broken, inner = inner.encode("utf-8", "replace"), _parsed(inner)
    meta = {**row, **inner} if isinstance(inner, dict) else row
    raw = {} if image is None else {_format(image): image}
    caption = row.get(found.caption)
    if isinstance(caption, str):
        raw["txt"] = caption.encode("utf-8", "replace")
    elif found.caption:
        meta = {**meta, "caption": meta.get("caption", caption)}
    if isinstance(cls := row.get("cls"), int):
        raw["cls"] = str(cls).encode()
    whole = json.dumps(_plain(meta), ensure_ascii=False).encode("utf-8", "replace")
    raw["json"] = broken if broken and not isinstance(inner, dict) else whole  # what is broken is counted as in a tar
    raw = dict(sorted(raw.items()))
    sizes, spelled = {f: len(v) for f, v in raw.items()}, {f: f for f in raw}
    return Group(key.replace(".", "_"), raw, sizes, spelled, f"{number:09d}")


def _sizes(unit: Shard, file: pq.ParquetFile) -> Iterator[Group]:
    chosen = [file.metadata.row_group(g) for g in _row_groups(unit, file)]
    n = sum(g.num_rows for g in chosen)
    first = next(_rows(unit, file), None)
    if first is None:
        return
    found = table_columns(file.schema_arrow, unit.options, unit.file)
    per = {f: len(v) for f, v in first.raw.items()}
    image = next((f for f in _MAGIC.values() if f in per), "")
    if image and n:
        columns = [g.column(c) for g in chosen for c in range(g.num_columns)]
        whole = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == found.image)
        per[image] = max(1, round(whole / n))
    at = sum(file.metadata.row_group(g).num_rows for g in range(_row_groups(unit, file).start))
    for i in range(n):
        number = f"{at + i:09d}"
        yield Group(number, dict.fromkeys(per, b""), per, {f: f for f in per}, number)


def _compressed(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(c).total_compressed_size for c in range(group.num_columns))


def _known(names: Sequence[str], known: Sequence[str]) -> str:
    """The best known of some names, in any case; empty where there is none."""
    lower = {n.lower(): n for n in reversed(names)}
    return next((lower[k] for k in known if k in lower), "")


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow.types as t

    return t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind)


def _is_image(kind: pa.DataType) -> bool:
    import pyarrow.types as t

    if t.is_struct(kind):
        return any(f.name == "bytes" and _is_binary(f.type) for f in kind)
    return t.is_binary(kind) or t.is_large_binary(kind)


def _bytes_of(column: pa.Array) -> list[bytes | None]:
    import pyarrow.types as t

    if t.is_struct(column.type):
        import pyarrow.compute as pc

        column = pc.struct_field(column, [column.type.get_field_index("bytes")])  # null where the struct is
    return column.to_pylist()


def _values(column: pa.Array) -> list[Any]:
    """The values of a column; text that is not UTF-8 gets U+FFFD for its bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow as pa

        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            data = column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
            return [None if v is None else v.decode("utf-8", "replace") for v in data.to_pylist()]
        return [_value(column[i]) for i in range(len(column))]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: dates as text, bytes left out, numbers that are none as null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value if not isinstance(v, bytes)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _format(data: bytes) -> str:
    """The field under which an image is kept, by its first bytes; what is unknown will not be decoded anyway."""
    return next((field for mark, field in _MAGIC.items() if data.startswith(mark)), "jpg")
