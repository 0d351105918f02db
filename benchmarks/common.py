"""What the benchmarks share: options, timing in turn, targets, the machine, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from detachnet.deploy.profile import alternate
from detachnet.machine import find_device, hardware, versions
from detachnet.text import Table
from detachnet.training.recipe import Recipe
from detachnet.training.runs import RunFolder
from detachnet.training.trainer import train

Row = dict[str, Any]
"""One line of a table: name of a column → text, number or None. Names end in their unit."""


def arguments(doc: str | None, fixed: bool = False) -> argparse.ArgumentParser:
    """The options every benchmark has; `fixed` ones always run on one thread of the CPU."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, about a minute at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    if fixed:
        parser.set_defaults(device=torch.device("cpu"), threads=1)
    else:
        parser.add_argument("--device", type=find_device, default=torch.device("cpu"), help="cpu or cuda")
        parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    return parser


def begin(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options and set the number of threads."""
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    return options


@dataclass(frozen=True)
class Timing:
    """Seconds of alternatives that ran in turn, round by round."""

    seconds: Mapping[str, Sequence[float]]

    @property
    def n(self) -> int:
        """Rounds."""
        return len(next(iter(self.seconds.values())))

    def median_ms(self, name: str) -> float:
        """The median round of one alternative, in milliseconds."""
        return 1e3 * median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """The median of the rounds' ratios: what else the machine does meets both sides of each alike."""
        return median(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))


def time_in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = 3,
    most: int = 1000,
) -> Timing:
    """Run alternatives in turn, for about so many seconds but at least `least` rounds, after a warm-up.

    A B A B … in the first half of the rounds, B A B A … in the second: each has another before it. A CUDA device
    is waited for in every run.
    """

    def waited_for(run: Callable[[], object]) -> Callable[[], object]:
        def run_and_wait() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run_and_wait

    waiting = {name: waited_for(run) for name, run in runs.items()}
    one_round = sum(times[0] for times in alternate(waiting, n=1, warmup=1).values())
    n = min(most, max(least, int(seconds / one_round)))
    there = alternate(waiting, n - n // 2, warmup=n // 10)
    back = alternate(dict(reversed(waiting.items())), n // 2, warmup=0)
    return Timing({name: there[name] + back[name] for name in runs})


def trained(recipe: Recipe, folder: Path, data_root: str | None = None) -> RunFolder:
    """The run of a recipe in a folder, trained unless it is; where that was stopped, all stops."""
    run = RunFolder(folder)
    if not run.results.exists():
        result = train(recipe, folder, data_root=data_root, resume=run.recipe.exists())
        if result.status != "finished":
            raise SystemExit("stopped: the same command goes on from here")
    return run


@dataclass(frozen=True)
class Target:
    """A figure and the limit it should keep.

    Attributes:
        what: Which figure, with its case.
        value: As measured.
        limit: At most that; at least that with `at_least`.
        at_least: See there.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the limit is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        word, side = "met    " if self.met else "not met", "at least" if self.at_least else "at most"
        return f"{word}  {self.what}: {text(self.value)} ({side} {text(self.limit)})"


def report(options: argparse.Namespace, rows: Sequence[Row], targets: Sequence[Target] = (), **more: Any) -> None:
    """Print rows, targets and machine; write all of it where `--json` says."""
    machine, packages = describe(options)
    lines = [*table(rows), *map(str, targets)]
    lines += ["; ".join(f"{key} {value}" for key, value in part.items()) for part in (machine, packages)]
    print("\n".join(lines), flush=True)
    write(options, rows, targets, **more)


def write(options: argparse.Namespace, rows: Sequence[Row], targets: Sequence[Target] = (), **more: Any) -> None:
    """The result as JSON where `--json` says; `more` is of a benchmark's own."""
    if options.json is None:
        return
    machine, packages = describe(options)
    judged = [asdict(target) | {"met": target.met} for target in targets]
    result = {"date": date.today().isoformat(), "quick": options.quick, "rows": rows, "targets": judged, **more}
    result |= {"hardware": machine, "versions": packages}
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def describe(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """The machine with the threads used of it, and the versions of what ran."""
    machine = hardware(options.device) | {"threads": str(options.threads)}
    return machine, versions("torch", "torchvision", "timm")


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as lines with aligned columns, headed by their keys."""
    if not rows:
        return []
    header = tuple(key.replace("_", " ") for key in rows[0])
    return Table(header, tuple(tuple(text(v) for v in row.values()) for row in rows)).lines()


def text(value: object) -> str:
    """A cell: nothing for None, three decimals at most for a number."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3f}"
