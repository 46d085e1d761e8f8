"""Small files such as a user might bring: three clouds of points, and pictures of three shapes."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

CENTRES = {"ape": (0.0, 0.0), "bee": (6.0, 0.0), "cow": (0.0, 6.0)}
NAMES = tuple(CENTRES)

Rows = list[dict[str, str]]


def points(number: int = 90, wrong: float = 0.2, seed: int = 0) -> Rows:
    """Return rows with ``id``, features ``width`` and ``height``, ``label`` as given, ``checked`` as it is."""
    source = random.Random(seed)
    rows = []
    for i in range(number):
        true = NAMES[i % len(NAMES)]
        given = source.choice([one for one in NAMES if one != true]) if source.random() < wrong else true
        width, height = (centre + source.gauss(0, 0.7) for centre in CENTRES[true])
        rows.append(
            {"id": f"row{i:03d}", "width": f"{width:.4f}", "height": f"{height:.4f}", "label": given, "checked": true}
        )
    return rows


def write(file: Path, rows: Rows, columns: list[str] | None = None, delimiter: str = ",", head: str = "") -> Path:
    """Write rows as CSV: some columns in some order."""
    columns = columns or ["id", "width", "height", "label"]
    with file.open("w", newline="", encoding="utf-8") as stream:
        stream.write(head)
        writer = csv.DictWriter(stream, columns, delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_trusted(file: Path, rows: Rows, number: int = 30) -> Path:
    """Write ids and true labels of the first rows."""
    return write(file, [{"id": row["id"], "label": row["checked"]} for row in rows[:number]], ["id", "label"])


def read(file: Path) -> Rows:
    """Return the rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def pictures(folder: Path, number: int = 48, wrong: float = 0.2, seed: int = 0) -> dict[str, str]:
    """Write images of several sizes, modes and formats, in folders of their given labels; return the true ones."""
    source = random.Random(seed)
    true = {}
    for i in range(number):
        name = NAMES[i % len(NAMES)]
        given = source.choice([one for one in NAMES if one != name]) if source.random() < wrong else name
        size = (source.randint(12, 40), source.randint(12, 40))
        image = Image.new("L", size, 30)
        draw, radius = ImageDraw.Draw(image), min(size) // 3
        x, y = size[0] // 2, size[1] // 2
        box = [x - radius, y - radius, x + radius, y + radius]
        if name == "ape":
            draw.rectangle(box, fill=230)
        elif name == "bee":
            draw.line(box, fill=230, width=2)
        file = folder / given / f"{i:02d}.{source.choice(['png', 'jpg', 'bmp'])}"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.convert(source.choice(["L", "RGB"])).save(file)
        true[file.relative_to(folder).as_posix()] = name
    return true
