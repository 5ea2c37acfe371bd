"""Bad input meets one clear message, exit code 2, and nothing that was there is touched.

Each test starts the real program. The first ones are refused before torch is imported and take half a second.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.corpus import CorpusConfig
from configs.layout import layout_faults
from configs.run import RunConfig
from data_prep.pipeline import prepare
from pretrain.budget import bytes_per_rank

ROOT = Path(__file__).resolve().parents[2]
Outcome = Any  # these three are described in conftest.py
Ask = Callable[..., Outcome]
Site = Any


def at_once(*asked: Callable[[], Outcome]) -> list[Outcome]:
    """Two at a time; for cases that share no file."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda ask: ask(), asked))


# ---- before torch -----------------------------------------------------------------------------------------------
def bare_config(folder: Path) -> Path:
    """A run configuration that needs nothing else to be there."""
    path = folder / "demo.yaml"
    shutil.copy(ROOT / "configs" / "demo.yaml", path)
    return path


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("train.stepz=3",), ("train.stepz", "did you mean 'steps'")),
        (('train.steps="3"',), ("train.steps", "'3'")),
        (("train.batch_tokens=1000",), ("train.batch_tokens=1000", "train.sequence_length=256")),
        (("train.stepz=3", "train.seed=x", "model.width=0"), ("3 fault(s)", "stepz", "'x'", "model.width")),
        (("train.steps",), ("'train.steps'", "section.key=value")),
        (("train.seed=2024-01-31",), ("train.seed", "2024-01-31")),  # YAML's own date
        (("parallel.data=0",), ("parallel.data", "0")),
    ],
    ids=["misspelt key", "wrong type", "contradiction", "several", "override syntax", "date", "no ranks"],
)
def test_configuration(tmp_path: Path, ask: Ask, overrides: tuple[str, ...], told: tuple[str, ...]) -> None:
    outcome = ask(tmp_path, "--config", bare_config(tmp_path), f"name={tmp_path.name}", *overrides)
    assert all(part in outcome.message for part in told), outcome.err
    assert set(outcome.after) == {"demo.yaml"} and outcome.out == ""
    assert outcome.err.strip().startswith("found:"), "nothing but the message"


def test_missing_configuration(tmp_path: Path, ask: Ask, glam: Ask) -> None:
    for outcome in (ask(tmp_path, "--config", tmp_path / "none.yaml"), glam(tmp_path, "plan", tmp_path / "none.yaml")):
        assert str(tmp_path / "none.yaml") in outcome.message
        assert outcome.after == {}


def test_key_given_twice(tmp_path: Path, ask: Ask) -> None:
    path = bare_config(tmp_path)
    path.write_text(path.read_text() + "\nname: again\n")
    assert "name is given twice" in ask(tmp_path, "--config", path).message


def test_broken_launcher_variables(tmp_path: Path, ask: Ask) -> None:
    outcome = ask(tmp_path, "--config", bare_config(tmp_path), ranks=[{"RANK": "0"}])
    assert "WORLD_SIZE=None" in outcome.message


@pytest.mark.parametrize("content", [None, "", "   \n"], ids=["no files", "an empty file", "a blank file"])
def test_empty_corpus(tmp_path: Path, glam: Ask, content: str | None) -> None:
    (tmp_path / "texts").mkdir()
    if content is not None:
        (tmp_path / "texts" / "a.txt").write_text(content)
    source = f"{{kind: text_tree, name: nothing, path: {tmp_path / 'texts'}}}"
    (tmp_path / "corpus.yaml").write_text(f"output: {tmp_path / 'out'}\nsources: [{source}]\n")
    outcome = glam(tmp_path, "prep", tmp_path / "corpus.yaml")
    assert "'nothing'" in outcome.message
    made = {name for name in outcome.after.keys() - outcome.before.keys() if not name.startswith("out/work")}
    assert made <= {"out"}, "nothing but unfinished work"


# ---- the machine and the data: before ranks meet ----------------------------------------------------------------
def test_world_size_that_does_not_fit(site: Site, ask: Ask) -> None:
    outcome = ask(site.folder, "--config", site.config, "parallel.expert=2")
    assert all(part in outcome.message for part in ("parallel.expert=2", "1 rank(s)", "2 rank(s)"))
    assert "--num_accelerators 2" in outcome.message
    assert outcome.after == outcome.before


def test_model_too_large_for_this_machine(tmp_path: Path, ask: Ask) -> None:
    """1.2T parameters: the message says what they need, and a command that works with the ranks that are here."""
    arguments = ("--config", "configs/glam.yaml", f"run_dir={tmp_path / 'run'}")
    two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    outcomes = at_once(lambda: ask(tmp_path, *arguments), lambda: ask(tmp_path, *arguments, ranks=[two]))
    for world_size, outcome in enumerate(outcomes, start=1):
        assert all(part in outcome.message for part in ("1,161.8B", "1024 rank(s)", f"{world_size} rank(s) with"))
        there, needed = (float(number) for number in re.findall(r"with ([\d.,]+) GiB each", outcome.message))
        assert 30 < needed < 40 and there > 0
        named = re.search(r"--config (configs/\S+\.yaml)((?: [\w.]+=\S+)*)", outcome.message)
        assert named, f"a preset that fits {world_size} rank(s) is named"
        preset = RunConfig.load(ROOT / named[1], named[2].split())
        assert layout_faults(preset, world_size) == []
        assert bytes_per_rank(preset, world_size).total < there * 2**30
        assert outcome.after == {}


def test_truncated_shard(site: Site, ask: Ask) -> None:
    shard = site.corpus / "train" / "email" / "shard-00000.bin"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    outcome = ask(site.folder, "--config", site.config)
    assert all(part in outcome.message for part in (str(shard), f"{size - 10} bytes", f"{size} bytes", "glam prep"))
    assert outcome.after == outcome.before


def test_vocabulary_that_does_not_hold_the_ids(site: Site, ask: Ask) -> None:
    fresh = site.folder / "fresh"
    outcome = ask(site.folder, "--config", site.config, "model.vocab_size=300", f"run_dir={fresh}")
    assert all(part in outcome.message for part in ("'json'", "512", "model.vocab_size=300", "model.vocab_size=512"))
    assert outcome.after == outcome.before and not fresh.exists()


def test_run_folder_that_is_a_file(site: Site, ask: Ask) -> None:
    (site.folder / "file").write_text("mine")
    outcome = ask(site.folder, "--config", site.config, f"run_dir={site.folder / 'file'}")
    assert str(site.folder / "file") in outcome.message and "run_dir" in outcome.message
    assert outcome.after == outcome.before


# ---- checkpoints ------------------------------------------------------------------------------------------------
def test_half_written_checkpoint(site: Site, ask: Ask) -> None:
    """As a copy that broke off leaves it; our own saves appear under their name by one rename. The one before it is
    gone on from, and what is there stays there."""
    half = site.newest.with_name("step-00000003")
    half.mkdir()
    shutil.copy(next(site.newest.glob("*.safetensors")), half)
    outcome = ask(site.folder, "--config", site.config, "train.steps=3")
    assert outcome.codes == (0,)
    assert all(
        part in outcome.out for part in (f"{half} is damaged", "no manifest.json", f"resumed from {site.newest}")
    )
    kept = [path for path in outcome.after if path.startswith("run/checkpoints/step-00000003.damaged-")]
    assert any(path.endswith(".safetensors") for path in kept)
    assert "run/checkpoints/step-00000003/manifest.json" in outcome.after


def flip(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)


def test_every_checkpoint_is_damaged(site: Site, ask: Ask) -> None:
    """It does not begin anew in silence."""
    for folder in (site.newest, site.newest.with_name("step-00000001")):
        flip(next(folder.glob("*.safetensors")))
    outcome = ask(site.folder, "--config", site.config, "train.steps=4")
    assert all(part in outcome.message for part in ("every checkpoint in", "step-00000001", "xxh128", "nothing was"))
    assert but_starts(outcome.after) == but_starts(outcome.before)


def but_starts(tree: Mapping[str, str]) -> dict[str, str]:
    """Without the records that the run was started, and why it ended."""
    return {path: digest for path, digest in tree.items() if not path.startswith(("run/starts", "run/ranks"))}


def test_checkpoint_of_an_older_format(site: Site, ask: Ask) -> None:
    (site.newest / "manifest.json").write_text(json.dumps({"format": 1, "document": {}, "files": {}, "tensors": {}}))
    outcome = ask(site.folder, "--config", site.config, "train.steps=4")
    assert "format 1" in outcome.message and "version of this program" in outcome.message
    assert outcome.after == outcome.before


def test_data_made_by_another_tokenizer(site: Site, ask: Ask) -> None:
    """Token ids would mean other text."""
    tree = yaml.safe_load((site.folder / "corpus" / "corpus.yaml").read_text())
    tree["output"], tree["tokenizer"]["sample_bytes"] = str(site.folder / "other"), 60_000
    prepare(CorpusConfig.check(tree, where="test"))
    moved = [f"data.sources=[{{name: json, path: {site.folder / 'other' / 'train' / 'json'}}}]"]
    outcome = ask(site.folder, "--config", site.config, "train.steps=4", *moved)
    assert all(part in outcome.message for part in ("'json'", "another tokenizer", "sha256", str(site.newest)))
    assert outcome.after == outcome.before


def test_weights_to_start_from_that_do_not_fit(site: Site, ask: Ask) -> None:
    fresh = [f"run_dir={site.folder / 'fresh'}", f"train.start_from={site.run}"]
    outcome = ask(site.folder, "--config", site.config, *fresh, "model.ffn.width=48")
    assert "model.ffn.width is 32 there, 48 here" in outcome.message
    nowhere = [f"run_dir={site.folder / 'fresh'}", f"train.start_from={site.folder / 'nowhere'}"]
    outcome = ask(site.folder, "--config", site.config, *nowhere)
    assert str(site.folder / "nowhere") in outcome.message
    assert outcome.after == outcome.before and not (site.folder / "fresh").exists()


def test_foreign_checkpoint(site: Site, ask: Ask) -> None:
    outcome = ask(site.folder, "--config", site.config, "model.moe.expert.width=48", "train.steps=4")
    assert "model.moe.expert.width is 32 there, 48 here" in outcome.message
    assert "model.width" not in outcome.message and "run_dir=" in outcome.message
    assert outcome.after == outcome.before


def two_ranks() -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def test_damaged_checkpoint_on_two_ranks(site: Site, ask: Ask) -> None:
    """One bit flipped, found by whichever rank reads that file: both go on from the one before, one speaks."""
    damaged = next(site.newest.glob("*.safetensors"))
    flip(damaged)
    outcome = ask(site.folder, "--config", site.config, "train.steps=4", "parallel.expert=2", ranks=two_ranks())
    older = site.newest.with_name("step-00000001")
    told = (f"{site.newest} is damaged", damaged.name, "xxh128", f"resumed from {older}")
    assert outcome.codes == (0, 0) and all(outcome.out.count(part) == 1 for part in told), outcome.out
    assert "run/checkpoints/step-00000002/manifest.json" in outcome.after, "made again"
    assert any(path.startswith("run/checkpoints/step-00000002.damaged-") for path in outcome.after)


def test_full_disk_at_a_save(site: Site, ask: Ask) -> None:
    """The checkpoint does not fit; those before it stay whole and the run goes on from them."""
    outcome = ask(site.folder, "--config", site.config, "train.steps=3", file_bytes=100_000)
    checkpoints = site.run / "checkpoints"
    assert all(part in outcome.message for part in ("no room", str(checkpoints), "GiB free", "run_dir="))

    def of_checkpoints(tree: dict[str, str]) -> dict[str, str]:
        return {path: digest for path, digest in tree.items() if path.startswith("run/checkpoints/")}

    assert of_checkpoints(outcome.after) == of_checkpoints(outcome.before)
    again = ask(site.folder, "--config", site.config, "train.steps=3")
    assert again.codes == (0,) and f"resumed from {site.newest}" in again.out
    assert "run/checkpoints/step-00000003/manifest.json" in again.after


def test_port_in_use(site: Site, ask: Ask) -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = str(owner.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        outcome = ask(site.folder, "--config", site.config, "train.steps=4", ranks=[variables])
    assert all(part in outcome.message for part in (f"port {port}", "in use", "MASTER_PORT"))
    assert outcome.after == outcome.before


# ---- the other verbs --------------------------------------------------------------------------------------------
def test_run_that_is_not_there(tmp_path: Path, glam: Ask) -> None:
    missing = tmp_path / "none"
    outcomes = at_once(
        lambda: glam(tmp_path, "eval", missing),
        lambda: glam(tmp_path, "generate", missing, "--prompt", "x"),
        lambda: glam(tmp_path, "report", missing),
    )
    for outcome in outcomes:
        assert str(missing) in outcome.message and "check the path" in outcome.message
        assert outcome.after == {}


def test_generate_from_nothing_or_nonsense(site: Site, glam: Ask) -> None:
    cases = {
        "empty prompt": ("--prompt", ""),
        "temperature": ("--prompt", "x", "--temperature", "-1"),
        "top-p": ("--prompt", "x", "--top-p", "-0.5"),
    }
    outcomes = at_once(*(partial(glam, site.folder, "generate", site.run, *case) for case in cases.values()))
    for told, outcome in zip(cases, outcomes):
        assert told in outcome.message
        assert outcome.after == outcome.before
