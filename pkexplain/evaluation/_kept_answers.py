"""The outputs of retrained models on disk, one small file for each retraining, so that an evaluation can be resumed.

A file is written in one step, under a name made from the example ids and the seed. So several processes may work in
one directory: the worst that happens is that two retrain the same model. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from pkexplain.errors import EvaluationError, warn
from pkexplain.files import checksum, checksum_json, write_atomically

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Answers:
    """One retrained model's outputs for the queries.

    Attributes:
        outputs: The output of each query, ``(queries,)``, in output units.
        classes: The class predicted for each query, ``(queries,)``; None if a prediction is not one row of classes.
    """

    outputs: np.ndarray
    classes: np.ndarray | None


def key_of(ids: np.ndarray, seed: int) -> str:
    """Name a retraining by its example ids, in order, and its seed."""
    return checksum(np.ascontiguousarray(ids, dtype="<i8").tobytes(), f"seed {seed}")[:32]


class KeptAnswers:
    """A directory of answers to the same queries.

    Args:
        path: The directory; created if it does not exist.
        setting: What all answers in it have in common, as plain data.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        """Open or create the directory.

        Raises:
            EvaluationError: It holds answers of another setting, or cannot be written.
        """
        self._path = path
        self._queries = int(setting["queries"])
        setting = {"format_version": FORMAT_VERSION, **setting}
        file = path / "setting.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            with FileLock(path / "lock"):
                known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
                if known is None:
                    _write(file, setting)
        except ValueError as error:
            raise self._unusable("its setting.json is damaged", str(error)) from error
        except (OSError, NotImplementedError) as error:
            raise self._unusable("the directory cannot be used", str(error)) from error
        if known is not None and known != setting:
            known = known if isinstance(known, dict) else {}
            differing = [name for name in setting if known.get(name) != setting[name]]
            raise EvaluationError(
                f"kept={str(path)!r}",
                f"it holds answers of another setting ({', '.join(differing)})",
                got=", ".join(f"{name} {setting[name]}" for name in differing),
                expected=", ".join(f"{name} {known.get(name)}" for name in differing),
                source=str(file),
                fix="Choose another directory for this setting",
            )

    def get(self, key: str) -> Answers | None:
        """Read the answers under a key; None if there are none, or if they are damaged (with a warning)."""
        file = self._path / f"{key}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            stated = content.pop("sha256")
            if stated != checksum_json(content) or content["key"] != key:
                raise ValueError("its content does not fit its checksum or its name")
            outputs = np.array([float.fromhex(number) for number in content["outputs"]])
            classes = None if content["classes"] is None else np.array(content["classes"], dtype=np.int64)
            if len(outputs) != self._queries:
                raise ValueError(f"it holds {len(outputs)} outputs")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"{file} is damaged ({error}) and is ignored; the model is trained again", RuntimeWarning)
            return None
        return Answers(outputs, classes)

    def put(self, key: str, answers: Answers) -> None:
        """Write answers under a key.

        Raises:
            EvaluationError: They cannot be written.
        """
        outputs = [float(number).hex() for number in answers.outputs]  # exact, as plain text
        classes = None if answers.classes is None else answers.classes.tolist()
        content = {"key": key, "outputs": outputs, "classes": classes}
        try:
            _write(self._path / f"{key}.json", {**content, "sha256": checksum_json(content)})
        except OSError as error:
            raise self._unusable(f"{key}.json could not be written", str(error)) from error

    def _unusable(self, wrong: str, got: str) -> EvaluationError:
        expected, fix = "a directory with room that can be written to", "Choose another directory"
        return EvaluationError(
            f"kept={str(self._path)!r}", wrong, got=got, expected=expected, source="the operating system", fix=fix
        )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    with write_atomically(file) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
