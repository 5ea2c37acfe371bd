"""Poisoned data: skipped, and when that is not enough rolled back; the run becomes, to the bit, the one without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import EXIT_DONE, EXIT_STOPPED
from configs.run import RunConfig
from pretrain.blocklist import BLOCKLIST, Blocked, append_lines, read_blocklist
from pretrain.checkpoint_folders import complete_checkpoints
from pretrain.data import Cursor, Sampler
from pretrain.explain import batch_documents
from pretrain.local_ranks import LocalRanksFailed, run_ranks
from pretrain.metrics_file import read_metrics
from tests.parallel.bad_batch_jobs import POISON, bad_batch_job, dying_job, poisoned_copy
from tests.parallel.jobs import assemble
from tests.tiny import tiny_config

STEPS, S = 24, 16
# Of a batch of 8, four are of each source: step n draws samples 4(n-1) to 4n-1 of json.
IN_A_ROW = (64, 69, 75)  # steps 17, 18, 19
ALONE = (9,)  # step 3
TIMES = ("time", "tokens_per_s", "tflops_per_s_per_rank", "step_seconds")
SPIKES = ("train.health={spike_z: 5, window_steps: 8, warmup_steps: 6, router_spread: null}",)


class Case:
    """A run over poisoned data, and one over the same data without poison that begins with the blocklist."""

    def __init__(self, folder: Path, corpus: Path, poisoned: tuple[int, ...], *overrides: str, ranks: int = 1) -> None:
        self.folder, self.corpus, self.ranks = folder, corpus, ranks
        self.poisoned = poisoned_copy(folder / "poisoned", corpus, poisoned, S)
        self.clean = poisoned_copy(folder / "clean", corpus, (), S)
        self.config = tiny_config(
            "model.vocab_size=512", f"parallel.expert={ranks}", f"train.steps={STEPS}", "train.save_every_steps=5",
            "train.log_every_steps=1", *overrides,
        )  # fmt: skip

    def run(self, name: str, breaks: bool, *overrides: str) -> list[dict[str, Any]]:
        return run_ranks(self.ranks, bad_batch_job, self.config_of(name, *overrides), breaks)

    def config_of(self, name: str, *overrides: str) -> RunConfig:
        return self._with(self.poisoned, name, overrides)

    def run_without(self, entries: list[Blocked], breaks: bool) -> list[dict[str, Any]]:
        """Its tokens are others wherever the poisoned run has poison: were one of them read, all would differ."""
        identity = Sampler(self.clean, S).sources["json"].stream.identity
        rows = [
            {"source": one.source, "sample": sample, "sequence_length": S, "seed": 0,
             "dataset": identity if one.source == "json" else one.dataset}
            for one in entries for sample in range(one.first, one.last + 1)
        ]  # fmt: skip
        append_lines(self.folder / "given.jsonl", rows)
        data = self.clean.model_copy(update={"blocklist": str(self.folder / "given.jsonl")})
        return run_ranks(self.ranks, bad_batch_job, self._with(data, "without", ()), breaks)

    def _with(self, data: Any, name: str, overrides: tuple[str, ...]) -> RunConfig:
        from configs.base import set_dotted

        tree = {**self.config.model_dump(mode="json"), "data": data.model_dump(mode="json")}
        for item in (f"run_dir={self.folder / name}", *overrides):
            set_dotted(tree, item)
        return RunConfig.check(tree, "test")


def figures(run: Path) -> list[dict[str, Any]]:
    """All that training records say, but for what the clock says."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run) if r["kind"] == "train"]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run) if r.get("event") == name]


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Weights, moments, state, figures and the files of the last checkpoint; datasets' identities excepted."""
    mine, theirs = (assemble([rank["pieces"] for rank in ranks]) for ranks in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for mine_state, their_state in zip((rank["state"] for rank in one), (rank["state"] for rank in other), strict=True):
        for state in (mine_state, their_state):
            state["blocklist"] = {
                (b["source"], sample) for b in state["blocklist"] for sample in range(b["first"], b["last"] + 1)
            }
            state["history"].pop("regime")
            assert state.pop("seconds") > 0
        assert mine_state == their_state
    assert figures(folder / name) == figures(folder / "without")
    last, wanted = (complete_checkpoints(folder / which)[-1] for which in (name, "without"))
    assert last.name == wanted.name
    for file in wanted.glob("*.safetensors"):
        assert (last / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("ranks", "breaks", "overrides"),
    [
        (1, True, ()),
        (2, True, ("train.micro_batch_sequences=1",)),
        (2, True, ("train.precision=bf16", "model.moe.router={kind: noisy_topk}")),
        (1, False, SPIKES),
        (2, False, SPIKES),
        (2, True, ("parallel={pipeline: 2, expert: 1}", "train.micro_batch_sequences=1")),
        (2, True, ("parallel={tensor: 2, expert: 2, zero_stage: 0, sequence: false}",)),
    ],
    ids=["nan-1", "nan-2", "nan-2-noisy-bf16", "spike-1", "spike-2", "pipeline", "tensor-zero0"],
)  # fmt: skip
def test_rolled_back_run_is_the_one_that_never_had_the_data(
    tmp_path: Path, corpus: Path, ranks: int, breaks: bool, overrides: tuple[str, ...]
) -> None:
    """Three unfit steps in a row and, where one NaN is enough, a single one before, which is skipped and stays so."""
    # Without a hook nothing but the text itself is odd; whole batches of it spike.
    poison = (*IN_A_ROW, *(ALONE if breaks else ())) if breaks else tuple(range(64, 76))
    case = Case(tmp_path, corpus, poison, *overrides, ranks=ranks)
    found = case.run("run", breaks)
    assert [rank["code"] for rank in found] == [EXIT_DONE] * ranks
    entries = read_blocklist(tmp_path / "run" / BLOCKLIST, own=True)
    assert [(one.source, one.rollback, one.first, one.last) for one in entries] == [
        ("email", 1, 64, 75), ("json", 1, 64, 75),
    ]  # fmt: skip
    (event,) = events(tmp_path / "run", "rolled_back")
    assert (event["step"], event["from_step"], event["lost_steps"], event["samples"]) == (15, 19, 4, 24)
    reasons = {"not finite"} if breaks else {"loss spike", "gradient spike"}
    assert {one["reason"] for one in event["unfit"]} <= reasons
    assert [one["step"] for one in event["unfit"]] == [17, 18, 19]
    skipped = events(tmp_path / "run", "skipped")
    assert [one["step"] for one in skipped] == ([3] if breaks else [])
    assert [one["step"] for one in figures(tmp_path / "run")] == list(range(1, STEPS + 1)), "no gap, nothing twice"
    without = wanted(case, *ALONE) if breaks else case.run_without(entries, breaks)
    assert not events(tmp_path / "without", "rolled_back")
    assert_same(found, without, tmp_path, "run")


def wanted(case: Case, *poison: int) -> list[dict[str, Any]]:
    """The run without the row, for poison that breaks the model, after another has written its blocklist."""
    case.clean = poisoned_copy(case.folder / "only_alone", case.corpus, poison, S)
    return case.run_without(read_blocklist(case.folder / "run" / BLOCKLIST, own=True), True)


def spoil(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_within_the_row_and_after_the_rollback_equals_never_stopped(
    tmp_path: Path, corpus: Path, ranks: int
) -> None:
    """One checkpoint is kept, and one is made within the row: the one before it must stay until the row is over."""
    case = Case(tmp_path, corpus, IN_A_ROW, "train.keep_checkpoints=1", "train.save_every_steps=2", ranks=ranks)
    first = case.run("run", True, "train.stop_after_steps=18")
    assert [rank["code"] for rank in first] == [EXIT_STOPPED] * ranks
    assert [bad["step"] for bad in first[0]["state"]["row"]] == [17, 18]
    assert [path.name[-2:] for path in complete_checkpoints(tmp_path / "run")] == ["16", "18"]
    second = case.run("run", True, "train.stop_after_steps=2")
    assert second[0]["state"]["step"] == 20 and second[0]["state"]["blocklist"]
    assert [path.name[-2:] for path in complete_checkpoints(tmp_path / "run")] == ["20"]
    (event,) = events(tmp_path / "run", "rolled_back")
    assert (event["step"], event["from_step"]) == (16, 19)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.*")), "those of the row are gone"
    assert_same(case.run("run", True), wanted(case), tmp_path, "run")


@pytest.mark.parametrize("where", ["before the later checkpoints go", "before the blocklist", "behind the blocklist"])
def test_a_process_that_dies_within_a_rollback(tmp_path: Path, corpus: Path, where: str) -> None:
    """The next start comes to the same decision, or finds it on record; one rollback is counted, not two."""
    case = Case(tmp_path, corpus, IN_A_ROW, "train.save_every_steps=2")
    with pytest.raises(LocalRanksFailed, match="without a word"):
        run_ranks(1, dying_job, case.config_of("run"), where)
    assert (tmp_path / "run" / BLOCKLIST).exists() == (where == "behind the blocklist")
    left = [path.name[-2:] for path in complete_checkpoints(tmp_path / "run")]
    assert ("18" in left) == (where == "before the later checkpoints go") and "16" in left
    found = case.run("run", True)
    assert {one["rollback"] for one in found[0]["state"]["blocklist"]} == {1}
    assert len((tmp_path / "run" / BLOCKLIST).read_text().splitlines()) == 24
    assert len(events(tmp_path / "run", "rolled_back")) == (where != "behind the blocklist"), "decided again, or known"
    assert_same(found, wanted(case), tmp_path, "run")


def test_rollbacks_are_bounded_and_a_larger_bound_lets_the_run_go_on(tmp_path: Path, corpus: Path) -> None:
    """Behind the first row lies a second one, which the run comes to only after it went back."""
    case = Case(tmp_path, corpus, (*IN_A_ROW, 77, 82, 84), "train.health={max_rollbacks: 1}")
    (ended,) = case.run("run", True)
    assert ended["cause"] == "nan" and "code" not in ended
    assert "not finite" in ended["error"] and "steps 17 to 19" in ended["error"] and "max_rollbacks=1" in ended["error"]
    assert [one["rollback"] for one in ended["state"]["blocklist"]] == [1, 1]
    (again,) = case.run("run", True)
    assert again["error"] == ended["error"], "starting again is no way around the bound"
    found = case.run("run", True, "train.health.max_rollbacks=2")
    entries = read_blocklist(tmp_path / "run" / BLOCKLIST, own=True)
    assert [(one.source, one.rollback, one.first, one.last) for one in entries] == [
        (name, number, first, first + 11) for name in ("email", "json") for number, first in ((1, 64), (2, 76))
    ]
    assert_same(found, wanted(case), tmp_path, "run")


def test_without_a_checkpoint_before_the_row_the_run_ends(tmp_path: Path, corpus: Path) -> None:
    """The checkpoint of step 4 is one of the row, and no way back. The next start begins anew, and passes over it."""
    case = Case(tmp_path, corpus, (9, 12, 16), "train.save_every_steps=4")  # steps 3, 4, 5
    (ended,) = case.run("run", True)
    assert ended["cause"] == "nan" and "not finite" in ended["error"] and "no checkpoint is older" in ended["error"]
    (tmp_path / "run" / "checkpoints" / "step-00000004").rename(tmp_path / "elsewhere")
    found = case.run("run", True)
    assert found[0]["code"] == EXIT_DONE
    assert_same(found, wanted(case), tmp_path, "run")


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, corpus: Path) -> None:
    case = Case(tmp_path, corpus, IN_A_ROW, "train.keep_checkpoints=9")
    case.run("run", True, "train.stop_after_steps=18")
    checkpoints = complete_checkpoints(tmp_path / "run")
    assert [path.name[-2:] for path in checkpoints] == ["05", "10", "15", "18"]
    spoil(checkpoints[2])
    assert_same(case.run("run", True), wanted(case), tmp_path, "run")
    (event,) = events(tmp_path / "run", "rolled_back")
    assert (event["step"], event["from_step"], event["lost_steps"]) == (10, 19, 9)


def test_no_sound_checkpoint_before_the_row(tmp_path: Path, corpus: Path) -> None:
    case = Case(tmp_path, corpus, IN_A_ROW)
    case.run("run", True, "train.stop_after_steps=18")
    *before, within = complete_checkpoints(tmp_path / "run")
    for checkpoint in before:
        spoil(checkpoint)
    (ended,) = case.run("run", True)
    assert ended["cause"] == "nan" and "not finite" in ended["error"] and "damaged" in ended["error"]
    assert complete_checkpoints(tmp_path / "run")[-1] == within, "nothing was removed"


def test_the_list_names_the_documents_and_explain_stays_right(tmp_path: Path, corpus: Path) -> None:
    case = Case(tmp_path, corpus, IN_A_ROW, "train.save_every_steps=2")
    (found,) = case.run("run", True)
    lines = [json.loads(line) for line in (tmp_path / "run" / BLOCKLIST).read_text().splitlines()]
    assert len(lines) == 24 and {line["step"] for line in lines} == {17, 18, 19}
    sampler = Sampler(case.poisoned, S)
    poisoned = []
    for line in lines:
        source = sampler.sources[line["source"]]
        places = source.stream.locate(source.window_of(line["sample"]) * S, S + 1)
        told = [(one["document"], one["first_token"], one["tokens"]) for one in line["documents"]]
        assert told == [(place.document, place.offset, place.tokens) for place in places]
        for one in line["documents"]:
            assert f"/{line['source']}/" in one["origin"]
            text = Path(one["origin"]).read_text()
            assert one["first_line"] in text or POISON in source.sample(line["sample"])
        poisoned += [line["sample"]] if POISON in source.sample(line["sample"]) else []
    assert tuple(poisoned) == IN_A_ROW
    (event,) = events(tmp_path / "run", "rolled_back")
    assert set(event["origins"]) <= {one["origin"] for line in lines for one in line["documents"]}
    wanted(case)
    for step in (1, 16, 17, 19, 20, 24):
        mine, theirs = batch_documents(tmp_path / "run", step), batch_documents(tmp_path / "without", step)
        assert [(one.origin, one.first_token, one.tokens) for one in mine] == [
            (one.origin, one.first_token, one.tokens) for one in theirs
        ]
        assert not any(POISON in sampler.sources[n].sample(k) for n, k in drawn_at(sampler, found, step))


def drawn_at(sampler: Sampler, found: dict[str, Any], step: int) -> list[tuple[str, int]]:
    sampler.resume(Cursor())
    sampler.block(Blocked(**one) for one in found["state"]["blocklist"])
    return [sampler.next_batch(8) for _ in range(step)][-1]


def test_without_a_limit_the_run_skips_for_ever(tmp_path: Path, corpus: Path) -> None:
    case = Case(tmp_path, corpus, IN_A_ROW, "train.health={max_skips_in_row: null}")
    (found,) = case.run("run", True)
    assert found["code"] == EXIT_DONE and found["state"]["skipped"] == [17, 18, 19]
    assert not (tmp_path / "run" / BLOCKLIST).exists() and found["state"]["updates"] == STEPS - 3
