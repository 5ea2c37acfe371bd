"""A cluster's file: what it may say, and that nothing in it can break out of its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.site import SiteConfig

LEAST: dict[str, Any] = {"ranks_per_node": 2, "time_limit": "60"}
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "slurm" / "clusters").glob("*.yaml"))


def site(**changes: Any) -> SiteConfig:
    return SiteConfig.check({**LEAST, **changes}, where="test")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    assert SiteConfig.load(path).ranks_per_node


def test_dumped_and_read_back_it_is_the_same(tmp_path: Path) -> None:
    given = site(env={"A": "b c"}, setup=["x; y"], container={"prefix": ["p"], "image": "i"}, sbatch_options=["--x=1"])
    (tmp_path / "c.yaml").write_text(given.dump())
    assert SiteConfig.load(tmp_path / "c.yaml") == given


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300), ("5:30", 330), ("1:05:30", 3930), ("2-3", 2 * 86400 + 3 * 3600), ("2-3:04", 183840),
        ("1-00:00:01", 86401),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert site(time_limit=text, warning_s=60).time_limit_s == seconds


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"time_limit": "soon"}, "time_limit"),
        ({"time_limit": "5\n#SBATCH --uid=0"}, "time_limit"),
        ({"warning_s": 59}, "warning_s"),
        ({"warning_s": 3600}, "warning_s=3600 leaves nothing of time_limit=60"),
        ({"memory": "lots"}, "memory"),
        ({"partition": "a b"}, "partition"),
        ({"partition": "-x"}, "partition"),
        ({"account": "a\n"}, "account"),
        ({"qos": "$(id)"}, "qos"),
        ({"gpu_type": "a100"}, "gpus_per_node=0"),
        ({"env": {"A B": "c"}}, "A B"),
        ({"env": {"A": "b\nc"}}, "line break"),
        ({"setup": ["a\nb"]}, "line break"),
        ({"python": "python\u2028x"}, "line break"),
        ({"container": {"prefix": [], "image": "i"}}, "prefix"),
        ({"sbatch_options": ["exclusive"]}, "sbatch_options"),
        ({"sbatch_options": ["--comment=a b"]}, "sbatch_options"),
        ({"sbatch_options": ["--comment=`id`"]}, "sbatch_options"),
        ({"sbatch_options": ["--no-requeue"]}, "set by the script itself"),
        ({"sbatch_options": ["--signal=KILL@9"]}, "set by the script itself"),
        ({"srun_options": ["--x=y;z"]}, "srun_options"),
        ({"launcher": "mpirun"}, "launcher"),
        ({"max_restart": 3}, "did you mean 'max_restarts'"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as met:
        site(**changes)
    assert told in met.value.found


@given(st.text())
def test_a_word_has_no_meaning_to_a_shell(text: str) -> None:
    try:
        word = site(partition=text).partition
    except UserError:
        return
    assert word is not None and word.isascii() and not set(word) & set(" \t\r\n'\"\\$`;&|<>()#%*?!~{}[]")


@given(st.text())
def test_a_line_is_one_line(text: str) -> None:
    try:
        line = site(python=text).python
    except UserError:
        return
    assert line is not None and len(line.splitlines()) <= 1 and "\0" not in line
