"""The command line of data preparation: words in any order, and a plain refusal of others."""

from __future__ import annotations

import pytest

from pretrain.arguments import PREP_STAGES, PREP_VIEWS, glam_arguments


def test_changes_may_stand_behind_options() -> None:
    parsed = glam_arguments(["prep", "c.yaml", "seed=1", "--stage", "clean", "output=x", "--redo"])
    assert (parsed.verb, parsed.config, parsed.stage, parsed.redo) == ("prep", "c.yaml", "clean", True)
    assert parsed.overrides == ["seed=1", "output=x"]


@pytest.mark.parametrize(
    "given", [["prep", "c.yaml", "--stage", "clean", "stray"], ["prep", "c.yaml", "--no-such=1"], ["eval", "r", "a=b"]]
)
def test_other_words_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        glam_arguments(given)
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("view", PREP_VIEWS)
def test_views_have_help_with_an_example(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        glam_arguments(["prep", view, "--help"])
    assert stopped.value.code == 0 and f"example: glam prep {view}" in capsys.readouterr().out


def test_a_configuration_may_bear_the_name_of_a_view() -> None:
    assert glam_arguments(["prep", "./stats"]).config == "./stats"


def test_stages_are_those_of_the_pipeline() -> None:
    from data_prep.pipeline import STAGES

    assert STAGES == PREP_STAGES
