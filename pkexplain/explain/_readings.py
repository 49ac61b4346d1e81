"""The readings and their names."""

from __future__ import annotations

from typing import Any

from pkexplain.errors import ConfigurationError
from pkexplain.explain.removal import Removal
from pkexplain.explain.replay import Replay

Reading = str | Removal | Replay


def settings_of(reading: Reading) -> Removal | Replay | None:
    """Look up a reading by its name; None for the path reading.

    Raises:
        ConfigurationError: There is no such reading, or it needs settings.
    """
    if isinstance(reading, (Removal, Replay)):
        return reading
    known: dict[Any, Removal | None] = {"path": None, "removal": Removal()}
    asked, source = "Explainer.explain", "Explainer"
    if reading == "replay":
        wrong, expected = "the training is taken again, which needs its data", "a pkexplain.Replay"
        fix = "Pass reading=pkexplain.Replay(train), for a run recorded with Recorder(…, replay=True)"
        raise ConfigurationError(asked, wrong, repr(reading), expected, source, fix)
    if not isinstance(reading, str) or reading not in known:
        fix, expected = "Leave reading out for contributions that add up", '"path", "removal", a Removal or a Replay'
        raise ConfigurationError(asked, "there is no such reading", repr(reading), expected, source, fix)
    return known[reading]


def name_of(settings: Removal | Replay | None) -> str:
    """Name a reading."""
    return "path" if settings is None else "removal" if isinstance(settings, Removal) else "replay"


def check_count(k: int) -> None:
    """Refuse a number of examples that cannot be shown."""
    if not isinstance(k, int) or k < 1:
        got, expected, wrong = repr(k), "an integer from 1 up", "this many examples cannot be shown"
        raise ConfigurationError("Explainer.explain", wrong, got, expected, "its signature", "Leave k out")
