"""Recording by a callback of `transformers.Trainer`: the same training, the right ids, and resumed as if unbroken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.errors import ConfigurationError, RunExistsError

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from pkexplain.integrations.transformers import RecordingCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
EXAMPLES = 22


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def rows(examples=EXAMPLES, seed=1):
    """Token ids of different lengths; the first two tokens are the row's number."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 19, (int(n),), generator=generator).tolist() for n in torch.arange(examples) % 5 + 4]
    tokens = [[i // 16 + 1, i % 16 + 1, *rest] for i, rest in enumerate(tokens)]
    return datasets.Dataset.from_dict(
        {
            "input_ids": tokens,
            "attention_mask": [[1] * len(row) for row in tokens],
            "labels": [i % 3 for i in range(examples)],
            "length": [len(row) for row in tokens],
            "text": [f"row {i}" for i in range(examples)],  # a column that the model does not take
        }
    )


def bert(dropout=0.1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=19,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def collator():
    """Pads to the longest of a batch, without a tokenizer."""

    def collate(features):
        longest = max(len(f["input_ids"]) for f in features)
        pad = [longest - len(f["input_ids"]) for f in features]
        return {
            "input_ids": torch.tensor([f["input_ids"] + [0] * n for f, n in zip(features, pad, strict=True)]),
            "attention_mask": torch.tensor([f["attention_mask"] + [0] * n for f, n in zip(features, pad, strict=True)]),
            "labels": torch.tensor([f["labels"] for f in features]),
        }

    return collate


def trainer(folder, model, callbacks=(), train=None, evaluated=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **arguments,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder / "out"), **arguments),
        train_dataset=rows() if train is None else train,
        eval_dataset=evaluated,
        data_collator=collator(),
        callbacks=list(callbacks),
    )


class SeenIds(transformers.TrainerCallback):
    """What each step was trained on, read from the tokens that reach the model."""

    def __init__(self, model):
        self.steps, self._step = [], []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        if module.training:
            self._step += [int(16 * (row[0] - 1) + row[1] - 1) for row in kwargs["input_ids"]]

    def on_optimizer_step(self, *args, **kwargs):
        self.steps.append(self._step)
        self._step = []


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


WAYS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation with a remainder": {"gradient_accumulation_steps": 4},
    "workers": {"dataloader_num_workers": 2},
    "lengths": {"train_sampling_strategy": "group_by_length"},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, bf16, accumulation": {
        "gradient_checkpointing": True,
        "bf16": True,
        "gradient_accumulation_steps": 2,
    },
    "stopped in an epoch": {"max_steps": 8},
    "evaluation and saving": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
    "the best at the end": {
        "eval_strategy": "epoch",
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    },
    "last batch dropped": {"dataloader_drop_last": True},
    "smoothed labels": {"label_smoothing_factor": 0.1},
    "Adafactor": {"optim": "adafactor"},
    "fused": {"optim": "adamw_torch_fused"},
    "schedule": {"lr_scheduler_type": "cosine"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:pkexplain. in segment .* the gradient that the optimizer was given:UserWarning")
def test_the_training_is_the_same_and_the_ids_are_right(way, tmp_path):
    arguments = WAYS[way]
    evaluated = rows(7, seed=2) if "eval_strategy" in arguments else None
    plain, recorded = bert(), bert()
    for model, callbacks in ((plain, []), (recorded, None)):
        store = pk.MemoryStore()
        seen = SeenIds(model)
        callbacks = [seen] if callbacks == [] else [seen, RecordingCallback(store, segments=1, dataset=rows())]
        made = trainer(tmp_path, model, callbacks, evaluated=evaluated, **arguments)
        made.train()
    assert same(plain, recorded)
    trajectory = store.trajectory()
    assert len(trajectory) == len(seen.steps) == made.state.global_step
    new, before = [], set()
    for t, ids in enumerate(seen.steps):
        found = set(trajectory.segment(t).shards[0].ids.tolist())
        assert set(ids) <= found
        assert found <= before | set(ids)  # Adam's momentum holds those of before
        before |= set(ids)
        new += ids
    derivatives = torch.cat([trajectory.segment(t).shards[0].loss_derivatives for t in range(len(trajectory))])
    assert not derivatives.isnan().any()
    assert trajectory.manifest.ended == "finished"
    explanation = pk.Explainer(store, bert()).explain(rows()[3], output=pk.Logit(1))
    assert abs(explanation.ledger.gap) < 1e-4
    closes = {check.name: check.value for check in explanation.checks}
    assert closes["capture gap"] < (1e-2 if "bf16" in arguments else 1e-4)
    assert closes["displacement gap"] < 1e-2


def contributions(store):
    return torch.from_numpy(pk.Explainer(store, bert()).contributions(rows()[3], output=pk.Logit(1)))


RESUMED = {
    "epochs": {"save_strategy": "epoch"},
    "steps": {"save_strategy": "steps", "save_steps": 4},
    "steps and accumulation": {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2},
    "the first of many": {"save_strategy": "steps", "save_steps": 2},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_from_a_checkpoint_it_is_the_unbroken_run(kind, tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise KeyboardInterrupt

    options = {"projection": pk.Kronecker(32, warm_up_examples=16)}
    unbroken, whole = bert(), pk.DirectoryStore(tmp_path / "whole")
    arguments = {**RESUMED[kind], "num_train_epochs": 3}
    trainer(tmp_path / "a", unbroken, [RecordingCallback(whole, **options)], **arguments).train()
    broken, run = bert(), pk.DirectoryStore(tmp_path / "broken")
    callback = RecordingCallback(run, **options)
    first = trainer(tmp_path / "b", broken, [callback, Stop()], **arguments)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert run.manifest().ended == "still recording, or killed"
    callback.close(KeyboardInterrupt())
    assert run.manifest().ended == "interrupted by KeyboardInterrupt"
    again = bert()
    checkpoint = True
    if kind == "the first of many":
        checkpoint = str(tmp_path / "b" / "out" / "checkpoint-2")
    second = trainer(tmp_path / "b", again, [RecordingCallback(run, **options)], **arguments)
    second.train(resume_from_checkpoint=checkpoint)
    assert same(unbroken, again)
    assert torch.equal(contributions(whole), contributions(run))
    assert run.manifest().ended == "finished"


def test_a_finished_run_is_not_overwritten_by_another_training(tmp_path):
    run = pk.DirectoryStore(tmp_path / "run")
    trainer(tmp_path, bert(), [RecordingCallback(run)]).train()
    again = trainer(tmp_path, bert(), [RecordingCallback(run)])
    with pytest.raises(RunExistsError, match="overwrite=True"):
        again.train()
    trainer(tmp_path, bert(), [RecordingCallback(run, overwrite=True)]).train()
    assert run.manifest().ended == "finished"


def test_a_data_set_without_rows_is_refused(tmp_path):
    stream = rows().to_iterable_dataset()
    made = trainer(tmp_path, bert(), [RecordingCallback(pk.MemoryStore())], train=stream, max_steps=3)
    with pytest.raises(ConfigurationError, match="an iterable data set has no row numbers"):
        made.train()


def test_accelerate_in_two_lines(tmp_path):
    """A loop with Accelerate's own accumulation, against the same loop without a recorder."""
    from accelerate import Accelerator

    losses = nn.CrossEntropyLoss()

    def train(model, recorder=None):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(
            rows(), batch_size=4, shuffle=True, collate_fn=collator(), generator=torch.Generator().manual_seed(5)
        )
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        recorder = pk.Recorder(recorder, model, optimizer, dataset=rows()) if recorder else None
        with recorder if recorder else torch.enable_grad():
            for _ in range(2):
                for batch in recorder.batches(loader) if recorder else loader:
                    with accelerator.accumulate(model):
                        labels = batch.pop("labels")
                        accelerator.backward(losses(model(**batch).logits, labels))
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                        optimizer.step()
                        optimizer.zero_grad()

    plain, recorded, store = bert(), bert(), pk.MemoryStore()
    torch.manual_seed(1)
    train(plain)
    torch.manual_seed(1)
    train(recorded, store)
    assert same(plain, recorded)
    assert len(store.trajectory()) >= 2
    assert abs(pk.Explainer(store, bert()).explain(rows()[3], output=pk.Logit(1)).ledger.gap) < 1e-4


@pytest.mark.parametrize("trainings", [1, 2])
def test_the_trained_model_is_explained_like_a_fresh_one(trainings, tmp_path):
    """Accelerate has put its forward under autocast, once for each training."""
    model = bert()
    for number in range(trainings):
        store = pk.MemoryStore()
        trainer(tmp_path / str(number), model, [RecordingCallback(store)], bf16=True).train()
    assert "forward" in vars(model)
    before = [p.detach().clone() for p in model.parameters()]
    for reading in ("path", "removal"):
        mine, fresh = (
            pk.Explainer(store, each).contributions(rows()[3], output=pk.Logit(1), reading=reading)
            for each in (model, bert())
        )
        assert (mine == fresh).all()
        assert mine.any()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
