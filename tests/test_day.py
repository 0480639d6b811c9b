"""``make day``: what it trains on is there without a network, and it fails where training did not help."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

#: Not imported: a folder of that name is what it leaves.
DAY = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "day.py"), run_name="day")


def test_the_documentation_of_this_python_is_enough_to_train_on() -> None:
    found = dict(DAY["documents"]())
    assert len(found) > 300
    assert "assert" in found["topic-assert"] and "JSON" in found["module-json.decoder"]
    assert sum(min(len(text), DAY["MOST_CHARACTERS"]) for text in found.values()) > 300_000


@pytest.mark.parametrize(("after", "passes"), [(7.9, True), (8.0, False), (8.1, False), (float("nan"), False)])
def test_a_perplexity_that_did_not_fall_fails_the_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float, passes: bool
) -> None:
    both = [{"held_out": {"held-out": {"perplexity": value}}, "tasks": {}} for value in (8.0, after)]
    (tmp_path / "results.json").write_text(json.dumps({"checkpoints": both}))
    fell = DAY["perplexity_fell"]
    monkeypatch.setitem(fell.__globals__, "RESULTS", tmp_path / "results.json")
    assert fell() is passes


def test_a_command_that_fails_ends_the_day(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="inspect ended with exit code"):
        DAY["smolconv"]("inspect", "nowhere")
    assert "$ smolconv inspect nowhere" in capfd.readouterr().out
