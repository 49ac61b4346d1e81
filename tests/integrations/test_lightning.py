"""Recording by a callback of Lightning's ``Trainer``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import ConfigurationError
from tests.conftest import digits, mlp

lightning = pytest.importorskip("lightning.pytorch")

from pkexplain.integrations.lightning import RecordingCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|Trainer already|LeafSpec|litlogger|mid-epoch).*"),
]
EXAMPLES = 22
INPUTS, TARGETS = digits(EXAMPLES + 8)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        return i, INPUTS[i], TARGETS[i]


class Module(lightning.LightningModule):
    """Calls its own forward."""

    def __init__(self, layers=None):
        super().__init__()
        self.body = mlp() if layers is None else layers
        self.seen = []

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        ids, x, y = batch
        self.seen.append(ids.tolist())
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[1]), batch[2]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class CallsItsPart(Module):
    def training_step(self, batch, batch_idx):
        ids, x, y = batch
        self.seen.append(ids.tolist())
        return F.cross_entropy(self.body(x), y)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class TwoOptimizers(Manual):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(10, 10, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        both = self.optimizers()
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(Module.training_step(self, batch, batch_idx))
        for optimizer in both:
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.body.parameters(), lr=0.05, momentum=0.9),
            torch.optim.AdamW(self.head.parameters(), lr=1e-2),
        ]


def loader(batch_size=4, **options):
    return torch.utils.data.DataLoader(
        Rows(), batch_size, shuffle=True, generator=torch.Generator().manual_seed(4), **options
    )


def validation():
    return torch.utils.data.DataLoader(Rows(), 8)


def trainer(folder, callbacks=(), **options):
    options = {"max_epochs": 2, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


WAYS = {
    "plain": (Module, {}, {}),
    "its part is called": (CallsItsPart, {}, {}),
    "manual": (Manual, {}, {}),
    "two optimizers": (TwoOptimizers, {}, {}),
    "accumulation": (Module, {"accumulate_grad_batches": 2}, {}),
    "accumulation with a remainder": (Module, {"accumulate_grad_batches": 4}, {}),
    "clipping": (Module, {"gradient_clip_val": 0.1}, {}),
    "workers": (Module, {}, {"num_workers": 2}),
    "persistent workers": (Module, {}, {"num_workers": 1, "persistent_workers": True}),
    "fewer batches": (Module, {"limit_train_batches": 3}, {}),
    "stopped in an epoch": (Module, {"max_steps": 8, "max_epochs": -1}, {}),
    "loaded anew": (Module, {"reload_dataloaders_every_n_epochs": 1}, {}),
    "validation in between": (Module, {"val_check_interval": 2}, {}),
    "checkpoints": (Module, {"enable_checkpointing": True}, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")
def test_the_training_is_the_same_and_the_ids_are_right(way, tmp_path):
    kind, options, loading = WAYS[way]
    modules, store = [], pk.MemoryStore()
    for callbacks in ([], [RecordingCallback(store, segments=1, dtype=torch.float64, projection=pk.Identity())]):
        torch.manual_seed(0)
        module = kind()
        made = trainer(tmp_path, callbacks, **options)
        made.fit(module, loader(**loading), validation() if "val_check_interval" in options else None)
        modules.append(module)
    plain, recorded = modules
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))
    assert plain.seen == recorded.seen
    together = options.get("accumulate_grad_batches", 1)
    per_epoch = options.get("limit_train_batches", 6)
    steps, step = [], []
    for done, ids in enumerate(recorded.seen):
        step += ids
        place = done % per_epoch + 1
        if place % together == 0 or place == per_epoch:
            steps.append(step)
            step = []
    trajectory, before = store.trajectory(), set()
    assert len(trajectory) == len(steps)
    for t, ids in enumerate(steps):
        shard = trajectory.segment(t).shards[0]
        assert set(ids) <= set(shard.ids.tolist()) <= before | set(ids)
        assert not shard.loss_derivatives.isnan().any()
        before |= set(ids)
    explanation = pk.Explainer(store, kind()).explain(INPUTS[-1], output=pk.Logit(2))
    assert abs(explanation.ledger.gap) < 1e-9
    closes = {check.name: check.value for check in explanation.checks}
    assert closes["capture gap"] < 1e-9
    assert closes["displacement gap"] < 1e-9


@pytest.mark.parametrize("kind", [Module, CallsItsPart])
def test_resumed_from_a_checkpoint_it_is_the_unbroken_run(kind, tmp_path):
    class Stop(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 14:
                raise KeyboardInterrupt

    found = []
    for broken in (False, True):
        run = pk.DirectoryStore(tmp_path / f"run {broken}")
        torch.manual_seed(0)
        options = {"projection": pk.Kronecker(32, warm_up_examples=8), "dtype": torch.float64}
        saves = lightning.callbacks.ModelCheckpoint(tmp_path / f"kept {broken}", save_last=True)

        def new(*callbacks, run=run, saves=saves, options=options):
            every = [RecordingCallback(run, **options), saves, *callbacks]
            return trainer(tmp_path, every, enable_checkpointing=True, max_epochs=4)

        torch.manual_seed(0)
        first = kind()
        if broken:
            with pytest.raises(BaseException) as stopped:  # noqa: PT011 - Lightning chooses how it exits
                new(Stop()).fit(first, seeded_by_epoch())
            assert isinstance(stopped.value, (KeyboardInterrupt, SystemExit))
            assert run.manifest().ended == "interrupted by KeyboardInterrupt"
            first = kind()
            new().fit(first, seeded_by_epoch(), ckpt_path=str(tmp_path / "kept True" / "last.ckpt"), weights_only=False)
        else:
            new().fit(first, seeded_by_epoch())
        assert run.manifest().ended == "finished"
        found.append(
            (first, torch.from_numpy(pk.Explainer(run, kind()).contributions(INPUTS[-3:], output=pk.Logit(2))))
        )
    (unbroken, wanted), (resumed, contributions) = found
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(wanted, contributions)


class ByEpoch(torch.utils.data.Sampler):
    """The same order in an epoch whatever came before, as a training that is to be resumed needs."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return EXAMPLES

    def __iter__(self):
        yield from torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()


def seeded_by_epoch():
    return torch.utils.data.DataLoader(Rows(), 4, sampler=ByEpoch())


def test_several_loaders_are_refused(tmp_path):
    made = trainer(tmp_path, [RecordingCallback(pk.MemoryStore())])
    with pytest.raises(ConfigurationError, match="the training data do not come from one data loader"):
        made.fit(Module(), [loader(), loader()])


def test_an_iterable_data_set_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from Rows()

    made = trainer(tmp_path, [RecordingCallback(pk.MemoryStore())], max_steps=2)
    with pytest.raises(ConfigurationError, match="an iterable data set has no row numbers"):
        made.fit(Module(), torch.utils.data.DataLoader(Stream(), 4))


def test_a_loader_is_left_as_it_was(tmp_path):
    given = loader()
    sampler = given.batch_sampler
    trainer(tmp_path, [RecordingCallback(pk.MemoryStore())]).fit(Module(), given)
    assert given.batch_sampler is sampler
