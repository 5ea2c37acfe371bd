"""How many nodes a run takes: from its layout or from what was asked, and what would work where the two disagree."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import UserError
from configs.layout import layout_faults, nearest_layout
from configs.run import RunConfig
from configs.site import SiteConfig


@dataclass(frozen=True)
class Nodes:
    count: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        return self.count * self.ranks_per_node


def nodes_for(config: RunConfig, site: SiteConfig, asked: int | None) -> Nodes:
    """Nodes and ranks of each.

    Raises:
        UserError: no whole number of nodes carries the layout, or `asked` does not; names the nearest that does.
    """
    p, each = config.parallel, site.ranks_per_node
    if asked is not None and asked < 1:
        raise UserError(f"--nodes {asked}", "at least 1", "leave it out: the layout says how many it takes")
    if p.data != "auto":
        return _for_fixed(config, each, p.data * p.model_ranks, asked)
    if asked is not None:
        if not (faults := layout_faults(config, asked * each)):
            return Nodes(asked, each)
        raise _refusal(config, each, f"--nodes {asked} x {each} ranks: {'; '.join(faults)}", asked)
    fewest = -(-p.fewest_ranks // each)
    for count in range(fewest, 64 * fewest + 1):
        if not layout_faults(config, count * each):
            return Nodes(count, each)
    raise _refusal(config, each, f"no number of nodes of {each} ranks carries the layout", fewest)


def _for_fixed(config: RunConfig, each: int, ranks: int, asked: int | None) -> Nodes:
    if faults := layout_faults(config, ranks):
        raise _refusal(config, each, "; ".join(faults), asked or -(-ranks // each))
    fitting = Nodes(1, ranks) if ranks < each else Nodes(ranks // each, each)
    if fitting.ranks != ranks:
        raise _refusal(config, each, f"{ranks} ranks do not fill nodes of {each} ranks", asked or -(-ranks // each))
    if asked not in (None, fitting.count):
        found = (
            f"--nodes {asked}; the layout's {ranks} ranks (parallel.data={config.parallel.data}) take {fitting.count}"
        )
        remedy = f"--nodes {fitting.count}, or parallel.data=auto"
        raise UserError(found, "a layout that fills the nodes asked for", remedy)
    return fitting


def _refusal(config: RunConfig, each: int, found: str, count: int) -> UserError:
    """With the nearest number of nodes that carries the layout as it is, and the nearest layout for this number."""
    free = config.model_copy(update={"parallel": config.parallel.model_copy(update={"data": "auto"})})
    carries = [n for n in range(1, 4 * count + 1) if not layout_faults(free, n * each)]
    ways = []
    if carries:
        nearest = min(carries, key=lambda n: abs(n - count))
        ways.append(f"--nodes {nearest}" + ("" if config.parallel.data == "auto" else " with parallel.data=auto"))
    if other := nearest_layout(config, count * each):
        ways.append(f"{other} on {count} node(s)")
    return UserError(found, f"a layout that fills nodes of {each} ranks", "nearest that works: " + " | ".join(ways))
