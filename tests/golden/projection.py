"""Make tests/golden/projection.json: what the seeds of projections mean, for good, on every device and platform.

python -m tests.golden.projection
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pkexplain.projection.maps import hashed, random_signs, random_words

FILE = Path(__file__).with_suffix(".json")


def numbers() -> dict[str, Any]:
    """Compute the numbers that the file must hold."""
    table = hashed(slice(3, 13), 6, 4, seed=7, stream=2)
    return {
        "words": [str(word) for word in random_words(7, 2, 4)],
        "signs": (random_signs(7, 2, (4, 6)) * 2).tolist(),
        "hashed index": table.index.tolist(),
        "hashed sign": (table.sign * 2).tolist(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(numbers(), indent=1) + "\n", encoding="utf-8")
