"""Strict loading: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.base import set_dotted
from configs.errors import UserError
from configs.run import RunConfig

Check = Callable[..., RunConfig]


def test_a_file_loads_and_defaults_fill_the_rest(file: Path) -> None:
    config = RunConfig.load(file)
    assert config.train.steps == 100
    assert config.model.moe is not None and config.model.moe.every == 2 and config.model.moe.offset == 0
    assert config.parallel.data == "auto" and config.train.precision == "bf16"


def test_overrides_win_over_the_file_and_the_last_one_wins(file: Path) -> None:
    config = RunConfig.load(file, ["train.steps=200", "model.moe=null", "train.steps=300", "parallel.tensor=2"])
    assert (config.train.steps, config.model.moe, config.parallel.tensor) == (300, None, 2)


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("train.stepps=1", "train.stepps", "'steps'"),
        ("model.atention={}", "model.atention", "'attention'"),
        ("model.moe.router={kind: topk, renormalize: true}", "renormalize", "'renormalise'"),  # in a union's member
        ("trian={}", "trian", "'train'"),
        ("model.attention.position={kind: rotary, bse: 10}", "bse", "'base'"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(check: Check, override: str, key: str, near: str) -> None:
    with pytest.raises(UserError, match="unknown key") as met:
        check(override)
    assert key in met.value.found and f"did you mean {near}" in met.value.found


def test_unknown_key_like_nothing_lists_what_is_known(check: Check) -> None:
    with pytest.raises(UserError) as met:
        check("cluster.zzzz=1")
    assert "known here: collective_timeout_s, device_memory_gib" in met.value.found


def test_all_faults_are_told_at_once(check: Check) -> None:
    with pytest.raises(UserError) as met:
        check("train.stepps=1", "train.steps=many", "model.width=-3", "data.sources=[]")
    assert met.value.found.startswith("4 fault(s)")
    for part in ("train.stepps", "train.steps:", "model.width", "data.sources", "'many'", "-3"):
        assert part in met.value.found


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ('train.steps="12"', "'12'"),  # text is no number
        ("train.steps=true", "True"),  # nor is a truth value
        ("train.steps=12.0", "12.0"),
        ("train.steps=1e3", "1000.0"),
        ("train.steps=null", "None"),
        ("train.recompute=1", "1"),
        ("train.recompute=yess", "'yess'"),
        ("train.optimizer.peak_lr=fast", "'fast'"),
        ("name=3", "3"),
        ("train.steps=!!binary aGk=", "train.steps"),
        ("data.sources=web", "'web'"),
        ("train.optimizer.peak_lr=.nan", "nan"),
        ("train.optimizer.peak_lr=.inf", "inf"),
        ("train.clip_norm=.inf", "inf"),
        ("parallel.data=0", "0"),
        ("parallel.data=-2", "-2"),
        ("parallel.expert=0", "0"),
        ("model.attention.num_kv_heads=0", "0"),
        ("model.attention.num_kv_heads=-1", "-1"),
        ("model.moe.router={kind: top_k}", "top_k"),
        ("train.schedule={warmup_steps: 1}", "train.schedule"),  # no kind: there is no default to guess
    ],
)
def test_wrong_type_or_range_is_refused_and_shown(check: Check, override: str, shown: str) -> None:
    with pytest.raises(UserError) as met:
        check(override)
    assert override.split("=")[0].split(".")[-1] in met.value.found and shown in met.value.found


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "+3e-4", "3.e-4", "0.3e-3", "0.0003", "3_0e-5"])
def test_numbers_with_an_exponent_are_numbers(check: Check, text: str) -> None:
    """YAML 1.1 takes 3e-4 for text."""
    assert check(f"train.optimizer.peak_lr={text}").train.optimizer.peak_lr == pytest.approx(3e-4, rel=1e-12)


def test_a_date_is_text(check: Check) -> None:
    """YAML has dates; no setting is one, and a run folder named after the day is no mistake."""
    assert check("run_dir=2024-01-31").run_dir == "2024-01-31"
    with pytest.raises(UserError, match="2024-01-31: unknown key"):
        check("2024-01-31=3")


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_every_float_python_prints_is_read_back(value: float) -> None:
    tree: dict[str, Any] = {}
    set_dotted(tree, f"a.b={value!r}")
    assert tree == {"a": {"b": value}} and isinstance(tree["a"]["b"], float)


@pytest.mark.parametrize("body", ["train: {steps: 1}\nname: a\nname: b\n", "train: {steps: 1, steps: 2}\n"])
def test_key_given_twice_is_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "twice.yaml").write_text(body)
    with pytest.raises(UserError, match="is given twice") as met:
        RunConfig.load(tmp_path / "twice.yaml")
    assert "line" in met.value.found


@pytest.mark.parametrize("body", ["", "- a\n- b\n", "3\n", "just text\n"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "list.yaml").write_text(body)
    with pytest.raises(UserError, match="a YAML mapping"):
        RunConfig.load(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    "data",
    [b"2024-01-31: 3", b"name: [unclosed", b"name: \x00", b"\xff\xfe\xfa", b"name: !!python/name:os.system"],
)
def test_file_that_is_no_yaml_is_refused(tmp_path: Path, data: bytes) -> None:
    """Not parsed, not text, and no Python objects: nothing in a YAML file is ever run."""
    (tmp_path / "bad.yaml").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        RunConfig.load(tmp_path / "bad.yaml")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=r"--config") as met:
            RunConfig.load(path)
        assert str(path) in met.value.found


@pytest.mark.parametrize("item", ["train.steps", "=3", "train.steps:3", ""])
def test_override_without_key_or_value_is_refused(file: Path, item: str) -> None:
    with pytest.raises(UserError, match=r"section\.key=value") as met:
        RunConfig.load(file, [item])
    assert repr(item) in met.value.found


def test_override_into_a_value_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match="to be a section") as met:
        RunConfig.load(file, ["train.steps.x=3"])
    assert "'steps' holds 100" in met.value.found


def test_override_that_is_no_yaml_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match="well-formed YAML") as met:
        RunConfig.load(file, ["data.sources=[{name: a"])
    assert "data.sources=" in met.value.found


def test_override_may_hold_equal_signs_and_whole_sections(file: Path) -> None:
    config = RunConfig.load(file, ["run_dir=a=b", "train.schedule={kind: wsd, warmup_steps: 1, decay_steps: 2}"])
    assert config.run_dir == "a=b" and config.train.schedule.kind == "wsd"


def test_dump_reads_back_to_an_equal_object(tmp_path: Path, check: Check) -> None:
    router = "model.moe.router={kind: noisy_topk, k: 3, capacity: {factor: 1.25, group_tokens: 8}}"
    for overrides in ((), ("model.moe=null", "train.clip_norm=null"), (router, "train.optimizer.peak_lr=1.25e-7")):
        config = check(*overrides)
        (tmp_path / "dump.yaml").write_text(config.dump())
        assert RunConfig.load(tmp_path / "dump.yaml") == config


def test_dump_spells_out_defaults(check: Check) -> None:
    assert yaml.safe_load(check().dump())["train"]["optimizer"]["beta2"] == 0.95


def test_fingerprint_names_the_configuration(tree: dict[str, Any]) -> None:
    base = RunConfig.check(tree, "test")
    spelt_out = RunConfig.check(yaml.safe_load(base.dump()), "test")
    reordered = RunConfig.check(dict(reversed(list(tree.items()))), "test")
    assert len(base.fingerprint()) == 12 and int(base.fingerprint(), 16) >= 0
    assert base.fingerprint() == spelt_out.fingerprint() == reordered.fingerprint()


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all plain values."""
    found = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def test_fingerprint_feels_every_number(tree: dict[str, Any]) -> None:
    """Each numeric setting, defaults included, changed alone, gives another name (where the change is valid at all)."""
    base = RunConfig.check(tree, "test")
    full = yaml.safe_load(base.dump())
    seen, changed = {base.fingerprint()}, 0
    for path in leaves(full):
        copied = copy.deepcopy(full)
        *parents, leaf = path.split(".")
        node = copied
        for name in parents:
            node = node[name]
        if not isinstance(node[leaf], int | float) or isinstance(node[leaf], bool):
            continue
        node[leaf] = node[leaf] * 0.5 if isinstance(node[leaf], float) else node[leaf] * 2
        if node[leaf] == 0:
            node[leaf] = 0.25 if path.endswith("coef") else 1
        try:
            fingerprint = RunConfig.check(copied, "test").fingerprint()
        except UserError:
            continue
        changed += 1
        assert fingerprint not in seen, f"{path} is not part of the fingerprint"
        seen.add(fingerprint)
    assert changed > 25


def test_configuration_is_frozen(check: Check) -> None:
    config = check()
    with pytest.raises(ValidationError):
        config.train.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.name = "other"  # type: ignore[misc]
    assert isinstance(config.data.sources, tuple)


def test_user_error_has_three_parts() -> None:
    error = UserError("a", "b", "c")
    assert str(error) == "found:    a\nexpected: b\nremedy:   c"
    assert (error.found, error.expected, error.remedy) == ("a", "b", "c")
