"""Recording `trl.SFTTrainer`: the same training, the right ids, and the gradients and losses of its fused head."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.errors import ConfigurationError, ExampleIdError

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from trl.trainer import utils as trl_utils  # noqa: E402

from pkexplain.integrations.transformers import RecordingCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # peft, on the layers that hold its adapters' numbers while they are copied
    pytest.mark.filterwarnings("ignore:.*peft.*:UserWarning"),
    # a few steps of a tiny model: short segments' rows are rough, and bf16 is rounded
    pytest.mark.filterwarnings("ignore:pkexplain. in segment .*:UserWarning"),
]
VOCABULARY, EXAMPLES = 64, 22


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    """Made here: nothing is downloaded."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1, **{f"t{i}": i for i in range(2, VOCABULARY)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def rows(examples=EXAMPLES):
    """Token ids of different lengths; the first two tokens are the row's number."""
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.arange(examples) % 5 + 4).tolist()
    tokens = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": [[i // 16 + 2, i % 16 + 2, *t] for i, t in enumerate(tokens)]})


def llama(tied=False, bias=False, **config):
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            tie_word_embeddings=tied,
        )
    )
    if bias:
        made.lm_head = nn.Linear(32, VOCABULARY)
    for name, value in config.items():
        setattr(made.config, name, value)
    return made


def lora():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def fresh(adapted):
    return peft.get_peft_model(llama(), lora()) if adapted else llama()


@pytest.fixture
def sft(tokenizer, tmp_path):
    def make(model, callbacks=(), adapted=False, **arguments):
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
        return trl.SFTTrainer(
            model,
            trl.SFTConfig(str(tmp_path / "out"), **arguments),
            train_dataset=rows(),
            processing_class=tokenizer,
            callbacks=list(callbacks),
            peft_config=lora() if adapted else None,
        )

    return make


class SeenIds(transformers.TrainerCallback):
    """What each step was trained on, read from the tokens that reach the model."""

    def __init__(self):
        self.steps, self._step, self._hook = [], [], None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def note(module, args, kwargs):
            if module.training:
                self._step += [int(16 * (row[0] - 2) + row[1] - 2) for row in kwargs["input_ids"]]

        self._hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def on_optimizer_step(self, *args, **kwargs):
        self.steps.append(self._step)
        self._step = []

    def on_train_end(self, *args, **kwargs):
        self._hook.remove()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def query(row):
    tokens = torch.tensor(rows()[row]["input_ids"])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def span(row):
    return pk.TokenLogProbability(rows()[row]["input_ids"][2:])


WAYS = [
    {"bf16": bf16, "gradient_checkpointing": checkpointing, "gradient_accumulation_steps": steps, "adapted": adapted}
    for (bf16, checkpointing), steps, adapted in itertools.product(
        ((False, False), (False, True), (True, True)), (1, 2), (False, True)
    )
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: ", ".join(f"{k[:12]}={v}" for k, v in way.items()))
def test_the_training_is_the_same_and_its_account_closes(way, sft):
    options, arguments = {"segments": 1, "projection": pk.Identity()}, {**way, "num_train_epochs": 2}
    plain = sft(llama(), **arguments)
    plain.train()
    seen, store = SeenIds(), pk.MemoryStore()
    made = sft(llama(), [seen, RecordingCallback(store, **options)], **arguments)
    made.train()
    assert same(plain.model, made.model)

    trajectory = store.trajectory()
    assert len(trajectory) == len(seen.steps) == made.state.global_step
    before = set()
    for t, ids in enumerate(seen.steps):
        shard = trajectory.segment(t).shards[0]
        assert set(ids) <= set(shard.ids.tolist()) <= before | set(ids)  # Adam's momentum holds those of before
        before |= set(ids)
        assert not shard.loss_derivatives.isnan().any()
    assert trajectory.manifest.output == "logits"  # of which the fused head has only formed log p
    assert not any(summary.split.unsplit for summary in trajectory.summaries)

    untrained, trained = (pk.Explainer(store, m) for m in (fresh(way["adapted"]), made.model))
    parameters = [p.detach().clone() for p in made.model.parameters()]
    explanation = untrained.explain(query(9), output=span(9))
    assert abs(explanation.ledger.gap) < 1e-6
    checks = {check.name: check for check in explanation.checks}
    # where two rounded gradients cancel, Adam divides what is left of their sum by nothing: that is on its line
    rounded = way["bf16"] and way["gradient_accumulation_steps"] > 1
    assert [name for name, check in checks.items() if not check.passed] in ([], ["optimizer share"] * rounded)
    if not way["bf16"]:
        assert checks["capture gap"].value < 1e-6
        assert checks["split gap"].value < 1e-6
        assert checks["displacement gap"].value < 1e-4
        assert checks["optimizer share"].value < 1e-5
    assert explanation.prediction.startswith("output.logits, from which the training's loss was computed")
    for found in (*explanation.proponents, *explanation.opponents):
        assert math.isclose(found.weight * found.kernel, found.contribution, rel_tol=1e-6)
    for reading in ("path", "removal"):
        of = [each.contributions(query(9), output=span(9), reading=reading) for each in (untrained, trained)]
        assert np.array_equal(*of)
        assert np.isfinite(of[0]).all()
        assert of[0].any()
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), parameters, strict=True))


def example_gradients(model, point, ids, scale):
    """Each example's gradient by a pass of its own, through logits: the oracle of what one step of SGD does."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model.load_state_dict(point)
    found = {}
    for i in ids:
        tokens = torch.tensor([rows()[i]["input_ids"]])
        scores = model(input_ids=tokens).logits[:, :-1]
        cap, times = (getattr(model.config, n, None) for n in ("final_logit_softcapping", "logit_scale"))
        scores = scores * (times or 1)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[0, 1:], reduction="sum") / scale
        gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], allow_unused=True)
        found[i] = {n: torch.zeros(()) if g is None else g for n, g in zip(names, gradients, strict=True)}
    return found


HEADS = {
    "plain": {},
    "tied": {"tied": True},
    "biased": {"bias": True},
    "scaled and capped": {"final_logit_softcapping": 0.5, "logit_scale": 3.0},
    "LoRA": None,
}


@pytest.mark.parametrize("compact", [False, True], ids=["all tokens", "ignored tokens left out"])
@pytest.mark.parametrize("head", HEADS)
def test_the_displacements_are_those_of_a_loop_over_examples(head, compact, sft, monkeypatch):
    """Two steps of SGD; before the second, LoRA has a matrix without a gradient. On GPUs TRL drops ignored tokens."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)
    adapted = HEADS[head] is None
    make = (lambda: fresh(True)) if adapted else (lambda: llama(**HEADS[head]))
    points = []

    class Points(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            points.append({name: value.clone() for name, value in model.state_dict().items()})

    seen, store, rate = SeenIds(), pk.MemoryStore(), 0.5
    made = sft(
        llama() if adapted else make(),
        [seen, Points(), RecordingCallback(store, segments=1, projection=pk.Identity())],
        adapted,
        bf16=False,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=2,
    )
    made.train()
    trajectory = store.trajectory()
    moved = []
    for t, ids in enumerate(seen.steps):
        scale = sum(len(rows()[i]["input_ids"]) - 1 for i in ids)
        expected = example_gradients(make(), points[t], ids, scale)
        found = trajectory.segment(t).read_rows(torch.tensor(ids), torch.float32)
        for block in trajectory.fingerprint.blocks:
            start = block.start
            for name, shape in zip(block.parameters, block.shapes, strict=True):
                mine = found[:, start : start + math.prod(shape)]
                theirs = torch.stack([expected[i][name].expand(shape).flatten() for i in ids]) * -rate
                torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6 * rate)
                moved += [name] if t == 1 and mine.any() else []
                start += math.prod(shape)
    names = {name for block in trajectory.fingerprint.blocks for name in block.parameters}
    assert set(moved) == names


def padded(features):
    longest = max(len(f["input_ids"]) for f in features)
    tokens = torch.tensor([f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features])
    there = torch.tensor([[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features])
    return {"input_ids": tokens, "attention_mask": there, "labels": tokens.masked_fill(there == 0, -100)}


@pytest.mark.parametrize(
    ("adapted", "compact"), [(False, False), (True, True)], ids=["full", "LoRA, ignored tokens left out"]
)
def test_loss_derivatives_and_removals_are_those_of_a_model_that_returns_logits(
    adapted, compact, sft, tmp_path, monkeypatch
):
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)
    stores = pk.MemoryStore(), pk.MemoryStore()
    options = {"segments": 1, "projection": pk.Identity()}
    sft(llama(), [RecordingCallback(stores[0], **options)], adapted, bf16=False).train()
    model = llama()
    transformers.set_seed(42)  # as SFTTrainer does before it makes the adapter
    model = peft.get_peft_model(model, lora()) if adapted else model
    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path / "plain"),
            per_device_train_batch_size=4,
            num_train_epochs=2,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows(),
        data_collator=padded,
        callbacks=[RecordingCallback(stores[1], **options)],
    ).train()
    runs = [store.trajectory() for store in stores]
    fused, plain = (
        torch.stack([run.segment(t).loss_derivatives for t in range(len(run))]).nan_to_num() for run in runs
    )
    assert plain.any()
    torch.testing.assert_close(fused, plain, rtol=2e-3, atol=1e-6)
    for reading in ("path", "removal"):
        mine, theirs = (
            pk.Explainer(store, fresh(adapted)).contributions(query(3), output=span(3), reading=reading)
            for store in stores
        )
        assert np.linalg.norm(mine - theirs) < 1e-2 * np.linalg.norm(theirs)


class Offloaded(nn.Module):
    """What it saves for its backward pass lies behind hooks, as under activation offloading."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        with torch.autograd.graph.save_on_cpu():
            return self.inner(**inputs)


def test_a_fused_head_that_was_offloaded_is_split_too_and_removal_refused():
    model = llama()
    trl.trainer.utils.add_fused_lm_head(model)
    model, store = Offloaded(model), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(rows(8), batch_size=4, collate_fn=padded)
    with pk.Recorder(store, model, optimizer, num_examples=8, segments=1, projection=pk.Identity()) as recorder:
        for batch in recorder.batches(loader):
            optimizer.zero_grad()
            (-model(**batch, fused_lm_head=True).log_probs.sum() / 20).backward()
            optimizer.step()
    trajectory = store.trajectory()
    assert not any(summary.split.unsplit for summary in trajectory.summaries)
    assert max(summary.split.gap for summary in trajectory.summaries) < 1e-6
    assert trajectory.manifest.output == "log_probs"
    explainer = pk.Explainer(store, Offloaded(llama()))
    explanation = explainer.explain(query(3), output=span(3))
    assert abs(explanation.ledger.gap) < 1e-6
    assert all(check.passed for check in explanation.checks)
    with pytest.raises(ConfigurationError, match="derivatives that were recorded are those of log-probabilities"):
        explainer.contributions(query(3), output=span(3), reading="removal")


def test_verify_recording_of_a_fused_head():
    model = llama()
    trl.trainer.utils.add_fused_lm_head(model)
    batch = padded([rows()[i] for i in range(4)])
    checked = pk.verify_recording(model, batch, lambda model, batch: model(**batch, fused_lm_head=True).loss)
    assert checked.passed


PACKED = {
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 16},
}


@pytest.mark.parametrize("way", PACKED)
def test_rows_that_hold_several_examples_are_refused(way, sft):
    made = sft(llama(), [RecordingCallback(pk.MemoryStore())], bf16=False, **PACKED[way])
    with pytest.raises(ExampleIdError, match=r"one row of the batch holds several examples.*padding_free=False"):
        made.train()
    plain = sft(llama(), bf16=False, max_steps=1)
    plain.train()  # nothing listens any more
    store = pk.MemoryStore()
    with pytest.warns(UserWarning, match="an earlier training did not come to its end"):
        sft(llama(), [RecordingCallback(store)], bf16=False, max_steps=1).train()
    assert store.manifest().ended == "finished"


@pytest.mark.parametrize(
    "arguments",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"packing": True, "max_length": 16, "per_device_train_batch_size": 1},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 1},
    ],
    ids=["wrapped", "packed rows one by one", "padding-free, one by one"],
)
def test_packed_rows_are_the_examples_where_each_is_a_row(arguments, sft):
    store = pk.MemoryStore()
    options = {"segments": 1, "projection": pk.Identity()}
    made = sft(llama(), [RecordingCallback(store, **options)], bf16=False, num_train_epochs=1, **arguments)
    made.train()
    trajectory = store.trajectory()
    assert trajectory.num_examples == len(made.train_dataset)
    assert max(summary.split.gap for summary in trajectory.summaries) < 1e-6
    explanation = pk.Explainer(store, llama()).explain({"input_ids": query(3)["input_ids"]}, output=span(3))
    assert abs(explanation.ledger.gap) < 1e-6
    assert all(check.passed for check in explanation.checks)


def test_a_copy_by_deepcopy_is_refused_by_name(sft):
    """`copy.deepcopy` of a patched model runs the original; pkexplain's own copies do not."""
    store = pk.MemoryStore()
    made = sft(llama(), [RecordingCallback(store)], bf16=False, max_steps=1)
    made.train()
    copied = copy.deepcopy(made.model)
    with pytest.raises(ConfigurationError, match="computed from the parameters of another model"):
        pk.Explainer(store, copied).explain(query(3), output=span(3))
    assert all(p.grad is None for p in made.model.parameters())
