"""What a run logs and leaves in its folder, under every optimizer, and what that costs."""

from __future__ import annotations

import json
import math

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import pion_hf
from pion_hf import PionTrainer, PionTrainingArguments
from pion_hf.integrations import callbacks
from pion_hf.integrations.callbacks import RunCallback, watch
from pion_hf.integrations.hidden_matrices import HiddenMatrix, Norms, Spectra, hidden_matrices, spread
from pion_hf.linalg.spectrum import spectral_drift
from pion_hf.optim.blocks import Layout
from pion_hf.report.summary import overview
from pion_hf.runs.folder import LOG, MATRICES, RECORD, read_run
from tests.conftest import toy_llama

QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture(autouse=True)
def _plenty_of_time(monkeypatch):
    """Here everything is measured, however busy the machine is."""
    monkeypatch.setattr(callbacks, "FREE_SECONDS", 1e9)


@pytest.fixture
def make(token_rows, tmp_path):
    """A trainer of the toy model, whose run lies in `tmp_path / "run"`."""

    def build(model=None, *, trainer_class=PionTrainer, extra=(), rows=None, evaluated=None, **options) -> Trainer:
        fixed = {"output_dir": str(tmp_path / "run"), "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 2}
        args_class = PionTrainingArguments if issubclass(trainer_class, PionTrainer) else TrainingArguments
        args = args_class(**{**fixed, **QUIET, **options})
        data = {"train_dataset": rows or token_rows, "eval_dataset": evaluated}
        return trainer_class(model=model or toy_llama(), args=args, callbacks=list(extra), **data)

    return build


@pytest.fixture
def train(make, tmp_path):
    def run(*args, resume=None, **options):
        trainer = make(*args, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, read_run(tmp_path / "run")

    return run


class Keep(TrainerCallback):
    """Hidden matrices by step, before the first and after each."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, torch.Tensor]] = {}

    def _keep(self, state, model) -> None:
        self.steps[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 2}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._keep(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._keep(state, model)


class Tracker(TrainerCallback):
    """What a tracker of experiments would be sent."""

    def __init__(self) -> None:
        self.sent: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append({**logs, "step": state.global_step})


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("out of luck\nand more")


# -- the folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["pion", "pion_ambient", "teon", "muon", "adamw_routed", "adamw_torch", "sgd"])
def test_snapshots_are_those_of_the_weights(optim, train):
    """Under any optimizer, against singular values by torch."""
    rate = 1e-3 if optim == "pion_ambient" else 1e-2
    _, run = train(optim=optim, learning_rate=rate, extra=[keep := Keep()])
    assert run.status == "finished"
    assert [snapshot.step for snapshot in run.snapshots] == list(range(7))
    assert len(run.matrices) == 14
    for snapshot in run.snapshots:
        for index, matrix in enumerate(run.matrices):
            values = torch.linalg.svdvals(keep.steps[snapshot.step][matrix["name"]].double())
            norm = snapshot.values["spectral_norm"][index]
            assert 0.97 * values[0].item() < norm < values[0].item() * (1 + 1e-5)
            rank = (values.square().sum() / norm**2).item()
            assert snapshot.values["stable_rank"][index] == pytest.approx(rank, rel=1e-4)
        if snapshot.step:
            for index, matrix in enumerate(run.matrices):
                now, before = (keep.steps[s][matrix["name"]] for s in (snapshot.step, snapshot.step - 1))
                rms = (now - before).square().mean().sqrt().item()
                assert snapshot.values["update_rms"][index] == pytest.approx(rms, rel=1e-3, abs=1e-9)
    assert ("angle_in" in run.snapshots[-1].values) == (optim in ("pion", "pion_ambient"))
    for name, (before, after) in run.spectra.items():
        for step, values in ((0, before), (6, after)):
            torch.testing.assert_close(
                values[0], torch.linalg.svdvals(keep.steps[step][name].double()), rtol=1e-4, atol=1e-5
            )
    assert run.spectra.keys() == {matrix["name"] for matrix in run.matrices}
    drifts = [spectral_drift(*pair).max().item() for pair in run.spectra.values()]
    assert run.record["spectrum_drift"] == pytest.approx(max(drifts), rel=1e-3, abs=1e-6)


def test_the_record_says_what_ran(train, token_rows):
    rows = datasets.Dataset.from_list(token_rows)
    trainer, run = train(optim_adamw_lr=1e-3, optim_rms=0.1, hub_token="secret", rows=rows)
    record = run.record
    assert record["model"] == {
        "name": "LlamaForCausalLM",
        "class": "LlamaForCausalLM",
        "parameters": trainer.model.num_parameters(),
        "trainable": trainer.model.num_parameters(),
    }
    assert record["data"] == {"train": "Dataset, 16 rows", "evaluation": None}
    assert record["optimizer"]["options"]["rms"] == 0.1
    assert record["arguments"]["optim_adamw_lr"] == 1e-3
    assert record["arguments"]["max_steps"] == 6
    assert not {"weight_decay", "adam_beta1", "hub_token"} & record["arguments"].keys()
    assert "secret" not in (run.folder / RECORD).read_text()
    assert record["steps"] == 6
    assert record["versions"]["torch"] == torch.__version__
    assert record["peak_memory_bytes"] > 2**20
    times = record["times"]
    assert record["seconds"] == times["total"] > sum(v for k, v in times.items() if k != "total") > 0
    assert record["optimizer_share"] == pytest.approx(times["optimizer"] / times["total"], rel=0.5)
    assert record["matrices"][4] == {
        "name": "model.layers.0.mlp.gate_proj.weight",
        "role": "gate",
        "layer": 0,
        "rule": "pion",
        "shape": [48, 32],
    }


def test_input_tokens_in_every_entry_are_not_the_end(train):
    """With this transformers writes the time so far into every entry, as it otherwise does into the last."""
    trainer, run = train(include_num_input_tokens_seen="all")
    plain = [entry for entry in run.logs if "learning_rate/pion" in entry]
    assert [entry["step"] for entry in plain] == [2, 4, 6]
    assert [snapshot.step for snapshot in run.snapshots][-1] == 6
    assert "spectrum_drift" in trainer.run_callback.summary


@pytest.mark.parametrize(("optim", "rate", "rms"), [("pion", 1e-3, 0.2), ("pion_ambient", 1e-4, 2.0)])
def test_the_logs_are_those_of_the_trainer_and_of_trackers(optim, rate, rms, train):
    trainer, run = train(optim=optim, learning_rate=rate, extra=[tracker := Tracker()])
    assert [entry["step"] for entry in run.logs] == [2, 4, 6, 6]
    for logged, kept, sent in zip(run.logs, trainer.state.log_history, tracker.sent, strict=True):
        assert logged.items() >= kept.items()
        assert logged == sent
    entry = run.logs[1]
    wanted = {f"{key}/{rule}" for key in ("learning_rate", "update_rms") for rule in ("pion", "adamw")}
    wanted |= {f"angle_{side}/{kind}" for side in ("in", "out") for kind in ("mean", "max")}
    wanted |= {"skipped_steps", "clipped", "optimizer_share", "spectral_norm/max", "stable_rank/mean", "spectrum_drift"}
    assert entry.keys() >= wanted | {"orthogonality_error"}
    # Of the chord; a step's size is that of the tangent, which is longer at second order.
    assert entry["update_rms/pion"] == pytest.approx(rms * entry["learning_rate/pion"], rel=5e-3)
    assert 0 < entry["angle_in/mean"] < entry["angle_in/max"] < math.pi
    assert 0 <= entry["orthogonality_error"] < 1e-5
    end = run.logs[-1]
    assert end["rotated_matrices"] == end["measured_spectra"] == 14
    assert 0 < end["logging_share"] < 1


def test_both_sides_are_told_where_rules_take_turns(train):
    """Every logged step is an even one, which rotates the outputs' side."""
    _, run = train(optim="pion", optim_args="scale=spectral", lr_scheduler_type="constant")
    assert run.logs[0]["angle_in/max"] == pytest.approx(1e-2, rel=0.2)
    assert run.logs[0]["angle_out/max"] == pytest.approx(1e-2, rel=0.2)


@pytest.mark.parametrize("optim", ["pion", "pion_ambient", "teon", "muon", "adamw_torch"])
def test_adapters_are_told_by_their_factors(optim, train):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    _, run = train(peft.get_peft_model(toy_llama(), config), optim=optim)
    assert [(m["role"], m["layer"], m["shape"]) for m in run.matrices[:4]] == [
        ("q A", 0, [4, 32]),
        ("q B", 0, [4, 32]),
        ("down A", 0, [4, 48]),
        ("down B", 0, [4, 32]),
    ]
    rules = {"pion": "pion_lora", "pion_ambient": "pion_lora", "adamw_torch": "adamw"}
    assert {m["rule"] for m in run.matrices} == {rules.get(optim, "teon_lora")}
    first = run.snapshots[0].values
    assert first["spectral_norm"][1] == 0
    assert math.isnan(first["stable_rank"][1]), "B starts at zero"
    if optim in ("pion", "pion_ambient"):
        assert run.logs[-1]["rotated_matrices"] == 4
        assert run.logs[-1]["spectrum_drift"] < 1e-5
        assert {"update_rms/pion_lora/rotate", "update_rms/pion_lora/orthogonal"} <= run.logs[0].keys()
        angles = run.snapshots[-1].values["angle_in"]
        assert angles[0] > 0
        assert math.isnan(angles[1]), "B grows, and turns nothing"


def phi3():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Phi3ForCausalLM(Phi3Config(vocab_size=105, pad_token_id=0, num_key_value_heads=2, **sizes))


def experts():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Qwen3MoeConfig(vocab_size=105, pad_token_id=0, num_experts=4, num_experts_per_tok=2, **sizes, **heads)
    return Qwen3MoeForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=105, n_embd=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(
    ("build", "roles", "shapes"),
    [
        (phi3, [*"oqkv", "gate", "up", "down"], {"q": [32, 32], "k": [16, 32], "gate": [48, 32], "down": [32, 48]}),
        (experts, [*"qkvo", "gate", "up", "down"], {"gate": [4, 16, 32], "down": [4, 32, 16]}),
        (gpt2, ["q", "k", "v", "attn.c_proj", "up", "mlp.c_proj"], {"up": [128, 32], "mlp.c_proj": [32, 128]}),
    ],
    ids=["fused", "experts", "transposed"],
)
@pytest.mark.parametrize("optim", ["pion", "adamw_torch"])
def test_roles_of_matrices_that_share_a_tensor(build, roles, shapes, optim, train):
    torch.manual_seed(0)
    model = build()
    _, run = train(model, optim=optim, max_steps=2)
    layer = [m for m in run.matrices if m["layer"] == 0]
    assert sorted(m["role"] for m in layer) == sorted(roles)
    for role, shape in shapes.items():
        assert next(m["shape"] for m in layer if m["role"] == role) == shape
    for values in run.snapshots[-1].values.values():
        assert len(values) == len(run.matrices)
    assert all(v > 0 for v in run.snapshots[-1].values["update_rms"])
    assert len(run.spectra) == len(run.matrices)


def test_masters_of_half_precision_weights_show_in_the_updates(train):
    """Updates of 2e-6, which bfloat16 weights of 1e-2 do not show."""
    _, run = train(toy_llama().bfloat16(), optim="pion", learning_rate=1e-5, lr_scheduler_type="constant")
    assert run.logs[-2]["update_rms/pion"] == pytest.approx(2e-6, rel=1e-2)


def test_a_model_without_hidden_matrices(train):
    model = toy_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("embed" in name or "norm" in name)
    _, run = train(model, optim="adamw_torch")
    assert (run.status, run.matrices, run.snapshots, run.spectra) == ("finished", [], [], {})
    assert "update_rms/adamw" in run.logs[0]


# -- how it ends, and goes on -----------------------------------------------------------------------


def test_a_run_that_fails_says_so(make, tmp_path):
    trainer = make(extra=[Fail()])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    record = read_run(tmp_path / "run").record
    assert (record["status"], record["error"], record["steps"]) == ("failed", "RuntimeError: out of luck", 3)


def test_while_it_runs_it_can_be_read(make, tmp_path):
    class Read(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.run = read_run(tmp_path / "run")

    make(extra=[reader := Read()]).train()
    assert reader.run.status == "running"
    assert [snapshot.step for snapshot in reader.run.snapshots] == [0, 1, 2, 3, 4, 5]
    assert [entry["step"] for entry in reader.run.logs] == [2, 4]
    assert list(load_file(tmp_path / "run" / "spectra.safetensors"))  # of before, while there is no after
    assert read_run(tmp_path / "run").spectra.keys()


@pytest.mark.parametrize("optim", ["pion", "adamw_torch"])
def test_a_resumed_run_goes_on_where_the_checkpoint_was(optim, train, tmp_path):
    saving = {
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": optim,
        "lr_scheduler_type": "constant",
        "logging_steps": 3,
    }
    _, straight = train(**saving)
    _, stopped = train(extra=[Stop(5)], **saving)
    assert stopped.logs[-1]["step"] == stopped.snapshots[-1].step == 5
    started, before = stopped.record["started"], {n: pair[0] for n, pair in stopped.spectra.items()}
    _, resumed = train(resume=str(tmp_path / "run" / "checkpoint-3"), **saving)
    assert resumed.record["started"] == started
    assert [e["step"] for e in resumed.logs] == [e["step"] for e in straight.logs]
    assert [s.step for s in resumed.snapshots] == [s.step for s in straight.snapshots]
    for name, (first, last) in resumed.spectra.items():
        assert torch.equal(first, before[name])
        torch.testing.assert_close(last, straight.spectra[name][1])
    for key in ("loss", f"update_rms/{straight.matrices[0]['rule']}", "spectral_norm/max"):
        assert resumed.series(key)[0] == straight.series(key)[0]
        assert resumed.series(key)[1] == pytest.approx(straight.series(key)[1], rel=1e-3)


def test_a_new_run_in_the_same_folder_begins_anew(train, tmp_path):
    train()
    (tmp_path / "run" / "eval.json").write_text("{}")
    _, run = train(max_steps=2, optim="adamw_torch")
    assert [entry["step"] for entry in run.logs] == [2, 2]
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2]
    assert run.evaluation is None
    assert run.matrices[0]["rule"] == "adamw"


def test_a_checkpoint_from_elsewhere_starts_a_folder(train, tmp_path):
    train(save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "run"))
    trainer, _ = train(resume=str(tmp_path / "run" / "checkpoint-3"), output_dir=str(tmp_path / "other"))
    run = read_run(tmp_path / "other")
    assert [snapshot.step for snapshot in run.snapshots] == [3, 4, 5, 6]
    assert trainer.state.global_step == 6


def test_what_was_evaluated_before_training_is_the_first_line(make, tmp_path, token_rows):
    trainer = make(eval_strategy="no")
    trainer.evaluate(token_rows)
    trainer.train()
    trainer.evaluate(token_rows)
    run = read_run(tmp_path / "run")
    assert [entry["step"] for entry in run.logs] == [0, 2, 4, 6, 6, 6]
    assert {"eval_loss" in entry for entry in (run.logs[0], run.logs[-1])} == {True}
    assert run.record["times"]["evaluation"] == 0


def test_time_of_evaluations_within_training_is_counted(train, token_rows):
    _, run = train(eval_strategy="steps", eval_steps=3, evaluated=token_rows)
    runtimes = [entry["eval_runtime"] for entry in run.logs if "eval_runtime" in entry]
    assert len(runtimes) == 2
    assert run.record["times"]["evaluation"] == pytest.approx(sum(runtimes))


def test_a_folder_that_cannot_be_written_does_not_end_training(make, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pion_hf.integrations.run_writer.append_line", full)
    messages = []
    monkeypatch.setattr("pion_hf.integrations.run_writer.logger.warning", messages.append)
    trainer = make()
    trainer.train()
    assert trainer.state.global_step == 6
    assert not (tmp_path / "run" / LOG).exists()
    (said,) = messages
    assert "run' cannot be written to ([Errno 28] No space left on device)" in said


def test_one_line_in_any_trainer(make, tmp_path):
    """`watch` comes before the trackers; a callback like any other writes the same files."""
    trainer = make(trainer_class=Trainer, optim="pion", extra=[tracker := Tracker()])
    callback = watch(trainer)
    metrics = trainer.train().metrics
    run = read_run(tmp_path / "run")
    assert "update_rms/pion" in tracker.sent[0]
    assert metrics["spectrum_drift"] == callback.summary["spectrum_drift"] == run.record["spectrum_drift"]
    trainer = make(trainer_class=Trainer, optim="pion", extra=[Tracker(), RunCallback()])
    trainer.train()
    assert read_run(tmp_path / "run").logs[0].keys() == run.logs[0].keys()
    assert pion_hf.watch is watch
    assert watch(trainer) is trainer.callback_handler.callbacks[0], "once"
    assert sum(isinstance(c, RunCallback) for c in trainer.callback_handler.callbacks) == 1


def test_other_processes_measure_and_write_nothing(monkeypatch):
    class Second:
        is_world_process_zero, global_step, log_history = False, 0, ()

    def fails(*args, **kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr(callbacks, "_Run", fails)
    callback, logs = RunCallback(), {"loss": 1.0, "learning_rate": 1.0}
    callback.on_train_begin(None, Second, None)
    for event in (callback.on_step_begin, callback.on_pre_optimizer_step, callback.on_optimizer_step):
        event(None, Second, None)
    callback.on_step_end(None, Second, None)
    callback.on_log(None, Second, None, logs=logs)
    callback.on_train_end(None, Second, None)
    assert logs == {"loss": 1.0, "learning_rate": 1.0}
    assert callback.summary == {}


def test_diverged_losses_are_null(train):
    _, run = train(optim="adamw_torch", learning_rate=1e30, max_grad_norm=0.0, logging_nan_inf_filter=False)
    assert "null" in (run.folder / LOG).read_text()
    assert math.isnan(run.logs[-2]["loss"])
    assert run.status == "finished"
    json.loads((run.folder / MATRICES).read_text().splitlines()[-1], parse_constant=pytest.fail)


def test_skipped_steps_are_counted(train):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.model.embed_tokens.weight.grad[0, 0] = torch.nan

    with pytest.warns(UserWarning, match="this step is skipped"):
        trainer, run = train(optim="pion", extra=[Poison()])
    assert run.series("skipped_steps")[1][:3] == [1, 1, 1]
    assert trainer.run_callback.summary["skipped_steps"] == 1


def test_clipped_steps_are_counted(train):
    """Of 14 matrices, in six steps logged by twos: at an absurd rate all of them, at a small one none."""
    trainer, run = train(optim="pion", learning_rate=100.0)
    assert run.series("clipped")[1] == [28, 28, 28]
    assert {of["clipped_steps"] for of in (run.record, run.logs[-1], trainer.run_callback.summary)} == {84}
    assert ("clipped steps of a matrix", "84") in overview(run)
    again, run = train(optim="pion", learning_rate=1e-4)
    assert run.series("clipped")[1] == [0, 0, 0]
    assert "clipped_steps" not in again.run_callback.summary | run.record


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_what_does_not_rotate_is_not_clipped(train, optim):
    _, run = train(optim=optim)
    assert not any("clipped" in entry for entry in run.logs)


def test_rank_deficient_matrices_are_named(make, monkeypatch):
    model = toy_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 3] = 0
    messages = []
    monkeypatch.setattr(callbacks.logger, "warning", messages.append)
    make(model, optim="pion").train()
    (said,) = messages
    assert said.startswith("1 of the 14 rotated matrices")
    assert said.endswith("model.layers.1.mlp.up_proj.weight")


# -- what it costs ----------------------------------------------------------------------------------


def test_without_time_only_the_first_and_the_last_snapshot_are_taken(make, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "FREE_SECONDS", 0.0)
    for share in ("STEPS_SHARE", "SPECTRA_SHARE", "SNAPSHOTS_SHARE"):
        monkeypatch.setattr(callbacks, share, 0.0)
    trainer = make(optim="pion")
    trainer.train()
    run = read_run(tmp_path / "run")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 6]
    assert len(run.spectra) == 1, "one at least"
    assert sum("update_rms/pion" in entry for entry in run.logs) == 1, "what a step costs is known after one"
    assert run.logs[-1]["measured_spectra"] == 1
    assert run.logs[-1]["rotated_matrices"] == 14


def test_long_runs_have_ten_snapshots_between(train):
    _, run = train(max_steps=33)
    assert [snapshot.step for snapshot in run.snapshots] == list(range(0, 34, 3))


def test_nothing_stays_in_the_optimizer(train):
    trainer, _ = train(optim="pion")
    assert trainer.optimizer.optimizer.observers == []


def matrix(name: str, role: str, layer: int, *, keeps: bool = True) -> HiddenMatrix:
    p = torch.nn.Parameter(torch.eye(3))
    return HiddenMatrix(name, p, Layout(), 0, role, layer, "pion", keeps)


def test_rotated_matrices_come_first():
    found = [matrix("grown", "a", 0, keeps=False), matrix("turned", "b", 0)]
    assert [m.name for m in spread(found)] == ["turned", "grown"]


def test_drift_is_of_rotated_matrices_where_there_are_any():
    grown, turned = matrix("grown", "a", 0, keeps=False), matrix("turned", "b", 0)
    spectra = Spectra([grown, turned])
    spectra.measure_before(60.0)
    with torch.no_grad():
        grown.parameter.mul_(2)
        turned.parameter.mul_(1.5)
    assert spectra.drift(spectra.known, keep=True) == pytest.approx(0.5)
    assert spectra.drift([grown]) == pytest.approx(1.0)
    assert spectra.after.keys() == {"grown", "turned"}


def test_norms_start_from_the_last_vectors(monkeypatch):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(60, 40))
    norms = Norms([HiddenMatrix("w", p, Layout(), 0, "a", 0, "pion", True)])
    exact = torch.linalg.svdvals(p.detach().double())[0].item()
    first = norms.measure()["spectral_norm"][0]
    for _ in range(4):
        last = norms.measure()["spectral_norm"][0]
    rounding = 1 + 1e-6
    assert first <= last * rounding
    assert last <= exact * rounding
    assert last == pytest.approx(exact, rel=1e-4)


def test_frozen_matrices_are_left_out():
    model = toy_llama()
    model.model.layers[0].requires_grad_(False)
    found = hidden_matrices(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), None)
    assert {m.layer for m in found} == {1}
