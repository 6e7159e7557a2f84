"""Long steps report how far they are, and the bars follow them."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.cli import console
from flashrt_runtime.loading import load_model
from flashrt_runtime.progress import listening, report, tracked
from flashrt_runtime.untrained import make_checkpoint


def reports(step) -> list[tuple[int, int]]:
    heard: list[tuple[int, int]] = []
    with listening(lambda done, total: heard.append((done, total))):
        step()
    report(1, 1)
    return heard


def test_tracked_items_are_counted():
    assert reports(lambda: list(tracked("abc", 3))) == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert list(tracked("abc", 3)) == ["a", "b", "c"]


def test_a_step_that_fails_is_not_listened_to_any_more():
    heard = []

    def step():
        for _ in tracked(range(2), 2):
            raise RuntimeError

    with pytest.raises(RuntimeError), listening(lambda done, total: heard.append(done)):
        step()
    report(2, 2)
    assert heard == [0]


def test_long_steps_report(tmp_path):
    def whole(step):
        heard = reports(step)
        assert len(heard) > 10
        for (before, _), (after, _) in itertools.pairwise(heard):
            assert after in (0, before + 1), "only a further step begins anew"
        assert heard[-1][0] == heard[-1][1]

    whole(lambda: make_checkpoint(tmp_path / "tiny"))
    whole(lambda: open_checkpoint(tmp_path / "tiny", verify_weights=True).close())
    whole(lambda: load_model(tmp_path / "tiny", hardware="cpu").close())


def test_a_bar_follows_a_step_that_reports(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(console, "ERRORS", Console(file=stream, force_terminal=True, width=80))
    with console.progress("loading", None):
        report(3, 8)
    assert "loading" in stream.getvalue()
    assert "3/8" in stream.getvalue()


def test_nothing_is_drawn_where_there_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(console, "ERRORS", Console(file=stream, force_terminal=False))
    with console.progress("loading", None), console.progress("predict", 2) as advance:
        report(3, 8)
        advance()
    assert stream.getvalue() == ""
