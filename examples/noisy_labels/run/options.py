"""Everything that decides a run on own data: the options of training, and those that say what is in the files."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from examples.noisy_labels.run import files
from examples.noisy_labels.run.command_line import Start, device, goes_on, of_saved_run, parsed, parser_of, read
from examples.noisy_labels.run.declaration import add_arguments, flag, option, plain
from examples.noisy_labels.run.settings import Training
from examples.noisy_labels.verdict.classifiers import NAMED, makers
from examples.noisy_labels.verdict.together import TOGETHER
from examples.noisy_labels.verdict.ways import BEST, VERDICT, WAYS

SOFT = ("ebomlc", "ebomlc-difference", "mlc-d", "mlc", "ce", "clean", "ce-clean", "ce-mixed")  # for shares of votes too
METHODS = (*SOFT, "em", "ours")
NETWORKS = ("auto", "mlp", "small", "resnet32")
ENOUGH_STEPS = 1000  # small tables are gone through so often that there are this many steps
EPOCHS = 20  # at least, however long the table
HELD_OUT = 0.2
EPILOG = """examples:
  own_data.py --table crowd.csv --annotators annotator_1 annotator_2 annotator_3 --trusted trusted.csv
  own_data.py --table labels.csv --label diagnosis --trusted ids.txt --trusted-column checked --categorical ward
  own_data.py --images photos --trusted trusted.csv              the folders in photos/ are the classes
  own_data.py --images photos --table labels.csv --trusted ids.txt --trusted-column checked
  own_data.py --resume --out runs/crowd                          go on where it stopped
"""


@dataclass(frozen=True, kw_only=True)
class Options(Training):
    """The resolved configuration of one run. A run can be repeated from it alone, given the same files."""

    headings: ClassVar[dict[str, str]] = Training.headings | {
        "delta": "losses and bilevel step",
        "table": "the data",
        "folds": "the verdict",
    }
    # The samples themselves are compared instead of the names of their files.
    free_on_resume: ClassVar[set[str]] = Training.free_on_resume | {"table", "images", "trusted", "test"}
    checkpoints: ClassVar[int] = 10

    method: str = option("ebomlc", "what is trained; see methods.py", METHODS)
    network: str = option("auto", "classifier [mlp for tables, small for images]", NETWORKS)
    epochs: int = option(
        None,
        f"passes over the noisy samples [as many as give {ENOUGH_STEPS} steps, at least {EPOCHS}]",
        kind=int,
        within="[1, inf)",
    )
    meta_lr: float = option(1e-3, "learning rate of the corrector's Adam", kind=float, within="(0, inf)")
    delta: float = option(1.0, "strength of the barrier", kind=float, within="[0, inf)")
    xi: float = option(1.0, "damping of the multiplier (ebomlc)", kind=float, within="[0, inf)")
    corrupt_clean: float = option(
        0.5,
        "share of random labels told to the corrector, for trusted samples whose mistaken label is not known",
        kind=float,
        within="[0, 1]",
    )
    table: str | None = option(None, "CSV or Parquet file, a row for each sample")
    images: str | None = option(None, "folder of images; without --table the folders in it are the classes")
    label: str | None = option(None, "column of labels ['label', if there is one]")
    annotators: tuple[str, ...] | None = option(None, "several columns of labels, cells may be empty", kind=tuple)
    id: str | None = option(None, "column that names the samples ['id', if there is one, or else the row from 1 on]")
    trusted: str | None = option(None, "file with the ids of trusted samples: one a line, or CSV with id and label")
    trusted_column: str | None = option(None, "column of trusted labels, in --trusted or in --table [see the docs]")
    test: str | None = option(None, "file like --trusted: samples to measure with, never trained on")
    hold_out: float | None = option(
        None,
        f"share of trusted samples of each class that nothing is trained on [0 with a verdict, else {HELD_OUT}]",
        kind=float,
        within="[0, 1)",
    )
    suspicious: str | None = option(
        None, "file with the ids of trusted samples that were checked because they looked wrong: they do not judge"
    )
    groups: str | None = option(None, "column that says what belongs together, such as the patient")
    features: tuple[str, ...] | None = option(
        None, "columns that are features [all that nothing else uses]", kind=tuple
    )
    ignore: tuple[str, ...] | None = option(None, "columns that are not features", kind=tuple)
    categorical: tuple[str, ...] | None = option(None, "columns of text or codes, to be one-hot encoded", kind=tuple)
    missing: str = option("refuse", "empty cells of features: an error, or filled with the mean", ("refuse", "mean"))
    file_column: str = option("file", "column with the file of each image, relative to --images")
    image_size: int = option(32, "width and height to which images are resized", kind=int, within="[8, 1024]")
    delimiter: str | None = option(None, "what separates cells [found in the first line: , ; tab or |]")
    decimal: str = option(".", "what separates the decimals of a number", (".", ","))
    encoding: str = option("utf-8-sig", "encoding of CSV and text files")
    folds: int = option(5, "parts of the trusted samples that judge in turn; 0: no verdict", kind=int, within="[0, 50]")
    precision: float = option(
        0.95, "share of labels that shall be right among those that need no check", kind=float, within="(0, 1)"
    )
    check: int = option(50, "how many samples check_next.csv names", kind=int, within="[0, inf)")
    way: str | None = option(
        None,
        "whose labels are written: a way, best, verdict (the simplest good one) [together: the mean of all]",
    )
    classifier: tuple[str, ...] = option(
        ("auto",),
        f"for tables, of the simple ways: {', '.join(NAMED)}, or any of scikit-learn's, as sklearn.svm.SVC",
        kind=tuple,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delimiter is not None and len(self.delimiter.replace("\\t", "\t")) != 1:
            raise ValueError(f"--delimiter {self.delimiter!r}: must be one character, or \\t.")
        try:
            codecs.lookup(self.encoding)
        except (LookupError, ValueError):
            rule = "is no encoding that Python knows. Use utf-8 or, for example, cp1252"
            raise ValueError(f"--encoding {self.encoding}: {rule}.") from None
        self._check_columns()
        if self.table is None and self.images is None:
            raise ValueError("own_data: there is nothing to read. Give --table FILE, --images FOLDER or both.")
        if self.label is not None and self.annotators is not None:
            raise ValueError("--label, --annotators: labels come from one column or from several. Give one of them.")
        if self.annotators is not None and self.method not in SOFT:
            rule = "counts labels, and several annotators give shares of them"
            raise ValueError(f"--method {self.method}: {rule}. With --annotators use one of {', '.join(SOFT)}.")
        if self.trusted is None and self.trusted_column is None:
            rule = "no samples are named as trusted. Correction needs some labels that are known to be right"
            raise ValueError(f"own_data: {rule}. Give --trusted FILE, or --trusted-column COLUMN.")
        if self.folds == 1:
            raise ValueError("--folds 1: must be at least 2, or 0 for no verdict.")
        if self.way is not None and self.way not in (known := (BEST, VERDICT, TOGETHER, *WAYS)) + (self.method,):
            raise ValueError(f"--way {self.way}: must be {', '.join(known)} or the --method, {self.method}.")
        if self.way is not None and not self.folds:
            raise ValueError(f"--way {self.way}: is judged in folds. Leave out --folds 0.")
        if self.groups is not None and self.table is None:
            raise ValueError(f"--groups {self.groups}: is a column of --table. Give one.")
        if self.images is not None and self.classifier != ("auto",):
            raise ValueError("--classifier: is for tables. Images are classified by --network.")
        if (self.network == "mlp") == (self.images is not None) and self.network != "auto":
            raise ValueError(f"--network {self.network}: mlp is for tables, the others for images.")

    def _check_columns(self) -> None:
        """Refuse columns that are named twice, or for two things that exclude each other."""
        lists = ("annotators", "features", "ignore", "categorical")
        named = {name: getattr(self, name) or () for name in lists}
        for name, columns in named.items():
            if len(set(columns)) < len(columns):
                raise ValueError(f"{flag(name)} {' '.join(columns)}: a column is named twice. Name each once.")
        for one, other in (("features", "ignore"), ("categorical", "ignore"), ("categorical", "annotators")):
            if both := sorted(set(named[one]) & set(named[other])):
                raise ValueError(f"{flag(one)} {both[0]}: is named in {flag(other)} too. Name it in one of them.")
        answers = {self.label, self.trusted_column, *named["annotators"]} - {None}
        if both := sorted(answers & {*named["features"], *named["categorical"]}):
            raise ValueError(f"--features {both[0]}: is a label, and would give the answer away. Leave it out.")

    @property
    def held_out_share(self) -> float:
        """Return the share of trusted samples that is held out: none where a verdict lets all of them judge."""
        if self.hold_out is not None:
            return self.hold_out
        return 0.0 if self.folds else HELD_OUT

    @property
    def title(self) -> str:
        """Return what the samples are called."""
        return Path(self.images or self.table or "").name

    @property
    def folder_name(self) -> str:
        """Return a folder name that tells runs of different files, methods and seeds apart."""
        return f"{Path(self.title).stem}-{self.method}-seed{self.seed}"

    def resolved(self, noisy: int) -> Options:
        """Fill in what depends on the number of noisy samples, and on whether there are images."""
        steps, images = max(1, noisy // self.batch_size), self.images is not None
        epochs = self.epochs or max(EPOCHS, -(-ENOUGH_STEPS // steps))
        network = ("small" if images else "mlp") if self.network == "auto" else self.network
        return dataclasses.replace(self, epochs=epochs, network=network, augment=self.augment and images)


def parse(arguments: Sequence[str] | None = None) -> Start[Options]:
    """Read the command line; on a mistake, print what is wrong and exit with code 2."""
    description = "Correct the labels of a table or an image folder, with a few labels that are known to be right."
    parser, _ = parser_of("own_data.py", description, EPILOG)
    add_arguments(parser, Options)
    own, given = parsed(parser, arguments, Options)
    out: Path | None = own["out"]
    try:
        explicit = (read(own["config"]) if own["config"] else {}) | given
        if out is not None:
            files.refuse_unusable(out)
        elif own["resume"] == "required":
            raise ValueError("--resume: --out is missing. Say which run goes on, or use --resume auto to start one.")
        if out is not None and goes_on(out, own["resume"]):
            explicit = of_saved_run(out, explicit, Options)
        options = from_dict(explicit)
        if out is None:
            out = Path("runs") / options.folder_name
            files.refuse_unusable(out)
            if goes_on(out, own["resume"]):
                options = from_dict(of_saved_run(out, explicit, Options))
        device(options.device)
        makers(options.classifier, options.seed)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    return Start(options, out, goes_on(out, own["resume"]), own["overwrite"] or own["resume"] == "auto")


def from_dict(values: dict[str, object]) -> Options:
    """Build options from what JSON gives back: lists become tuples, unknown names are refused."""
    return Options(**plain(Options, values))
