"""What `own_data.py` makes of a user's files, and what it says about each mistake in them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot

from examples.noisy_labels import own_data
from examples.noisy_labels.data import features, images, labels, table
from examples.noisy_labels.data import own as reading
from examples.noisy_labels.data.samples import Samples, hold_out
from examples.noisy_labels.data.task import statistics
from examples.noisy_labels.recipes.models import Corrector
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.run.training import Run
from own_worlds import NAMES, Rows, pictures, points, write, write_trusted

REPOSITORY = Path(__file__).parents[2]


def samples(folder: Path, text: str, trusted: str = "a\nb\n", **chosen: object) -> Samples:
    (folder / "table.csv").write_text(text)
    (folder / "trusted.txt").write_text(trusted)
    place = {"table": str(folder / "table.csv"), "trusted": str(folder / "trusted.txt"), "hold_out": 0.0}
    return reading.read(Options(**place | chosen)).samples  # type: ignore[arg-type]


def test_soft_labels_are_vote_shares(tmp_path: Path) -> None:
    text = "id,x,ann,bob,eve,ted,truth\na,1,no,,,,no\nb,2,yes,,,,yes\nc,3,no,yes,yes,yes,\nd,4,no,,yes,,\ne,5,,,yes,,\n"
    four = ("ann", "bob", "eve", "ted")
    one = samples(tmp_path, text, annotators=four, trusted_column="truth")
    assert one.names == ("no", "yes")
    assert one.given[2:].tolist() == [[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]]
    assert one.majority[one.noisy].tolist() == [1, 0, 1]  # of tied classes the first
    assert one.labels[one.clean].tolist() == [0, 1]
    shuffled = samples(tmp_path, text, annotators=("ted", "ann", "eve", "bob"), trusted_column="truth")
    assert torch.equal(one.votes, shuffled.votes)


def test_the_corrector_is_told_the_votes_of_trusted_samples(tmp_path: Path) -> None:
    text = "id,x,ann,bob,truth\na,1,no,yes,no\nb,2,no,no,yes\nc,3,no,yes,\nf,3,,,no\n"
    one = samples(tmp_path, text, "a\nb\nf\n", annotators=("ann", "bob"), trusted_column="truth")
    told = one.given[one.clean].tolist()
    assert told == [[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]  # b's votes are wrong, and that is the lesson; f has none
    run = Run(Options(table="-", trusted="-", epochs=1, corrupt_clean=0.5, network="mlp"), one)
    assert run.clean.corrupt is not None
    assert run.clean.corrupt.tolist() == [0.0, 0.0, 0.5]


def test_labels_that_show_no_mistake_are_told_at_random(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,x,label\na,1,no\nb,2,yes\nc,3,no\n")
    (tmp_path / "ids.txt").write_text("a\nb\n")
    data = reading.read(Options(table=str(tmp_path / "t.csv"), trusted=str(tmp_path / "ids.txt")))
    assert not data.samples.mistakes_known.any()
    assert "the given labels of all trusted samples are right" in data.notes[-1]
    run = Run(Options(table="-", trusted="-", epochs=1, corrupt_clean=1.0, network="mlp"), data.samples)
    told = torch.stack([next(run.clean).given for _ in range(50)])
    assert 0.3 < told.double().mean().item() < 0.7  # drawn from both classes, whatever the label


def test_integer_classes_are_in_the_order_of_numbers_however_written(tmp_path: Path) -> None:
    text = "id,x,ann,bob,truth\na,1,9.0,,9\nb,2,10,,10\nc,3,2,10.0,\nd,4,2,,2.0\n"
    one = samples(tmp_path, text, "a\nb\nd\n", annotators=("ann", "bob"), trusted_column="truth")
    assert one.names == ("2", "9", "10")
    assert one.given[2].tolist() == [0.5, 0.0, 0.5]
    assert labels.canonical(["3.0", "", "10"]) == ["3", "", "10"]
    assert labels.canonical(["3.0", "x"]) == ["3.0", "x"]
    assert labels.class_names({"10", "9", "2"}) == ("2", "9", "10")
    assert labels.class_names({"b", "10", "a"}) == ("10", "a", "b")


@pytest.mark.parametrize(
    ("delimiter", "head", "decimal"),
    [(",", "\ufeff", "."), (";", "", "."), (";", "\ufeff", ","), ("\t", "", "."), ("|", "", ".")],
)
def test_the_ways_spreadsheets_write_are_read_alike(delimiter: str, head: str, decimal: str, tmp_path: Path) -> None:
    rows = points()
    trusted = str(write_trusted(tmp_path / "trusted.csv", rows))
    plain = reading.read(Options(table=str(write(tmp_path / "plain.csv", rows)), trusted=trusted))
    for row in rows:
        row |= {name: row[name].replace(".", decimal) for name in ("width", "height")}
    file = write(tmp_path / "other.csv", rows, delimiter=delimiter, head=head)
    other = reading.read(Options(table=str(file), trusted=trusted, decimal=decimal))
    assert other.samples.digest() == plain.samples.digest()
    named = reading.read(Options(table=str(file), trusted=trusted, decimal=decimal, delimiter=delimiter))
    assert named.samples.digest() == plain.samples.digest()  # the trusted ids keep their commas


def test_quoted_cells_may_hold_delimiters_and_lines(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('\n"name, full",x,label\n"a ""1"", first",1, "ye\nah"\n\n" b",2,no\n')
    read = table.read(file, delimiter=",")
    columns = {name: read.column(name, "features") for name in read.columns}
    assert columns == {"name, full": ['a "1", first', "b"], "x": ["1", "2"], "label": ["ye\nah", "no"]}
    assert [read.where(row) for row in (0, 1)] == ["t.csv, row 3", "t.csv, row 5"]


def test_a_column_without_a_name_is_no_feature(tmp_path: Path) -> None:
    text = ",x,label\n0,1,no\n1,2,yes\n2,3,no\n"  # as pandas writes its index
    one = samples(tmp_path, text, "1\n2\n")  # without ids, rows are counted from 1
    assert one.ids == ("1", "2", "3")
    assert one.samples.tolist() == [[1], [2], [3]]


def test_features_are_numbers_categories_and_means(tmp_path: Path) -> None:
    text = "id,z,x,colour,label\na,1,5,red,no\nb,NA,6,blue,yes\nc,4,7,,no\nd,100,8,green,yes\n"
    (tmp_path / "test.csv").write_text("id,label\nd,yes\n")
    one = samples(
        tmp_path, text, categorical=("colour",), missing="mean", test=str(tmp_path / "test.csv"), ignore=("id",)
    )
    # Sorted: x, z, colour = blue, colour = red. What the test row has counts neither as a category nor for the mean.
    assert one.samples.tolist() == [[5, 1, 0, 1], [6, 2.5, 1, 0], [7, 4, 0, 0], [8, 100, 0, 0]]
    assert one.test.tolist() == [3]


def test_trusted_labels_are_found_where_the_docs_say(tmp_path: Path) -> None:
    rows = points(12)
    for row in rows:
        row["label"] = "cow" if row["checked"] == "ape" else row["label"]
        row["audit"] = row["checked"]
    file = write(tmp_path / "points.csv", rows, ["id", "width", "height", "label", "audit"])
    ids = [row["id"] for row in rows[:6]]
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n\n")
    (tmp_path / "ids.csv").write_text("\n".join(ids) + "\n")  # a plain list, called .csv
    write_trusted(tmp_path / "labels.csv", rows, 6)
    wanted = [NAMES.index(row["checked"]) for row in rows[:6]]
    for trusted, column in (("ids.txt", "audit"), ("ids.csv", "audit"), ("labels.csv", None), (None, "audit")):
        place = None if trusted is None else str(tmp_path / trusted)
        chosen = Options(
            table=str(file), trusted=place, trusted_column=column, hold_out=0.0, ignore=None if column else ("audit",)
        )
        if trusted is None:  # a cell in the column makes a row trusted
            for row in rows[6:]:
                row["audit"] = ""
            write(file, rows, ["id", "width", "height", "label", "audit"])
        read = reading.read(chosen).samples
        assert read.clean.tolist() == list(range(6))
        assert read.labels[read.clean].tolist() == wanted


def test_what_is_held_out_is_never_trained_on() -> None:
    truth = torch.tensor([0] * 10 + [1] * 3 + [2] * 1 + [-1] * 4)
    trusted = torch.arange(14)
    kept, aside = hold_out(truth, trusted, 0.4, seed=3)
    assert torch.cat([kept, aside]).sort().values.tolist() == list(range(14))
    assert [int((truth[aside] == i).sum()) for i in range(3)] == [4, 1, 0]  # 40 % rounded down, one is always left
    assert not torch.equal(hold_out(truth, trusted, 0.4, seed=4)[1], aside)


def test_standardisation_uses_what_is_trained_on() -> None:
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = statistics(pixels)
    flat = pixels.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean.flatten().double(), flat.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.flatten().double(), flat.std(1, correction=0), rtol=1e-6, atol=0)
    mean, std = statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert (mean.tolist(), std.tolist()) == ([2.0, 5.0], [1.0, 1.0])  # a constant feature is left as it is


def test_the_corrector_of_votes_is_the_plain_one_if_all_agree() -> None:
    torch.manual_seed(0)
    corrector = Corrector(4, 3)
    seen, given = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(corrector(seen, one_hot(given, 3).float()), corrector(seen, given))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_three_channels(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 7), 65535, dtype=np.uint16))
    else:
        image = Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode)
    kind = "tif" if mode in ("CMYK", "I;16") else "png"
    image.save(tmp_path / f"one.{kind}")
    read = images.read([tmp_path / f"one.{kind}"], 8)
    assert read.shape == (1, 3, 8, 8)
    assert read.dtype == torch.uint8
    assert read.min() == 255


def test_images_named_in_a_table(tmp_path: Path) -> None:
    true = pictures(tmp_path / "shapes")
    rows = [{"file": file, "ann": file.split("/")[0], "checked": name} for file, name in true.items()]
    for row in rows[20:]:
        row["checked"] = ""
    file = write(tmp_path / "labels.csv", rows, ["ann", "checked", "file"])
    read = reading.read(
        Options(table=str(file), images=str(tmp_path / "shapes"), label="ann", trusted_column="checked", image_size=12)
    )
    assert read.samples.ids == tuple(true)
    assert read.samples.samples.shape == (48, 3, 12, 12)
    assert len(read.samples.noisy) == 28


# Every mistake: what is done to good files, further arguments, and what the one message must hold.
Damage = Callable[[Rows, Path], None]


def nothing(rows: Rows, folder: Path) -> None:
    pass


def cell(column: str, value: str, row: int = 40) -> Damage:
    return lambda rows, folder: rows[row].__setitem__(column, value)


def trusted_line(text: str) -> Damage:
    def append(rows: Rows, folder: Path) -> None:
        write_trusted(folder / "trusted.csv", points())
        with (folder / "trusted.csv").open("a") as stream:
            stream.write(text + "\n")

    return append


def whole_table(content: bytes) -> Damage:
    return lambda rows, folder: (folder / "raw.csv").write_bytes(content) and None  # type: ignore[func-returns-value]


def every(column: str, value: str) -> Damage:
    def change(rows: Rows, folder: Path) -> None:
        for row in rows:
            row[column] = value

    return change


def misspelt(rows: Rows, folder: Path) -> None:
    rows[40]["label"] = "cwo"


RAW = ["--table", "raw.csv"]
MISTAKES: dict[str, tuple[Damage, list[str], str]] = {
    "no such file": (nothing, ["--table", "nowhere.csv"], "Table(nowhere.csv): there is no such file."),
    "missing column": (
        nothing,
        ["--label", "lable"],
        "Table(points.csv, label='lable'): there is no such column, but id",
    ),
    "missing annotator": (nothing, ["--annotators", "label", "bob"], "annotators='bob'): there is no such column"),
    "missing id column": (nothing, ["--id", "name"], "id='name'): there is no such column"),
    "missing feature": (nothing, ["--features", "depth"], "features='depth'): there is no such column"),
    "label as feature": (nothing, ["--features", "label"], "--features label: is a label or an id, and would give"),
    "no feature": (nothing, ["--ignore", "width", "height"], "no column is left for the features"),
    "unknown trusted id": (
        trusted_line("row999,ape"),
        [],
        "trusted.csv, row 32): the id 'row999' is not in points.csv",
    ),
    "trusted twice": (trusted_line("row003,ape"), [], "trusted.csv, row 32): the id 'row003' is there twice"),
    "trusted without label": (trusted_line("row050,"), [], "row 32): the trusted sample 'row050' has no label"),
    "no trusted file": (nothing, ["--trusted", "nowhere.txt"], "Trusted(nowhere.txt): there is no such file."),
    "trusted names nobody": (nothing, ["--trusted", "empty.txt"], "Trusted(empty.txt): the file names no sample"),
    "trusted and tested": (
        nothing,
        ["--test", "trusted.csv"],
        "'row000' is trusted, that is trained on, and for testing",
    ),
    "all trusted": (nothing, ["--trusted", "all.txt"], "all samples are trusted, so there is nothing to correct"),
    "which annotator": (
        nothing,
        ["--trusted", "all.txt", "--annotators", "label"],
        "of several annotators' columns none is the trusted one",
    ),
    "duplicate ids": (cell("id", "row007"), [], "points.csv, row 42, column 'id'): the id 'row007' is that of row 9"),
    "empty id": (cell("id", ""), [], "points.csv, row 42, column 'id'): has no id"),
    "empty label": (cell("label", ""), [], "points.csv, row 42): 'row040' has no label in label and is not trusted"),
    "class without trusted": (misspelt, [], "class 'cwo'): no sample of the class 'cwo' is trusted (1 rows"),
    "non-numeric cell": (cell("width", "wide"), [], "points.csv, row 42, column 'width'): 'wide' is not a number"),
    "decimal comma": (cell("width", "1,5"), [], "'1,5' is not a number. Decimal commas are read with --decimal ,"),
    "infinite cell": (cell("width", "inf"), [], "row 42, column 'width'): inf is too large"),
    "empty cell": (cell("width", ""), [], "points.csv, row 42, column 'width'): the cell is empty"),
    "empty category": (cell("width", ""), ["--categorical", "width"], "row 42, column 'width'): the cell is empty"),
    "one class": (
        every("label", "ape"),
        ["--trusted", "one.csv"],
        "the labels name 1 class (ape), and two are needed",
    ),
    "empty file": (whole_table(b""), RAW, "Table(raw.csv): the file is empty"),
    "only spaces": (whole_table(b"\n  \n"), RAW, "Table(raw.csv): the file is empty"),
    "only a header": (whole_table(b"id,x,label\n"), RAW, "Table(raw.csv): there is no row after the column names"),
    "ragged row": (whole_table(b"id,x,label\na,1,y\nb,1,y,7\n"), RAW, "row 3): has 4 cells, and the first 3"),
    "column twice": (whole_table(b"id,x,x\na,1,y\n"), RAW, "two columns are called 'x'"),
    "open quote": (whole_table(b'id,x,label\na,"1,y\nb,1,y\n'), RAW, "Most often a quotation mark is not closed"),
    "no text": (whole_table(b"PK\x03\x04\xff\xfe\x00"), RAW, "Table(raw.csv): is not a text in utf-8-sig"),
    "no label column": (whole_table(b"id,x,y\na,1,y\n"), RAW, "no column is called 'label'"),
    "wrong delimiter": (
        nothing,
        ["--delimiter", ";"],
        "the columns are id,width,height,label. If they look wrong, give --delimiter",
    ),
    "no image folder": (nothing, ["--images", "nowhere"], "Images(nowhere): there is no such folder."),
    "image not there": (nothing, ["--images", ".", "--file-column", "id"], "row000): there is no such file."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_message_and_writes_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, arguments, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    rows = points()
    write_trusted(tmp_path / "trusted.csv", rows)
    write(tmp_path / "one.csv", [{"id": "row000", "label": "ape"}], ["id", "label"])
    (tmp_path / "all.txt").write_text("\n".join(row["id"] for row in rows))
    (tmp_path / "empty.txt").write_text("\n")
    damage(rows, tmp_path)
    write(tmp_path / "points.csv", rows)
    before = sorted(tmp_path.iterdir())
    assert own_data.main(["--table", "points.csv", "--trusted", "trusted.csv", *arguments, "--out", "run"]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.err.rstrip().endswith((".", "?", ","))
    assert sorted(tmp_path.iterdir()) == before


def test_an_unreadable_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    true = pictures(tmp_path / "shapes")
    trusted = write(tmp_path / "t.csv", [{"id": f, "label": n} for f, n in list(true.items())[:9]], ["id", "label"])
    command = ["--images", str(tmp_path / "shapes"), "--trusted", str(trusted), "--out", str(tmp_path / "run")]
    whole = next((tmp_path / "shapes").rglob("*.bmp")).read_bytes()
    for content in (b"no image at all", whole[:60], b""):
        broken = tmp_path / "shapes" / "ape" / "broken.bmp"
        broken.write_bytes(content)
        assert own_data.main(command) == 1
        assert "broken.bmp): cannot be read as an image" in capsys.readouterr().err
    broken.unlink()
    (tmp_path / "shapes" / "loose.png").write_bytes(b"")
    assert own_data.main(command) == 1
    assert "loose.png is in no folder, and the folders' names are the labels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to read"),
        (["--table", "a.csv"], "no samples are named as trusted"),
        (["--table", "a.csv", "--trusted", "t", "--label", "x", "--annotators", "y"], "Give one of them"),
        (["--table", "a.csv", "--trusted", "t", "--hold-out", "1"], "must be at least 0 and below 1"),
        (["--table", "a.csv", "--trusted", "t", "--epochs", "0"], "must be at least 1"),
        (["--table", "a.csv", "--trusted", "t", "--network", "small"], "mlp is for tables"),
        (["--table", "a.csv", "--trusted", "t", "--delimiter", ";;"], "must be one character"),
        (["--table", "a.csv", "--trusted", "t", "--method", "magic"], "invalid choice"),
        (["--table", "a.csv", "--trusted", "t", "--lr", "0"], "must be above 0"),
        (["--resume"], "--out is missing"),
        (["--resume", "--out", "nowhere"], "there is no run to resume"),
        (["--config", "nowhere.json"], "No such file"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        own_data.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.program
def test_the_script_can_be_started_by_its_path(tmp_path: Path) -> None:
    script = str(REPOSITORY / "examples" / "noisy_labels" / "own_data.py")
    command = [sys.executable, script, "--table", "nowhere.csv", "--trusted", "t.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Table(nowhere.csv): there is no such file.\n")


def test_too_many_categories_are_refused(tmp_path: Path) -> None:
    rows = [{"id": str(i), "name": f"n{i}", "label": "no" if i % 2 else "yes"} for i in range(300)]
    file = write(tmp_path / "t.csv", rows, ["id", "name", "label"])
    (tmp_path / "ids.txt").write_text("0\n1\n")
    with pytest.raises(ValueError, match="has 300 categories, and at most 200 are sensible"):
        reading.read(Options(table=str(file), trusted=str(tmp_path / "ids.txt"), categorical=("name",)))
    assert features.MANY_CATEGORIES == 200


def test_samples_are_the_same_whatever_is_left_to_be_resolved(tmp_path: Path) -> None:
    # A resumed run reads its files with options that the first one had filled in; else it would refuse its own samples.
    rows = points()
    table, trusted = str(write(tmp_path / "t.csv", rows)), str(write_trusted(tmp_path / "trusted.csv", rows))
    options = Options(table=table, trusted=trusted)
    first, again = (reading.read(one).samples for one in (options, options.resolved(60)))
    assert first.digest() == again.digest()
    assert first.digest() != reading.read(Options(table=table, trusted=trusted, ignore=("width",))).samples.digest()
