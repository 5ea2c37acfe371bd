"""The real front door, started as a user would, on a tiny run that is trained once and copied for each case."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.corpus import CorpusConfig
from data_prep.pipeline import prepare

ROOT = Path(__file__).resolve().parents[2]
MAIN = ("pretrain/main.py",)
GLAM = ("-m", "pretrain.cli")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "CROSS_")


@dataclass(frozen=True)
class Site:
    """A folder with a corpus, a configuration and a run that holds checkpoints of steps 1 and 2."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def newest(self) -> Path:
        """The newest checkpoint."""
        return self.run / "checkpoints" / "step-00000002"

    def write_config(self) -> None:
        """A model of 14,000 parameters."""
        expert = {"width": 32, "activation": "relu", "gated": False}
        tree: dict[str, Any] = {
            "name": "tiny",
            "run_dir": str(self.run),
            "model": {
                "vocab_size": 512,
                "num_layers": 2,
                "width": 16,
                "attention": {"num_heads": 2, "head_width": 8},
                "ffn": {"width": 32},
                "moe": {"num_experts": 2, "expert": expert, "router": {"kind": "topk"}},
            },
            "data": {"sources": [{"name": n, "path": str(self.corpus / "train" / n)} for n in ("json", "email")]},
            "train": {
                "steps": 2,
                "sequence_length": 32,
                "batch_tokens": 128,
                "micro_batch_sequences": 2,
                "optimizer": {"peak_lr": 1e-2},
                "schedule": {"kind": "cosine", "warmup_steps": 1},
                "precision": "float32",
                "save_every_steps": 1,
            },
        }
        self.config.write_text(yaml.safe_dump(tree), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What processes said, and what the folder held before and after: relative path -> sha256."""

    codes: tuple[int, ...]
    out: str
    err: str
    before: Mapping[str, str]
    after: Mapping[str, str]

    @property
    def message(self) -> str:
        """The one message, checked for its form: what was found, what was expected, what to do."""
        assert set(self.codes) == {2}, f"exit codes {self.codes}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out, self.err
        for part in ("found:", "expected:", "remedy:"):
            assert self.err.count(part) == 1, f"{part} {self.err.count(part)} times\n{self.err}"
        found, _, rest = self.err.partition("found:")[2].partition("expected:")
        expected, _, remedy = rest.partition("remedy:")
        assert found.strip() and expected.strip() and remedy.strip()
        return self.err.partition("found:")[2]


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return found | {str(path.relative_to(folder)): "folder" for path in folder.rglob("*") if path.is_dir()}


Ask = Callable[..., Outcome]


def ask(
    folder: Path,
    *arguments: str | Path,
    door: Sequence[str] = MAIN,
    ranks: Sequence[Mapping[str, str]] = ({},),
    file_bytes: int | None = None,
) -> Outcome:
    """Start the front door, once for each rank, wait, and compare `folder` before and after.

    Args:
        ranks: variables a launcher would set, for each process.
        file_bytes: no file may grow beyond this; a disk without room, as far as the process can tell.
    """
    before = hashes(folder)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def limit() -> None:
        assert file_bytes is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    processes = [
        subprocess.Popen(
            [sys.executable, *door, *map(str, arguments)],
            cwd=ROOT, env={**clean, **variables}, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=limit if file_bytes is not None else None,
        )
        for variables in ranks
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, err = ("".join(parts) for parts in zip(*said))
    return Outcome(tuple(process.returncode for process in processes), out, err, before, hashes(folder))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Corpus and run; not to be changed."""
    site = Site(tmp_path_factory.mktemp("site"))
    sources = [
        {"kind": "text_tree", "name": name, "path": "{stdlib}/" + name, "pattern": "**/*.py"}
        for name in ("json", "email")
    ]
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 512, "sample_bytes": 100_000}
    tree = {"output": str(site.corpus), "sources": sources, "tokenizer": tokenizer, "workers": 1}
    prepare(CorpusConfig.check({**tree, "heldout_fraction": 0.0}, where="test"))
    site.write_config()
    outcome = ask(site.folder, "--config", site.config)
    assert outcome.codes == (0,), outcome.err
    return site


@pytest.fixture
def site(trained: Site, tmp_path: Path) -> Iterator[Site]:
    """A copy of its own for each case."""
    copied = Site(tmp_path / "site")
    shutil.copytree(trained.folder, copied.folder)
    copied.write_config()
    yield copied


@pytest.fixture
def glam() -> Ask:
    """`glam VERB ...`."""

    def start(folder: Path, *arguments: str | Path) -> Outcome:
        return ask(folder, *arguments, door=GLAM)

    return start


@pytest.fixture(name="ask")
def ask_fixture() -> Ask:
    """`python pretrain/main.py ...`."""
    return ask
