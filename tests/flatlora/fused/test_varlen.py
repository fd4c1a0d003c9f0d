"""Joined rows: nothing is lost or mixed, losses and gradients are those of padded rows, and runs resume exactly."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import run_exp
from flatlora.fused import acceleration, varlen
from flatlora.fused.cross_entropy import forward_without_logits
from flatlora.fused.lora_linear import fuse
from flatlora.fused.varlen import VARLEN, allow_joined_rows, joins_rows, moved, pack, tokens_that_fit
from flatlora.train import trainer as trainer_module
from flatlora.train import training
from flatlora.train.trainer import FlatTrainer
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder, tiny_llama, tiny_lora

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")


def padded_rows(lengths, seed=0):
    """Random rows, the first third of each without a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=generator)
    place = torch.arange(max(lengths))
    mask = (place < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (place < torch.tensor(lengths)[:, None] // 3), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def joining(model):
    """The model with the changes that a GPU gets, on the CPU."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.model.forward = acceleration._forward_without_mask(base.model)
    base.forward = forward_without_logits(base)
    base.joins_rows = True
    return model.train()


def fuse_and_join(model, device):
    fuse(joining(model))
    return []


def with_joined_rows(words):
    """`run_exp.main` with the micro-steps and joined rows of a GPU."""
    FlatTrainer._on_gpu = property(lambda trainer: True)
    acceleration.accelerate = fuse_and_join
    return run_exp.main(words)


# --- joining


@pytest.mark.parametrize("most", [1, 40, 100, 1000])
def test_every_token_position_and_label_is_kept_in_order(most):
    lengths = [30, 1, 64, 7, 8, 120, 3, 3]
    batch = padded_rows(lengths)
    rows = []
    for each in pack(batch, most):
        starts, ids, positions = (
            each[key].flatten().tolist() for key in ("cu_seq_lens_q", "input_ids", "position_ids")
        )
        assert each["cu_seq_lens_q"].dtype == torch.int32
        assert starts == sorted(starts)
        assert starts[-1] == len(ids)
        kept = each["shift_labels"][0] >= 0
        labels = torch.full((len(ids),), -100).index_put_(
            (each["logits_to_keep"][kept],), each["shift_labels"][0][kept]
        )
        for first, last in itertools.pairwise(starts):
            assert positions[first:last] == list(range(last - first))
            assert last - first <= each["max_length_q"]
            rows.append((ids[first:last], labels[first:last].tolist()))
        assert len(ids) % 128 == len(starts) % 8 == each["max_length_q"] % 128 == 0
    rows = [row for row in rows if any(row[0])]  # not those of padding
    assert len(rows) == len(lengths)
    for (ids, labels), length, *own in zip(rows, lengths, batch["input_ids"], batch["labels"], strict=True):
        assert ids == own[0][:length].tolist()
        assert labels == [*own[1][1:length].tolist(), -100]


@pytest.mark.parametrize(
    ("lengths", "most", "spans"),
    [
        ([10] * 8, 80, [(0, 8)]),
        ([10] * 8, 79, [(0, 4), (4, 8)]),
        ([10] * 9, 40, [(0, 3), (3, 6), (6, 9)]),
        ([200, 10, 10], 100, [(0, 1), (1, 3)]),
        ([10, 10, 200], 100, [(0, 2), (2, 3)]),
        ([30, 5, 41, 17, 2], 60, [(0, 2), (2, 5)]),
        ([5], 1, [(0, 1)]),
    ],
)
def test_micro_batches_are_few_and_even_and_within_the_limit(lengths, most, spans):
    assert varlen._spans(lengths, most) == spans


@pytest.mark.parametrize(("tokens", "rounded"), [(-5, 1024), (1500, 1024), (2000, 1536), (9000, 8192), (1e9, 16384)])
def test_the_limit_by_memory_is_one_of_few(tokens, rounded):
    assert varlen._rounded(tokens) == rounded


# --- exactness


@pytest.mark.parametrize("shape", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}])
@pytest.mark.parametrize("most", [60, 1000])
def test_loss_and_gradients_are_those_of_padded_rows(shape, most):
    batch, items = padded_rows([30, 5, 41, 17, 2]), torch.tensor(60)
    plain, joined = tiny_lora(**shape).train(), joining(tiny_lora(**shape))
    plain.get_base_model().loss_type = "ForCausalLM"
    loss = plain(**batch, num_items_in_batch=items).loss
    loss.backward()
    packs = pack(batch, most)
    assert len(packs) == (1 if most == 1000 else 2)
    losses = [joined(**each, num_items_in_batch=items).loss for each in packs]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), loss, rtol=1e-5, atol=0)
    for (name, own), expected in zip(joined.named_parameters(), plain.parameters(), strict=True):
        if own.requires_grad:
            torch.testing.assert_close(own.grad, expected.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_no_row_sees_another():
    model = joining(tiny_llama())
    batch, other = padded_rows([20, 30]), padded_rows([20, 30], seed=1)
    other["labels"][0], batch["labels"][0] = -100, -100  # the loss is that of the second row
    other["input_ids"][1], other["labels"][1] = batch["input_ids"][1], batch["labels"][1]
    losses = [model(**pack(rows, 100)[0], num_items_in_batch=torch.tensor(1)).loss for rows in (batch, other)]
    assert not torch.equal(batch["input_ids"][0], other["input_ids"][0])
    assert torch.equal(*losses)


def test_evaluation_and_padded_rows_are_as_before():
    batch, plain, joined = padded_rows([30, 5]), tiny_llama(), joining(tiny_llama()).eval()
    assert torch.equal(joined(**batch).loss, plain(**batch).loss)
    assert joined.config._attn_implementation == plain.config._attn_implementation != VARLEN


@pytest.mark.parametrize(
    "changes", [{"attention_dropout": 0.1}, {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3}]
)
def test_a_model_without_such_a_kernel_keeps_its_padding(changes):
    model = tiny_llama(**changes).to(torch.bfloat16)
    assert not allow_joined_rows(model)
    assert not joins_rows(model)


def test_a_model_whose_loss_changes_keeps_its_padding(caplog, monkeypatch):
    model = tiny_llama().to(torch.bfloat16)
    model.forward, model.model.forward = forward_without_logits(model), acceleration._forward_without_mask(model.model)
    assert allow_joined_rows(model) == ["rows joined without padding"]
    wrong = varlen._joined
    model.lm_head.weight.data *= 100  # so that the loss depends on what a token sees
    monkeypatch.setattr(varlen, "_joined", lambda lengths, *rest: wrong([sum(lengths)], *rest))
    assert not allow_joined_rows(model)
    assert not joins_rows(model)
    assert "its loss changes without padding" in caplog.text


@pytest.mark.parametrize(
    ("asked", "reason"),
    [({"softcap": 30.0}, "softcap"), ({"s_aux": torch.zeros(4)}, "s_aux"), ({"sliding_window": 4}, "sliding_window")],
)
def test_a_model_whose_attention_has_more_than_the_kernel_keeps_its_padding(asked, reason, caplog, monkeypatch):
    plain = varlen._attend  # as a model that hands more to its attention
    monkeypatch.setattr(
        varlen.AttentionInterface,
        "_global_mapping",
        varlen.AttentionInterface._global_mapping | {VARLEN: lambda *args, **kwargs: plain(*args, **kwargs | asked)},
    )
    model = tiny_llama().to(torch.bfloat16)
    model.forward, model.model.forward = forward_without_logits(model), acceleration._forward_without_mask(model.model)
    assert not allow_joined_rows(model)
    assert f"its attention has {reason}" in caplog.text


def test_attention_dropout_is_not_left_out_silently():
    query, starts = torch.zeros(1, 2, 8, 4), torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="its attention has dropout"):
        varlen._attend(None, query, query, query, None, starts, 8, dropout=0.1)


# --- runs


@pytest.fixture
def settings(tiny_settings, monkeypatch):
    """Settings of runs that join rows on the CPU, into two micro-batches a step."""

    monkeypatch.setattr(FlatTrainer, "_on_gpu", property(lambda trainer: True))
    monkeypatch.setattr(acceleration, "accelerate", fuse_and_join)
    return [*tiny_settings, "rho=flat", "rho.sigma=0.3", "trainer.micro_batch_tokens=200", "dataset.train_rows=22"]


def run(settings, name, *more):
    words = [f"{word}-{name}" if word.startswith("results_root=") else word for word in settings] + [*more]
    assert run_exp.main(words) == 0
    return run_folder(words)


def test_a_run_is_that_of_padded_rows(settings):
    """Also in the last step of an epoch, which has two rows."""
    joined, padded = run(settings, "joined"), run(settings, "padded", "trainer.micro_batch_tokens=0")
    record = json.loads((joined / "run.json").read_text())
    assert "micro-batches of up to 200 tokens" in record["kernels"]
    assert adapter_bytes(joined) != adapter_bytes(padded)  # sums in another order
    rows = metrics_rows(joined), metrics_rows(padded)
    assert len(rows[0]) == len(rows[1]) == 6
    for left, right in zip(*rows, strict=True):
        assert left["tokens"] == right["tokens"]
        for key in ("loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=2e-4)


def test_a_killed_run_goes_on_exactly_and_copy_is_recompute(settings, monkeypatch):
    settings = [*settings, "trainer.save_steps=2"]
    whole = run(settings, "whole")
    with monkeypatch.context() as patch:
        die_at(5, patch)
        with pytest.raises(Killed):
            run(settings, "killed")
    for folder in (run(settings, "killed", "resume=true"), run(settings, "recompute", "rho.mode=recompute")):
        assert adapter_bytes(folder) == adapter_bytes(whole)
        assert metrics_rows(folder) == metrics_rows(whole)


@pytest.mark.extra
def test_a_run_that_began_with_padding_goes_on_with_it(settings, monkeypatch):
    """Such as one of an earlier version: its checkpoint has no limit."""
    settings = [*settings, "trainer.save_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "trains_on_joined_rows", lambda experiment, model: False)
        whole = run(settings, "whole")
        die_at(5, patch)
        with pytest.raises(Killed):
            run(settings, "killed")
    resumed = run(settings, "killed", "resume=true")
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert "micro-batches of" not in (resumed / "run.json").read_text()


def test_the_limit_by_memory_is_that_of_the_process_with_the_least(monkeypatch):
    monkeypatch.setattr(trainer_module, "tokens_that_fit", lambda *args: 4096)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(min(int(tensor), 2048)))
    for processes, most in ((1, 4096), (2, 2048)):
        before = SimpleNamespace(micro_batch_tokens=None)
        trainer = object.__new__(FlatTrainer)
        trainer.args, trainer.model = SimpleNamespace(device=CPU, world_size=processes), None
        trainer.recorder = SimpleNamespace(before=before)
        trainer.experiment = SimpleNamespace(trainer=SimpleNamespace(micro_batch_tokens=None))
        assert trainer._most_tokens(torch.tensor(1)) == before.micro_batch_tokens == most


def test_what_needs_micro_batches_of_rows_has_them(settings, capsys):
    run(settings, "rows", "rho.resample=micro_batch", "trainer.max_steps=1", "optim.warmup_ratio=0")
    assert "trainer.micro_batch_tokens=200 has no effect" in " ".join(capsys.readouterr().err.split())


@pytest.mark.gpu
@needs_gpu
class TestGPU:
    @pytest.mark.parametrize("shape", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}])
    def test_loss_and_gradients_are_those_of_padded_rows(self, shape):
        cuda, batch, items = torch.device("cuda"), padded_rows([300, 5, 41, 170, 2]), torch.tensor(400, device="cuda")
        plain, joined = (tiny_lora(torch.bfloat16, **shape).to(cuda).train() for _ in range(2))
        done = acceleration.accelerate(joined, cuda)
        assert "rows joined without padding" in done
        loss = plain(**moved(batch, cuda), num_items_in_batch=items).loss
        loss.backward()
        (only,) = pack(batch, 1000)
        other = joined(**moved(only, cuda), num_items_in_batch=items).loss
        other.backward()
        torch.testing.assert_close(other, loss, rtol=1e-2, atol=0)
        for (name, own), expected in zip(joined.named_parameters(), plain.parameters(), strict=True):
            if own.requires_grad:
                error = (own.grad - expected.grad).norm() / expected.grad.norm()
                assert error < 0.03, name

    def test_a_run_is_that_of_padded_rows_and_copy_is_recompute(self, tiny_settings):
        kept = [word for word in tiny_settings if not word.startswith(("model.dtype", "trainer.device"))]
        settings = [*kept, "model.dtype=bfloat16", "trainer.deterministic=true", "rho=flat", "rho.sigma=0.3"]
        settings += ["optim.epochs=4"]
        copy = run(settings, "copy", "rho.mode=copy", "trainer.micro_batch_tokens=200")
        recompute = run(settings, "recompute", "rho.mode=recompute", "trainer.micro_batch_tokens=200")
        assert adapter_bytes(copy) == adapter_bytes(recompute)
        by_memory, padded = run(settings, "memory"), run(settings, "padded", "trainer.micro_batch_tokens=0")
        record = json.loads((by_memory / "run.json").read_text())
        assert "micro-batches of up to 16384 tokens" in record["kernels"]
        rows = [metrics_rows(folder) for folder in (copy, by_memory, padded)]
        assert len(rows[0]) == 24
        for left, middle, right in zip(*rows, strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-2)
            assert middle["loss"] == pytest.approx(right["loss"], rel=1e-2)
            assert left["tokens"] == middle["tokens"] == right["tokens"]

    def test_the_limit_is_of_the_free_memory(self):
        model, cuda = tiny_lora(torch.bfloat16).to("cuda"), torch.device("cuda")
        acceleration.accelerate(model, cuda)
        assert tokens_that_fit(lambda inputs: model.train()(**inputs).loss, model, cuda) == 16384
