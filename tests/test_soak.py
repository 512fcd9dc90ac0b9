"""A training that is killed ends where one left alone ends, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="the lightning extra is not installed")
import soak


@pytest.mark.parametrize("loop", soak.LOOPS)
def test_a_run_killed_in_a_write_and_in_a_step_ends_bit_for_bit_where_one_left_alone_ends(loop: str) -> None:
    figures = soak.soak(loop, runs=1, kills=2, seed=7)  # of this seed, the first kill comes after a checkpoint
    assert (figures.kills, figures.while_writing) == (2, 1)
    assert figures.resumed_from_a_checkpoint + figures.started_over == 2
    assert figures.resumed_from_a_checkpoint > 0
    assert figures.bits > 100_000
    assert figures.bits_that_differ == 0


@pytest.mark.slow
@pytest.mark.parametrize("loop", soak.LOOPS)
def test_many_kills(loop: str) -> None:
    figures = soak.soak(loop, runs=4, kills=4, seed=1)
    assert figures.kills >= 12
    assert figures.while_writing >= 4
    assert figures.bits_that_differ == 0


def test_of_a_trainers_checkpoints_the_newest_that_is_complete_is_taken(tmp_path: Path) -> None:
    assert soak.last_complete(tmp_path) is None
    for step, state in ((3, "{}"), (10, "{}"), (12, '{"log'), (15, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert soak.last_complete(tmp_path) == tmp_path / "checkpoint-10"
