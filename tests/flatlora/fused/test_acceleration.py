"""What makes the step fast on a GPU changes nothing but the time: against plain torch, against runs without it."""

import json
import shutil
import types

import pytest
import torch
from torch import nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama

import run_exp
from eval.backends import Sampling
from flatlora.fused import acceleration
from flatlora.fused.acceleration import GraphedMicroStep, accelerate
from flatlora.fused.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from scripts.train_step import train_step
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder, tiny_llama, tiny_lora

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


def test_a_cpu_gets_what_needs_no_gpu():
    done = accelerate(tiny_lora(), torch.device("cpu"))
    assert done == ["14 fused LoRA layers", "batches without padding", "chunked cross entropy"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_only_this_model_is_changed():
    pytest.importorskip("liger_kernel")
    before = dict(vars(modeling_llama))
    accelerate(tiny_lora().to(CUDA), CUDA)
    assert all(getattr(modeling_llama, name) is value for name, value in before.items())
    tiny_lora()(torch.arange(3, 9)[None])  # on the CPU, where no kernel of Liger's runs


class LigerSwiGLUMLP(nn.Module):
    """What Liger puts into an MLP, in plain torch."""

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LigerGEGLUMLP(nn.Module):
    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


@pytest.mark.parametrize(
    ("activation", "kernel", "kept"),
    [
        ("relu", LigerSwiGLUMLP, False),
        ("gelu", LigerSwiGLUMLP, False),
        ("silu", LigerSwiGLUMLP, True),
        ("gelu_pytorch_tanh", LigerGEGLUMLP, True),
        ("silu", LigerGEGLUMLP, False),
    ],
)
def test_a_kernel_with_another_activation_is_taken_back(activation, kernel, kept, caplog):
    base, ids = tiny_llama(hidden_act=activation), torch.arange(3, 19)[None]
    expected = base(ids).logits
    mlps = [layer.mlp for layer in base.model.layers]
    for mlp in mlps:
        mlp.forward = types.MethodType(kernel.forward, mlp)
    acceleration._restore_other_activations(base)
    torch.testing.assert_close(base(ids).logits, expected)
    assert ["forward" in vars(mlp) for mlp in mlps] == [kept, kept]
    assert ("2 layers keep transformers' forward" in caplog.text) is not kept


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_compute_the_models_own_activation(activation):
    pytest.importorskip("liger_kernel")
    model, ids = tiny_lora(hidden_act=activation).to(CUDA).train(), torch.arange(3, 19, device=CUDA)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # at small numbers, activations are nearly alike
        expected = model(ids, labels=ids).loss
        accelerate(model, CUDA)
        assert model(ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-4)


class TestWithoutMask:
    """On the CPU, where the same attention function runs."""

    @pytest.fixture
    def masks(self, monkeypatch):
        """What each call of torch's attention got as (mask, causal flag)."""
        seen, plain = [], nn.functional.scaled_dot_product_attention

        def watched(*args, attn_mask=None, is_causal=False, **kwargs):
            seen.append((attn_mask is not None, is_causal))
            return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        return seen

    @pytest.fixture
    def capturing(self, monkeypatch):
        """transformers' own way to see a capture; from then on it wants a mask."""
        monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)

    @pytest.mark.usefixtures("capturing")
    def test_no_mask_is_built_and_nothing_else_changes(self, masks):
        model, ids = tiny_lora().train(), torch.arange(3, 19)[None]
        base = model.get_base_model()
        assert acceleration.attends_to_all_before(base)
        expected = model(ids, labels=ids).loss
        base.model.forward = acceleration._forward_without_mask(base.model)
        masks.clear()
        assert torch.equal(model(ids, labels=ids).loss, expected)
        assert set(masks) == {(False, True)}
        assert base.config._attn_implementation == "sdpa"

    def test_a_mask_that_is_given_holds(self, masks):
        model, ids = tiny_lora().train(), torch.arange(3, 35).view(2, 16)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        expected = model(ids, attention_mask=mask).logits
        base = model.get_base_model()
        base.model.forward = acceleration._forward_without_mask(base.model)
        masks.clear()
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert set(masks) == {(True, False)}

    def test_generation_is_as_before(self):
        model, ids = tiny_lora().eval(), torch.arange(3, 9)[None]
        expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        base = model.get_base_model()
        base.model.forward = acceleration._forward_without_mask(base.model)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), expected)

    def test_windows_and_other_kernels_keep_theirs(self):
        base = tiny_lora().get_base_model()
        base.config.sliding_window = 8
        assert not acceleration.attends_to_all_before(base)
        base.config.sliding_window, base.config.layer_types = None, ["full_attention", "sliding_attention"]
        assert not acceleration.attends_to_all_before(base)


class TestHead:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("items", [None, 77])
    def test_equals_its_reference(self, dtype, items):
        pytest.importorskip("liger_kernel")
        torch.manual_seed(0)
        hidden = torch.randn(3, 700, 64, device=CUDA, dtype=dtype, requires_grad=True)
        weight = 0.1 * torch.randn(5000, 64, device=CUDA, dtype=dtype)
        labels = torch.randint(0, 5000, (3, 700), device=CUDA)
        labels[0, :300] = -100
        count = items and torch.tensor(items, device=CUDA)
        loss = linear_cross_entropy(hidden, weight, labels, count)
        (gradient,) = torch.autograd.grad(loss, hidden)
        expected = linear_cross_entropy_reference(hidden, weight, labels, count)
        (expected_gradient,) = torch.autograd.grad(expected, hidden)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        assert (gradient - expected_gradient).norm() < tolerance * expected_gradient.norm()
        assert not gradient[0, :300].any()


class TestGraph:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def repeatable(self, monkeypatch):
        """The backward of cuDNN's and Flash's attention adds up in any order unless asked not to."""
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    def micro_steps(self, model, *, mode=None, steps=3, **more):
        """Losses and last gradients of steps with three micro-batches of two lengths."""
        trained = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator(CUDA).manual_seed(0)

        def loss_of(inputs):
            with torch.autocast("cuda", torch.bfloat16):
                return model(input_ids=inputs["ids"], labels=inputs["ids"]).loss

        perturbation = None
        if mode:
            settings = {"sigma": 0.3, "total_steps": steps, "seed": 1, "resample": "micro_batch"}
            perturbation = WeightPerturbation(find_lora_layers(model), mode=mode, **settings)
        graphed = GraphedMicroStep(loss_of, model, **more)
        optimizer, losses, gradients = torch.optim.SGD(trained, lr=0.05), [], []
        optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in trained]))

        def micro_step(numbered):
            number, length = numbered
            if perturbation:
                perturbation.next_micro_batch(number)
            ids = torch.randint(3, 96, (2, length), device=CUDA, generator=generator)
            return graphed({"ids": ids}, perturbation is not None and perturbation.perturbed)

        for step in range(steps):
            micro_batches = enumerate((16, 16, 24))
            taken = train_step(micro_step, micro_batches, optimizer, step=step, perturbation=perturbation)
            losses += [loss.item() for loss in taken]
        if perturbation:
            perturbation.close()
        self.captured = graphed.captured
        graphed.close()
        return losses, gradients[-1]

    @pytest.mark.parametrize("mode", [None, "copy", "recompute"])
    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_replays_are_the_eager_steps(self, mode, dropout):
        results = []
        for settings in ({}, {"largest": 0}):  # 0 captures none
            model = tiny_lora(torch.bfloat16, dropout=dropout).to(CUDA).train()
            accelerate(model, CUDA)
            torch.cuda.manual_seed(5)
            results.append(self.micro_steps(model, mode=mode, **settings))
            # two lengths; with a ramp from σ = 0 the first step reads W, and is another graph
            assert self.captured == (0 if settings else 2 if mode is None else 4)
        (graph_losses, graph_gradients), (losses, gradients) = results
        if dropout == 0:  # a replayed dropout draws from the generator in another way
            assert graph_losses == losses
            assert all(torch.equal(*pair) for pair in zip(gradients, graph_gradients, strict=True))
        assert len(set(graph_losses)) == len(graph_losses)
        assert all(abs(a - b) < 0.5 for a, b in zip(losses, graph_losses, strict=True))

    def test_dropout_goes_on_where_a_shape_is_refused(self, caplog):
        """The generator of random numbers is captured too: a failed capture gives it back."""
        model = tiny_lora(torch.bfloat16, dropout=0.2).to(CUDA).train()
        accelerate(model, CUDA)
        refused = []

        def loss_of(inputs):
            loss = model(input_ids=inputs["ids"], labels=inputs["ids"]).loss
            if inputs["ids"].shape[1] == 24:
                refused.append(loss.item())  # the host waits, which a graph cannot
            return loss

        graphed = GraphedMicroStep(loss_of, model)
        ids = torch.arange(3, 51, device=CUDA).view(2, 24)
        for columns in (16, 24, 16, 24, 20):
            assert graphed({"ids": ids[:, :columns]}).isfinite()
        assert graphed.captured == 2
        assert len(refused) == 4  # two warm-ups and two steps
        assert refused[2] == refused[0]  # the warm-ups are undone
        assert refused[3] != refused[2]
        assert caplog.text.count("No CUDA graph") == 1
        graphed.close()

    def test_copy_is_recompute_in_replays(self):
        results = []
        for mode in ("copy", "recompute"):
            model = tiny_lora(torch.bfloat16).to(CUDA).train()
            accelerate(model, CUDA)
            results.append(self.micro_steps(model, mode=mode))
        assert results[0][0] == results[1][0]
        assert all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))


class TestRuns:
    """Whole runs of a tiny model on a GPU."""

    pytestmark = gpu

    @pytest.fixture
    def settings(self, tiny_settings):
        kept = [w for w in tiny_settings if not w.startswith(("model.dtype", "trainer.device"))]
        return [*kept, "model.dtype=bfloat16", "trainer.deterministic=true", "rho=flat", "rho.sigma=0.3"]

    def run(self, settings, name, *more):
        words = [f"{word}-{name}" if word.startswith("results_root=") else word for word in settings] + [*more]
        assert run_exp.main(words) == 0
        return run_folder(words)

    def test_copy_is_recompute_and_repeats_and_the_backbone_stays(self, settings):
        copy = self.run(settings, "copy", "rho.mode=copy")
        record = json.loads((copy / "run.json").read_text())
        assert record["kernels"][0] == "14 fused LoRA layers"
        assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
        assert adapter_bytes(self.run(settings, "again", "rho.mode=copy")) == adapter_bytes(copy)
        recompute = self.run(settings, "recompute", "rho.mode=recompute")
        assert adapter_bytes(recompute) == adapter_bytes(copy)
        assert metrics_rows(recompute) == metrics_rows(copy)

    def test_losses_are_those_of_a_run_without_kernels(self, settings):
        fast = metrics_rows(self.run(settings, "fast"))
        plain = metrics_rows(self.run(settings, "plain", "trainer.kernels=off"))
        assert len(fast) == len(plain) == 6
        for left, right in zip(fast, plain, strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=5e-3)
            assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=0.1)

    def test_killed_and_resumed_is_never_killed(self, settings, monkeypatch):
        self.kill_and_compare(settings, 5, monkeypatch)

    def kill_and_compare(self, settings, step, monkeypatch):
        settings = [*settings, "trainer.save_steps=2", "rho.every=3"]
        whole = self.run(settings, "whole")
        die_at(step, monkeypatch)
        with pytest.raises(Killed):
            self.run(settings, "killed")
        monkeypatch.undo()
        killed = self.run(settings, "killed", "resume=true")
        assert adapter_bytes(killed) == adapter_bytes(whole)
        assert metrics_rows(killed) == metrics_rows(whole)

    @pytest.fixture(params=["t5", "clip"])
    def other_family(self, request, tiny_settings, tiny_t5_folder, tmp_path):
        """Settings of a run of an FP32 model that is no decoder, without dropout."""
        kept = [word for word in tiny_settings if not word.startswith(("trainer.device", "model.", "dataset."))]
        kept += ["rho=flat", "rho.sigma=0.3", "trainer.deterministic=true", "optim.epochs=4"]
        if request.param == "clip":
            pytest.importorskip("sklearn")
            return [*kept, "model=clip_tiny", "dataset=digits", "dataset.train_rows=24", "dataset.validation_rows=0"]
        folder = shutil.copytree(tiny_t5_folder, tmp_path / "t5")
        config = json.loads((folder / "config.json").read_text()) | {"dropout_rate": 0.0}
        config |= {"pad_token_id": 0, "decoder_start_token_id": 0}  # older versions of transformers save neither
        (folder / "config.json").write_text(json.dumps(config))
        model = [f"model.hub_id={folder}", "model.embedded=null", "model.family=seq2seq", "model.dtype=float32"]
        return [*kept, *model, "dataset.train_rows=24", "dataset.validation_rows=0", "dataset.test_rows=4"]

    def test_other_families_are_captured_and_learn_as_without_kernels(self, other_family, monkeypatch):
        captured, close = [], GraphedMicroStep.close

        def counted(self):
            captured.append(self.captured)
            close(self)

        monkeypatch.setattr(GraphedMicroStep, "close", counted)
        fast = self.run(other_family, "fast", "rho.mode=copy")
        assert len(captured) == 1
        assert captured[0] >= 2  # at W, where the ramp is 0, and at W + ε
        assert adapter_bytes(self.run(other_family, "recompute", "rho.mode=recompute")) == adapter_bytes(fast)
        plain = metrics_rows(self.run(other_family, "plain", "trainer.kernels=off"))
        tf32 = metrics_rows(self.run(other_family, "tf32", "trainer.matmul_precision=high"))
        assert torch.get_float32_matmul_precision() == "highest"
        assert len(plain) == len(tf32) >= 20
        for left, right, rounded in zip(metrics_rows(fast), plain, tf32, strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
            assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-2)
            assert rounded["loss"] == pytest.approx(right["loss"], rel=2e-2)

    def test_other_families_go_on_as_if_never_killed(self, other_family, monkeypatch):
        self.kill_and_compare(other_family, 7, monkeypatch)

    def test_answers_are_those_of_the_plain_model(self, settings, tiny_model_folder):
        """Left-padded generation through the fused layers and the patched forward."""
        from transformers import AutoModelForCausalLM

        from eval.backends.hf import HFBackend
        from flatlora.models import loading

        config = loading.ModelConfig(name="m", hub_id=str(tiny_model_folder), family="causal_lm", dtype="float32")
        tokenizer, answers = loading.load_tokenizer(config), []
        for fast in (False, True):
            torch.manual_seed(0)
            base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).to(CUDA)
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.05)
            if fast:
                accelerate(model, CUDA)
            backend = HFBackend(model, tokenizer, batch_size=2)
            answers.append(backend.generate(["Q: 1 + 1?", "A much longer question, padded on the left."], Sampling(8)))
        assert answers[0] == answers[1]
