"""Changing an existing run: merging its shards, withdrawing examples.

New files get new names, and count once a manifest lists them; only then are the old ones deleted. A kill leaves one run
or the other, never half of each.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from msgspec import structs
from torch import Tensor

from pkexplain.errors import ConfigurationError
from pkexplain.ids import check_ids
from pkexplain.progress import Progress, no_progress
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore, open_store
from pkexplain.store.manifest import SegmentEntry, SegmentFiles
from pkexplain.store.rows import Rows
from pkexplain.store.scratch import empty_on_disk
from pkexplain.store.trajectory import Segment

__all__ = ["merge", "withdraw"]

_ROWS_AT_ONCE = 4096
_PATIENCE = 2.0
"""Seconds to wait for an explainer that keeps its index."""


def merge(run: str | os.PathLike[str] | Store, *, shards: int = 1, progress: Progress = no_progress) -> None:
    """Store the rows of each segment in a different number of files; no number changes.

    A run recorded by several processes has one file of rows for each of them. If they wrote to separate disks, copy all
    files into one directory first.

    Args:
        run: The run.
        shards: Files of rows for each segment.
        progress: Told how many segments are done.

    Raises:
        ConfigurationError: The number is invalid.
        RunBusyError: The run is being written to.
        RunDamagedError: A file of the run is missing, truncated or altered.
    """
    store = open_store(run, "merging the shards of")
    if not isinstance(shards, int) or shards < 1:
        raise ConfigurationError(
            "merge(shards=…)",
            "the rows cannot be stored in this many files",
            got=repr(shards),
            expected="an integer from 1 up",
            source="the signature of merge",
            fix="Leave shards out for one file",
        )

    def dealt(segment: Segment) -> Segment:
        count = sum(map(len, segment.shards))
        edges = [count * s // shards for s in range(shards + 1)]
        parts = [_copy(store, segment.subset(slice(a, b)).shards) for a, b in itertools.pairwise(edges)]
        return replace(segment, shards=tuple(parts))

    _rewrite(store, "merging", dealt, (), progress)


def withdraw(
    run: str | os.PathLike[str] | Store, ids: Sequence[int] | Tensor, *, progress: Progress = no_progress
) -> None:
    """Delete the rows of some examples from a run; their sum stays on the ledger.

    The contributions of all other examples do not change, and the ledger gains the line ``withdrawn``. What is left of
    the deleted examples is that sum, for each segment, and their influence on the checkpoints, which only retraining
    could remove. Withdraw several examples at once: in a segment that saw only one of them, the sum is its row. Saved
    states are dropped: the run can only be continued with a new optimizer, and without these examples.

    Args:
        run: The run.
        ids: Row numbers of the examples, ``(examples,)``.
        progress: Told how many segments are done.

    Raises:
        ExampleIdError: The ids are out of range, repeated or not integers.
        RunBusyError: The run is being written to.
        RunDamagedError: A file of the run is missing, truncated or altered.
        RunError: A file cannot be written or deleted. After an error, the run holds these examples or it does not; call
            it again until it returns, so that nothing of them is left in the directory.
    """
    store = open_store(run, "withdrawing from")
    chosen = check_ids(ids, store.trajectory().num_examples, "withdraw(ids)")

    def without(segment: Segment) -> Segment:
        known = chosen[chosen < sum(map(len, segment.shards))]
        gone = segment.read_rows(known, torch.float64).sum(0)
        parts, start = [], 0
        for shard in segment.shards:
            here = known[(known >= start) & (known < start + len(shard))] - start
            parts.append(_copy(store, (shard,), here) if len(here) else shard)
            start += len(shard)
        kept = ~torch.isin(segment.audit_ids, chosen)
        return replace(
            segment,
            shards=tuple(parts),
            withdrawn=segment.withdrawn + gone,
            audit_ids=segment.audit_ids[kept],
            audit_rows=segment.audit_rows[kept],
        )

    _rewrite(store, "withdrawing", without, chosen.tolist(), progress)


def _copy(store: Store, shards: Sequence[Rows], without: Tensor | None = None) -> Rows:
    """Join some rows as they are stored, block by block, in a file if there are many.

    Args:
        store: Where a file goes.
        shards: The rows.
        without: Examples of the first shard whose rows are left out.
    """
    directory = store.path if isinstance(store, DirectoryStore) else None
    places = [torch.arange(len(shard.ids), device="cpu") for shard in shards]
    if without is not None:
        places[0] = (~torch.isin(shards[0].ids, without)).nonzero()[:, 0]
    first = shards[0].rows
    rows = empty_on_disk((sum(map(len, places)), first.shape[1]), first.dtype, directory)
    start = 0
    for shard, kept in zip(shards, places, strict=True):
        for some in kept.split(_ROWS_AT_ONCE):
            rows[start : start + len(some)] = shard.rows[some]
            start += len(some)
    starts = [0, *itertools.accumulate(map(len, shards))]
    pairs = list(zip(shards, places, strict=True))
    others = [
        torch.cat([vars(shard)[n][kept] for shard, kept in pairs]) for n in ("scale", "loss_derivatives", "norms")
    ]
    ids = torch.cat([shard.ids[kept] + before for (shard, kept), before in zip(pairs, starts, strict=False)])
    scale, derivatives, norms = others
    return Rows(rows, scale, derivatives, norms, ids, starts[-1])


def _rewrite(
    store: Store,
    what: str,
    change: Callable[[Segment], Segment],
    withdrawn: Sequence[int],
    progress: Progress,
) -> None:
    """Write every segment again under new names, and change over in one step."""
    with store.lock(wait=_PATIENCE):
        manifest, trajectory = store.reopen(), store.trajectory()
        revision, entries, total = manifest.revision + 1, [], len(trajectory)
        for t, old in enumerate(trajectory.files):
            segment = trajectory.segment(t)
            changed = change(segment)
            new = SegmentFiles.named(t, [len(shard) for shard in changed.shards], revision)
            names = list(new.rows)
            for index, shard in enumerate(changed.shards):
                if len(names) == len(old.rows) and shard is segment.shards[index]:
                    names[index] = old.rows[index]
                else:
                    store.put(names[index], shard.tensors())
            store.put(new.vectors, changed.tensors())
            files = structs.replace(new, rows=tuple(names), checkpoint=old.checkpoint)
            entries.append(SegmentEntry(summary=trajectory.summaries[t], files=files))
            progress(what, t + 1, total)
        new = structs.replace(manifest, segments=tuple(entries), revision=revision)
        if len(withdrawn):
            gone = tuple(sorted({*manifest.withdrawn, *withdrawn}))
            digests = {name: found for name, found in new.digests.items() if int(name) not in gone}
            new = structs.replace(new, states=(), withdrawn=gone, digests=digests)  # states hold gradients, too
        store.commit(new)
        store.sweep()  # what could not be deleted, and indices, which hold the rows, too
