"""Everything that decides a run on own data: one table of options, for the command line and the saved configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.noisy_labels.run import command_line, configuration, files
from examples.noisy_labels.run.configuration import CONFIGURATION, of_saved_run
from examples.noisy_labels.run.declaration import LARGEST_SEED, check, flag, option, plain
from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.verdict.classifiers import NAMED, makers
from examples.noisy_labels.verdict.ways import BEST, WAYS

METHODS = ("ebomlc", "ce", "clean", "ce-clean")
NETWORKS = ("auto", "mlp", "small", "resnet32")
ENOUGH_STEPS = 1000  # small tables are gone through so often that there are this many steps
EPOCHS = 20  # at least, however long the table
HELD_OUT = 0.2
CORRUPT_IF_TOLD = 0.5  # see `Options.corrupt`

OWN = ("out", "config", "resume", "overwrite")  # not part of the configuration
FREE_ON_RESUME = {"table", "images", "trusted", "test", "device", "log_interval"}  # the samples themselves are compared
EPILOG = """examples:
  own_data.py --table crowd.csv --annotators annotator_1 annotator_2 annotator_3 --trusted trusted.csv
  own_data.py --table labels.csv --label diagnosis --trusted ids.txt --trusted-column checked --categorical ward
  own_data.py --images photos --trusted trusted.csv              the folders in photos/ are the classes
  own_data.py --images photos --table labels.csv --trusted ids.txt --trusted-column checked
  own_data.py --resume --out runs/crowd                          go on where it stopped
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The resolved configuration of one run. A run can be repeated from it alone, given the same files."""

    table: str | None = option(None, "CSV file, a row for each sample")
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
    classifier: tuple[str, ...] = option(
        ("auto",),
        f"for tables, of the simple ways: {', '.join(NAMED)}, or any of scikit-learn's, as sklearn.svm.SVC",
        kind=tuple,
    )
    folds: int = option(5, "parts of the trusted samples that judge in turn; 0: no verdict", kind=int, within="[0, 50]")
    precision: float = option(
        0.95, "share of labels that shall be right among those that need no check", kind=float, within="(0, 1)"
    )
    check: int = option(50, "how many samples check_next.csv names", kind=int, within="[0, inf)")
    way: str | None = option(None, "the way whose labels are written; best: the one that looks best [the verdict's]")
    image_size: int = option(32, "width and height to which images are resized", kind=int, within="[8, 1024]")
    augment: bool = option(True, "random crops and mirror images, of images only", kind=bool)
    delimiter: str | None = option(None, "what separates cells [found in the first line: , ; tab or |]")
    decimal: str = option(".", "what separates the decimals of a number", (".", ","))
    encoding: str = option("utf-8-sig", "encoding of CSV and text files")
    method: str = option("ebomlc", "what is trained", METHODS)
    network: str = option("auto", "classifier [mlp for tables, small for images]", NETWORKS)
    epochs: int | None = option(
        None,
        f"passes over the noisy samples [as many as give {ENOUGH_STEPS} steps, at least {EPOCHS}]",
        kind=int,
        within="[1, inf)",
    )
    batch_size: int = option(100, "samples per batch, noisy ones and trusted ones", kind=int, within="[1, inf)")
    lr: float = option(0.1, "learning rate of the classifier's SGD", kind=float, within="(0, inf)")
    momentum: float = option(0.9, "momentum of the classifier's SGD", kind=float, within="[0, 1)")
    weight_decay: float = option(5e-4, "weight decay of the classifier's SGD", kind=float, within="[0, inf)")
    meta_lr: float = option(1e-3, "learning rate of the corrector's Adam", kind=float, within="(0, inf)")
    delta: float = option(1.0, "strength of the barrier (ebomlc)", kind=float, within="[0, inf)")
    xi: float = option(1.0, "damping of the multiplier (ebomlc)", kind=float, within="[0, inf)")
    rho: float = option(
        0.2, "weight of the classifier in the mixture on trusted samples (ebomlc)", kind=float, within="[0, 1]"
    )
    mixture: str = option("probability", "what rho mixes (ebomlc)", ("probability", "log"))
    corrupt: float = option(
        CORRUPT_IF_TOLD,
        "share of random labels told to the corrector, for trusted samples whose mistaken label is not known",
        kind=float,
        within="[0, 1]",
    )
    seed: int = option(
        1, "decides what is held out, first weights, order and crops", kind=int, within=f"[0, {LARGEST_SEED}]"
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes CUDA if there is one")
    log_interval: int = option(50, "steps between two step records in the log", kind=int, within="[1, inf)")

    def __post_init__(self) -> None:
        check(self)
        if self.delimiter is not None and len(self.delimiter.replace("\\t", "\t")) != 1:
            raise ValueError(f"--delimiter {self.delimiter!r}: must be one character, or \\t.")
        self._check_columns()
        if self.table is None and self.images is None:
            raise ValueError("own_data: there is nothing to read. Give --table FILE, --images FOLDER or both.")
        if self.label is not None and self.annotators is not None:
            raise ValueError("--label, --annotators: labels come from one column or from several. Give one of them.")
        if self.trusted is None and self.trusted_column is None:
            rule = "which samples are trusted is not said. Correction needs some labels that are known to be right"
            raise ValueError(f"own_data: {rule}. Give --trusted FILE, or --trusted-column COLUMN.")
        if self.folds == 1:
            raise ValueError("--folds 1: must be at least 2, or 0 for no verdict.")
        if self.way is not None and self.way not in (BEST, *WAYS, self.method):
            raise ValueError(f"--way {self.way}: must be {BEST}, {', '.join(WAYS)} or the --method, {self.method}.")
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
    def drops(self) -> list[int]:
        """Return the epochs after which the learning rate is divided by 10."""
        epochs = self.epochs or EPOCHS
        return [2 * epochs // 3, 5 * epochs // 6]

    @property
    def source(self) -> str:
        """Return what the samples are called in titles."""
        return Path(self.images or self.table or "").name

    def resolved(self, noisy: int) -> Options:
        """Fill in what depends on the number of noisy samples."""
        steps = max(1, noisy // self.batch_size)
        epochs = self.epochs or max(EPOCHS, -(-ENOUGH_STEPS // steps))
        kind = "small" if self.images else "mlp"
        return dataclasses.replace(self, epochs=epochs, network=kind if self.network == "auto" else self.network)

    def save(self, file: Path) -> None:
        """Write the configuration as JSON, one option a line."""
        with replacing(file) as stream:
            stream.write((json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())


@dataclass(frozen=True)
class Command:
    """What one call of the program shall do."""

    options: Options
    out: Path
    resume: bool
    overwrite: bool


def from_dict(values: dict[str, Any]) -> Options:
    """Build options from what JSON gives back: lists become tuples, unknown names are refused."""
    return Options(**plain(Options, values))


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Read the command line; on a mistake, print what is wrong and exit with code 2."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    own = {name: given.pop(name) for name in OWN}
    try:
        given = (configuration.read(own["config"]) if own["config"] else {}) | given
        if own["out"]:
            files.refuse_unusable(own["out"])
        if own["resume"] == "required" or (own["resume"] and own["out"] and (own["out"] / CONFIGURATION).is_file()):
            return Command(_saved(own["out"], given), own["out"], resume=True, overwrite=own["overwrite"])
        options = from_dict(given)
        command_line.device(options.device)
        makers(options.classifier, options.seed)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    out = own["out"] or Path("runs") / f"{Path(options.source).stem}-{options.method}-seed{options.seed}"
    if own["resume"] and (out / CONFIGURATION).is_file():
        try:
            return Command(_saved(out, given), out, resume=True, overwrite=own["overwrite"])
        except (ValueError, OSError) as problem:
            parser.error(str(problem))
    return Command(options, out, resume=False, overwrite=own["overwrite"] or bool(own["resume"]))


def _saved(folder: Path | None, given: dict[str, Any]) -> Options:
    """Return the options of the run to be resumed; what is said explicitly must agree with them."""
    if folder is None:
        raise ValueError("--resume: which run is not said. Give its --out, or use --resume auto to start one.")
    return from_dict(of_saved_run(folder, given, FREE_ON_RESUME))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="own_data.py",
        description="Correct the labels of a table or an image folder, with a few labels that are known to be right.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_argument_group("the program")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="where everything is written [runs/...]")
    run.add_argument("--config", type=Path, metavar="FILE", help="take the options from a saved configuration")
    run.add_argument(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        help="go on; auto: start if there is nothing",
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    group = parser.add_argument_group("the data and the training")
    for one in dataclasses.fields(Options):
        kind = one.metadata["kind"]
        words = one.metadata["description"] + ("" if one.default is None else f" [{one.default}]")
        common = {"default": argparse.SUPPRESS, "help": words.replace("%", "%%")}
        if kind is bool:
            group.add_argument(flag(one.name), action=argparse.BooleanOptionalAction, **common)
        elif one.metadata["choices"]:
            group.add_argument(flag(one.name), choices=one.metadata["choices"], **common)
        elif kind is tuple:
            group.add_argument(flag(one.name), nargs="+", action=_Names, metavar="COLUMN", **common)
        else:
            group.add_argument(flag(one.name), type=kind, metavar=kind.__name__.upper(), **common)
    return parser


class _Names(argparse.Action):
    """Collects column names into a tuple, as they are in a saved configuration."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values or ()))
