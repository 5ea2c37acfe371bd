"""What a preflight asks and what it tells: a check, where it is made, and the report of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from configs.errors import UserError
from configs.layout import layout_faults
from configs.run import RunConfig
from parallel.topology import Topology

Status = Literal["ok", "warn", "no", "left out"]
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One answer.

    Attributes:
        found: what was met, with numbers.
        remedy: what to type or change; empty where all is well.
        numbers: the same for programs.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Where:
    """On which rank a check is made, and for which run.

    Attributes:
        topology: of the ranks that are here, which may be fewer than the run is meant for.
        ranks_meant: as many as the run is meant for.
        hosts: the machine of each rank that is here.
    """

    config: RunConfig
    topology: Topology
    device: torch.device
    local_world_size: int
    ranks_meant: int
    quick: bool
    hosts: tuple[str, ...]

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def num_ranks(self) -> int:
        return len(self.hosts)

    @cached_property
    def is_first_of_host(self) -> bool:
        return self.hosts.index(self.hosts[self.rank]) == self.rank

    @cached_property
    def layout_faults(self) -> list[str]:
        return layout_faults(self.config, self.ranks_meant)

    @property
    def is_whole(self) -> bool:
        """Whether the ranks that are here are those the run is meant for."""
        return self.num_ranks == self.ranks_meant

    def place(self, ranks: Iterable[int]) -> str:
        """ "ranks 0-3, 6 on node1, node2" """
        listed = sorted(ranks)
        if len(listed) == self.num_ranks and self.num_ranks > 1:
            return "every rank"
        hosts = list(dict.fromkeys(self.hosts[rank] for rank in listed))
        shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        return f"rank{'s' * (len(listed) > 1)} {spans(listed)} on {shown}"


@dataclass(frozen=True)
class Step:
    """A look that every rank takes, and what rank 0 makes of all they saw.

    Attributes:
        look: may use collectives, so it must not end early on some ranks; a UserError or OSError out of it is a no.
        judge: given what each rank saw, in order.
    """

    name: str
    look: Callable[[Where], Any]
    judge: Callable[[Where, list[Any]], list[Check]]


@dataclass(frozen=True)
class Report:
    """All answers of one preflight. `step_seconds`: what each look took, by its name."""

    name: str
    layout: str
    ranks: int
    checks: tuple[Check, ...]
    seconds: float
    step_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.status != "no" for check in self.checks)

    def refusal(self) -> UserError | None:
        """All noes as one error; None where nothing speaks against the run."""
        noes = [check for check in self.checks if check.status == "no"]
        if not noes:
            return None
        found = "; ".join(f"{check.name}: {check.found}" for check in noes)
        remedies = "; ".join(dict.fromkeys(check.remedy for check in noes if check.remedy))
        return UserError(found, "a preflight without a no", remedies)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layout": self.layout,
            "ranks": self.ranks,
            "passed": self.passed,
            "seconds": round(self.seconds, 2),
            "step_seconds": {name: round(took, 3) for name, took in self.step_seconds.items()},
            "checks": [dict(vars(check)) for check in self.checks],
        }


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first + 1 else ", ".join(map(str, sorted({first, last})))
                     for first, last in runs)  # fmt: skip


def told_by(where: Where, words: Mapping[int, Iterable[str]]) -> str:
    """What ranks have to say, each text once, with those who say it."""
    ranks: dict[str, list[int]] = {}
    for rank, texts in words.items():
        for text in texts:
            ranks.setdefault(text, []).append(rank)
    alone = where.num_ranks == 1
    shown = [text if alone else f"{text} ({where.place(who)})" for text, who in ranks.items()]
    return "; ".join(shown[:6]) + (f"; and {len(shown) - 6} more" if len(shown) > 6 else "")


def gib(count: float) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"
