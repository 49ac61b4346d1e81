"""Write explanations as one self-contained HTML file: no scripts, no requests, all text escaped."""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pkexplain.errors import ConfigurationError, warn
from pkexplain.files import local_path, write_atomically
from pkexplain.results.comparison import Comparison
from pkexplain.results.explanation import Explanation
from pkexplain.results.explanations import common_mode
from pkexplain.results.numbers import clean, decimals, fixed, percent, significant, size, wall_time
from pkexplain.results.report.data import Section, build_section
from pkexplain.results.report.items import TrainingSet, name_label
from pkexplain.results.report.order import note_on_order

if TYPE_CHECKING:
    from jinja2 import Environment


_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "+")
_BARS = 48


@dataclass(frozen=True)
class Axis:
    """A linear scale from output units to percent of a drawing's width or height.

    Attributes:
        low: The value at ``start``.
        high: The value at ``stop``.
        start: Percent.
        stop: Percent.
    """

    low: float
    high: float
    start: float = 1.0
    stop: float = 99.0

    @classmethod
    def over(cls, values: Iterable[float], start: float = 1.0, stop: float = 99.0, zero: bool = False) -> Axis:
        """Fit a scale to values; values that are not finite are ignored.

        Args:
            values: Values that must be on the scale.
            start: Percent at the smallest.
            stop: Percent at the largest.
            zero: Whether zero must be on the scale, too.

        Returns:
            The scale.
        """
        finite = [v for v in values if math.isfinite(v)] + ([0.0] if zero else [])
        low, high = min(finite, default=0.0), max(finite, default=1.0)
        return cls(low, high, start, stop) if high > low else cls(low - 0.5, low + 0.5, start, stop)

    def at(self, value: float) -> float:
        """Place a value.

        Args:
            value: In output units.

        Returns:
            Percent, three decimals; for a value that is not finite, that of the value nearest to zero on the scale.
        """
        known = value if math.isfinite(value) else min(max(0.0, self.low), self.high)
        return round(self.start + (self.stop - self.start) * (known - self.low) / (self.high - self.low), 3)

    def bar(self, start: float, end: float) -> tuple[float, float]:
        """Place a bar.

        Args:
            start: One end, in output units.
            end: The other end.

        Returns:
            Its near end and its length, in percent.
        """
        a, b = sorted((self.at(start), self.at(end)))
        return a, round(b - a, 3)

    def ticks(self, count: int = 3) -> list[float]:
        """Choose round values on the scale.

        Args:
            count: Approximate number of values.

        Returns:
            Values at multiples of 1, 2 or 5 times a power of ten.
        """
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


def typeset(number: str) -> str:
    """Typeset a number: a real minus sign, and powers of ten for exponents.

    Args:
        number: The number as Python formats it.

    Returns:
        For example ``"4.0 × 10⁻¹⁵"``.
    """
    power = re.sub(r"e([+-])0*(\d+)", lambda m: "\u202f×\u202f10" + (m[1] + m[2]).translate(_SUPERSCRIPTS), number)
    return power.replace("-", "−")


def png_uri(picture: np.ndarray) -> str:
    """Encode a picture as a PNG in a data: URI.

    Args:
        picture: Grey ``(height, width)`` or colour ``(height, width, 3 or 4)``, uint8.

    Returns:
        The URI.
    """
    from PIL import Image

    grey = picture.ndim == 3 and picture.shape[2] == 1
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture[:, :, 0] if grey else picture)).save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _bins(values: Sequence[float]) -> list[tuple[int, int, float]]:
    """Sum neighbouring segments so that they fit a small drawing: first segment, last segment, sum."""
    size = -(-len(values) // _BARS) or 1
    starts = range(0, len(values), size)
    return [(i, min(i + size, len(values)) - 1, math.fsum(values[i : i + size])) for i in starts]


@functools.cache
def environment() -> Environment:
    """Make the templates' environment, with the filters and functions that they use."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pkexplain.results.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "fixed": lambda value, places: typeset(fixed(value, places)),
        "change": lambda value, places: typeset(fixed(value, places, sign=True)),
        "significant": lambda value: typeset(significant(value)),
        "plain": lambda value: typeset(f"{value:.3g}"),
        "percent": lambda share: typeset(percent(share)),
        "duration": wall_time,
        "memory": size,
        "correlation": lambda value: typeset("–" if math.isnan(value) else f"{value:.2f}"),
        "count": lambda value: f"{value:,}",
        "uri": png_uri,
        "clean": lambda text: clean(str(text)),
        "shorten": lambda text, size: text if len(text) <= size else text[: size - 1].rstrip() + "…",
    }
    environment.globals |= {"axis": Axis.over, "bins": _bins, "decimals": decimals}
    return environment


def render_page(sections: Sequence[Section], title: str | None = None, comparison: Comparison | None = None) -> str:
    """Render a page.

    Args:
        sections: One for each explanation, at least one.
        title: The page's title; if it is None and there is one section, the question.
        comparison: Other methods on the same run, shown after the explanations.

    Returns:
        The HTML.
    """
    alone = title is None and len(sections) == 1
    heading = sections[0].question if alone else title or f"{len(sections)} explanations"
    template = environment().get_template("report.html.j2")
    return template.render(sections=sections, heading=clean(heading), alone=alone, comparison=comparison).lstrip()


def write_report(
    explanation: Explanation | Sequence[Explanation],
    path: str | os.PathLike[str],
    *,
    dataset: Any = None,
    label_names: Sequence[str] | Mapping[Any, str] | None = None,
    title: str | None = None,
    comparison: Comparison | None = None,
    mode: int | None = None,
) -> Path:
    """Write explanations as one self-contained HTML file.

    The file is replaced in one step. It holds training examples, so its permissions are those of the run's files.

    Args:
        explanation: One explanation, or several for one page.
        path: Where to write, on this machine; missing directories are created.
        dataset: The whole training set in the order of the recorded ids, to show pictures or texts and to sum by label:
            a torch or Hugging Face data set, or a list, of ``(x, y)``, ``(id, x, y)``, mappings, pictures or strings.
            If its rows are recognised in what was recorded, but under other ids, a warning and the report say so.
        label_names: Name of each label, a sequence or a mapping; by default the data set's own, if it has any.
        title: The page's title; by default the question.
        comparison: What `pkexplain.compare` returned, to show after the explanations.
        mode: Permissions of the file, for example ``0o600``; None for those of the run, or, of a run in memory, for
            those that the umask leaves.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: There is no explanation, the data set is not the one that was recorded, or the path is a
            URL.
        MissingDependencyError: jinja2 is not installed.
    """
    explanations = [explanation] if isinstance(explanation, Explanation) else list(explanation)
    if not explanations:
        raise ConfigurationError(
            "write_report(explanation)",
            "there is nothing to report",
            got="an empty list",
            expected="at least one explanation",
            source="the page's sections",
            fix="Pass what Explainer.explain returned",
        )
    training_set = None if dataset is None else TrainingSet(dataset, label_names)
    name = functools.partial(name_label, label_names) if training_set is None else training_set.name
    if training_set is not None:
        explanations = _with_notes_on_order(explanations, training_set)
    sections = [build_section(each, training_set, name=name) for each in explanations]
    page, target = render_page(sections, title, comparison), local_path(path, "write_report(path)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(target, mode if mode is not None else common_mode(explanations)) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return target


def _with_notes_on_order(explanations: Sequence[Explanation], training_set: TrainingSet) -> list[Explanation]:
    """Add a note where the training set is not the one that was recorded, and warn of it."""
    known: list[tuple[Mapping[str, Mapping[str, str]], str | None]] = []
    noted = []
    for each in explanations:
        training_set.check_length(len(each.contributions), "write_report(dataset)")
        note = next((note for digests, note in known if digests == each.input_digests), "")
        if note == "":
            note = note_on_order(training_set.dataset, each.input_digests)
            known.append((each.input_digests, note))
            if note is not None:
                warn(f"pkexplain: write_report(dataset=…): {note} Pass the training set in the order of the ids.")
        noted.append(each if note is None else replace(each, notes=(*each.notes, note)))
    return noted
