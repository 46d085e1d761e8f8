"""Runs that are killed at random moments, again and again, end with the numbers of one that was left alone."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no signals that a program can be sent", allow_module_level=True)

from examples.noisy_labels.run import checkpoint, files, interruption
from killing import End, assert_same, log_of, run

pytestmark = pytest.mark.kill

SETTING = ["--dataset", "digits", "--log-interval", "5", "--corrupt-clean", "0.2"]
SHORT = [*SETTING, "--epochs", "3"]
LONG = [*SETTING, "--epochs", "12"]


def finish(command: list[str], out: Path, *, draw: bool = False) -> End:
    """Go on until the run ends by itself."""
    end = run([*command, "--resume", "auto", "--out", str(out)], out.with_suffix(".process"), draw=draw)
    assert end.code == 0, end.errors
    return end


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody disturbs, and how long it took."""
    return undisturbed(SHORT, tmp_path_factory)


def undisturbed(
    command: list[str], tmp_path_factory: pytest.TempPathFactory, *, draw: bool = False
) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("whole")
    finish(command, folder / "first", draw=draw)  # the first process also waits for the imports
    return folder / "first", finish(command, folder / "second", draw=draw).seconds


def torment(
    command: list[str], out: Path, seconds: float, kills: int, source: random.Random, *, draw: bool = False
) -> list[int]:
    """Kill and restart a run so many times, at random moments; then let it end. Return the exit codes."""
    codes = []
    for _ in range(kills):
        number = source.choice([signal.SIGTERM, signal.SIGKILL])
        end = run(
            [*command, "--resume", "auto", "--out", str(out)],
            out.with_suffix(".process"),
            number,
            after=source.uniform(0, 1.1 * seconds),
            draw=draw,
        )
        # A signal that comes before the program listens, or as it leaves, acts as usual.
        assert end.code in (0, interruption.EXIT_CODE, -signal.SIGTERM, -signal.SIGKILL), end.errors
        assert end.code != interruption.EXIT_CODE or "to go on: --resume" in end.errors
        codes.append(end.code)
    finish(command, out, draw=draw)
    return codes


def test_kills_at_random_moments_change_no_number(whole: tuple[Path, float], tmp_path: Path) -> None:
    torment(SHORT, tmp_path / "run", whole[1], kills=5, source=random.Random(7))
    assert_same(whole[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_at_random_moments_change_no_number(
    seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    long, seconds = undisturbed(LONG, tmp_path_factory, draw=True)
    codes = torment(LONG, tmp_path / "run", seconds, kills=12, source=random.Random(seed), draw=True)
    assert len(set(codes)) >= 2, "the moments do not vary"
    assert_same(long, tmp_path / "run")


# Moments that are short, and found by what is on the disk just then: in the first epoch, while the checkpoint is being
# written, while each result is being written.
SLOW = pytest.mark.slow
MOMENTS = [
    pytest.param("config.json" + files.UNFINISHED, marks=SLOW),
    pytest.param("config.json", marks=SLOW),
    "log.jsonl",
    checkpoint.NAME + files.UNFINISHED,
    pytest.param(checkpoint.NAME, marks=SLOW),
    pytest.param("corrected_labels.csv" + files.UNFINISHED, marks=SLOW),
    "curves.png" + files.UNFINISHED,
    pytest.param("labels.png" + files.UNFINISHED, marks=SLOW),
    pytest.param("suspicious.png", marks=SLOW),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_a_chosen_moment_changes_no_number(
    moment: str, number: signal.Signals, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    drawn = moment.endswith(("png", "png" + files.UNFINISHED))
    end = run([*SHORT, "--out", str(out)], tmp_path / "process", number, after=out / moment, draw=drawn)
    # A signal that comes as the program leaves acts as usual; so does one that comes too late.
    assert end.code in (0, interruption.EXIT_CODE, -number), end.errors
    if number == signal.SIGTERM and "suspicious" not in moment:
        assert end.code == interruption.EXIT_CODE, end.errors
        assert (out / checkpoint.NAME).is_file(), "an orderly stop saves"
    finish(SHORT, out)
    assert_same(whole[0], out)
    assert log_of(out)[-1]["event"] == "end"
