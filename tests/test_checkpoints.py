"""Checkpoints that somebody damaged, cut off or saved in part, and runs that go on with other arguments than before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pion_hf import PionTrainer
from pion_hf.integrations.callbacks import unwrap
from pion_hf.integrations.checkpoints import last_complete_checkpoint, resolve_resume
from pion_hf.integrations.manifest import MANIFEST, fault_of, read_manifest, write_manifest
from pion_hf.runs.folder import read_run
from tests.conftest import toy_llama
from tests.test_faults import FILES, everything, same_bits, trainer_of


def test_the_manifest_lists_all_files(run):
    checkpoint = run / "checkpoint-4"
    manifest = read_manifest(checkpoint)
    assert set(FILES) < manifest["files"].keys() == set(os.listdir(checkpoint)) - {MANIFEST}
    assert manifest["files"]["model.safetensors"][0] == (checkpoint / "model.safetensors").stat().st_size
    assert manifest["schedule"]["lr_scheduler_type"] == "pion_cosine"


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("name", FILES[:-1])
def test_damage_is_found_by_the_manifest(name, run, caplog, tried):
    for damage in (flip, cut, empty, Path.unlink):
        shutil.copytree(run / "checkpoint-4", run / "kept")
        damage(run / "checkpoint-4" / name)
        caplog.clear()
        assert resolve_resume(True, run) == str(run / "checkpoint-2")
        assert f"checkpoint-4 is damaged ({name} " in caplog.text
        assert "steps after 2 are taken again" in caplog.text
        with pytest.raises(ValueError, match=rf"it is damaged \({name} .*The last complete checkpoint .*-2'"):
            resolve_resume(str(run / "checkpoint-4"), run)
        shutil.rmtree(run / "checkpoint-4")
        (run / "kept").rename(run / "checkpoint-4")
    tried("a damaged file of a checkpoint: the one before goes on, with a line", 4, "files")


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["config.json", *FILES[1:-1]])
def test_damage_is_found_without_a_manifest(name, damage, run):
    """All but a flipped bit of what has no checksum."""
    checkpoint = run / "checkpoint-4"
    (checkpoint / MANIFEST).unlink()
    assert fault_of(checkpoint) is None
    if damage is flip:  # of what is loaded, not of what fills the archive up
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes().replace(b"_step_count", b"_step_counT"))
    damage(checkpoint / name)
    if (name, damage) not in [("model.safetensors", flip), ("config.json", flip), ("config.json", Path.unlink)]:
        assert fault_of(checkpoint).startswith("is damaged (")
        assert ("weights" if (name, damage) == ("model.safetensors", Path.unlink) else name) in fault_of(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "files": {"a": 1}}', "\0\1"])
def test_a_damaged_manifest_is_one_line(content, run):
    (run / "checkpoint-4" / MANIFEST).write_text(content)
    assert fault_of(run / "checkpoint-4").startswith("is damaged (manifest.json cannot be read")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"global_step": -4}', '{"global_step": "4"}', '{"a": 1}'])
def test_a_damaged_trainer_state_is_one_line(content, run):
    (run / "checkpoint-4" / "trainer_state.json").write_text(content)
    (run / "checkpoint-4" / MANIFEST).unlink()
    fault = fault_of(run / "checkpoint-4")
    if content != "{}":  # no steps, as TrainerState has it
        assert "trainer_state.json" in fault
        assert "\n" not in fault


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are of Unix")
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_pipe_is_not_waited_for(name, run):
    (run / "checkpoint-4" / name).unlink()
    os.mkfifo(run / "checkpoint-4" / name)
    assert fault_of(run / "checkpoint-4") == f"is damaged ({name} is no file)"


def change_state(key: str, value: float):
    def change(saved):
        entry = next(entry for entry in saved["state"].values() if key in entry)
        entry[key] = torch.full_like(torch.as_tensor(entry[key]), value)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_state("momentum", float("nan")), "momentum of parameter .* is not finite"),
        (change_state("exp_avg_sq", float("inf")), "exp_avg_sq of parameter .* is not finite"),
        (change_state("step", -1), "is at step -1"),
        (lambda saved: saved["state"].clear(), "is not of 4 steps"),
        (lambda saved: [entry.update(step=entry["step"] * 0 + 2) for entry in saved["state"].values()], "of 4 steps"),
        (lambda saved: saved.pop("state"), "is no state of an optimizer"),
    ],
)
def test_impossible_state_is_found_without_a_manifest(change, said, run):
    path = run / "checkpoint-4" / "optimizer.pt"
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)
    (run / "checkpoint-4" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=said):
        resolve_resume(str(run / "checkpoint-4"), run)


def test_impossible_schedules_and_weights_too(run):
    checkpoint = run / "checkpoint-4"
    (checkpoint / MANIFEST).unlink()
    torch.save(torch.load(checkpoint / "scheduler.pt") | {"last_epoch": -3}, checkpoint / "scheduler.pt")
    assert fault_of(checkpoint) == "is damaged (scheduler.pt counts -3 steps)"
    torch.save({}, checkpoint / "scheduler.pt")
    assert fault_of(checkpoint) == "is damaged (scheduler.pt counts None steps)"
    shutil.copy(run / "checkpoint-2" / "scheduler.pt", checkpoint)
    assert fault_of(checkpoint) == "is damaged (scheduler.pt counts 2 steps of 4)"
    weights = load_file(checkpoint / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, checkpoint / "model.safetensors")
    assert "holds NaN" in fault_of(checkpoint)


def test_steps_that_do_not_agree_are_found_without_a_manifest(run):
    checkpoint = run / "checkpoint-4"
    (checkpoint / MANIFEST).unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"global_step": 3}))
    assert fault_of(checkpoint) == "is damaged (trainer_state.json counts 3 steps)"
    checkpoint.rename(run / "kept")
    assert fault_of(run / "kept") == "is damaged (scheduler.pt counts 4 steps of 3)"


def test_weights_of_another_model_are_one_line(run):
    class Wider(PionTrainer):
        def __init__(self, *args, model, **kwargs):
            super().__init__(*args, model=toy_llama(intermediate_size=64), **kwargs)

    with pytest.raises(ValueError, match=r"checkpoint-4 holds the weights of another model: size mismatch") as raised:
        trainer_of(run, steps=6, trainer_class=Wider).train(resume_from_checkpoint=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("scheduler.pt", {"base_lrs": [1e-2]}),
        ("scheduler.pt", {"base_lrs": [float("nan")] * 2}),
        ("scheduler.pt", {"base_lrs": "x"}),
        ("rng_state.pth", {"cpu": "x"}),
        ("rng_state.pth", {"cpu": torch.zeros(100, dtype=torch.uint8)}),
        ("rng_state.pth", {"python": None}),
        ("trainer_state.json", {"log_history": "x"}),
        ("trainer_state.json", {"epoch": "x"}),
    ],
)
def test_impossible_values_are_found_without_a_manifest(name, changes, run):
    path = run / "checkpoint-4" / name
    (run / "checkpoint-4" / MANIFEST).unlink()
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    else:
        torch.save(torch.load(path, weights_only=False) | changes, path)
    assert name in fault_of(run / "checkpoint-4")


def test_groups_that_name_other_parameters_are_a_line(run):
    path = run / "checkpoint-2" / "optimizer.pt"
    saved = torch.load(path)
    saved["param_groups"][0]["params"] = [0]
    torch.save(saved, path)
    (run / "checkpoint-2" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="the saved optimizer state is damaged: a group has 1 parameters, "):
        trainer_of(run, steps=4).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_no_code_of_a_pickle_runs(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (run / "checkpoint-4" / MANIFEST).unlink()
    for name in ("rng_state.pth", "scheduler.pt", "optimizer.pt"):
        torch.save({"state": Evil()}, run / "checkpoint-4" / name)
        assert f"({name} cannot be read" in fault_of(run / "checkpoint-4")
    assert not (tmp_path / "ran").exists()


def test_state_of_too_few_parameters_is_said(run):
    checkpoint = run / "checkpoint-4"
    saved = torch.load(checkpoint / "optimizer.pt")
    for index in list(saved["state"])[:2]:
        del saved["state"][index]
    torch.save(saved, checkpoint / "optimizer.pt")
    (checkpoint / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"The saved optimizer state has none of model\.\S+, model\.\S+: it begins"):
        trainer_of(run, steps=6).train(resume_from_checkpoint=True)


def test_weights_alone_are_no_run_to_go_on_with(tmp_path, caplog):
    trainer_of(tmp_path, steps=4, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"-4 holds weights only .*-2 holds weights only") as raised:
        trainer_of(tmp_path, steps=6).train(resume_from_checkpoint=True)
    assert "\n" not in str(raised.value)
    for name in ("optimizer.pt", "scheduler.pt"):
        shutil.rmtree(tmp_path)
        trainer_of(tmp_path, steps=2).train()
        (tmp_path / "checkpoint-2" / MANIFEST).unlink()
        (tmp_path / "checkpoint-2" / name).unlink()
        assert fault_of(tmp_path / "checkpoint-2") == f"is damaged (there is no {name})"


def test_weights_that_are_missing_are_none_to_go_on_with(run, monkeypatch):
    checkpoint, said = run / "checkpoint-4", []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda line, *args: said.append(line))
    trainer_of(run, steps=4).train(resume_from_checkpoint=str(checkpoint))
    assert not any("missing keys" in line for line in said), "a tied weight is saved once"
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged \(it holds no model\.norm\.weight\)"):
        trainer_of(run, steps=6).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["trainer_state.json", MANIFEST])
def test_a_folder_in_the_place_of_a_file_stops_one_save(name, run):
    (run / "checkpoint-4" / name).unlink()
    (run / "checkpoint-4" / name).mkdir()
    with pytest.raises(OSError, match=r"checkpoint-4 could not be saved.* can be resumed from .*checkpoint-2"):
        trainer_of(run, steps=4).train(resume_from_checkpoint=True)
    assert trainer_of(run, steps=4).train(resume_from_checkpoint=True).global_step == 4
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


def test_weights_alone_leave_nothing_of_an_earlier_run(run):
    trainer_of(run, steps=4, save_only_model=True).train()
    assert not (run / "checkpoint-4" / "optimizer.pt").exists()


# -- a run that is over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [{"steps": 4}, {"steps": 3}, {"steps": -1, "num_train_epochs": 4 / 9}])
def test_a_finished_run_trains_none_and_evaluates(length, run, caplog):
    ids = torch.randint(5, 105, (2, 12)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for _ in range(2):
        caplog.clear()
        resumed = trainer_of(run, eval_strategy="steps", eval_dataset=rows, **length)
        metrics = resumed.train(resume_from_checkpoint=str(run / "checkpoint-4")).metrics
        assert resumed.state.global_step == 4
        assert metrics["eval_loss"] > 0
        assert same_bits(everything(resumed), torch.load(run / "end.pt"))
        assert "has taken all 4 steps: none was left to train" in caplog.text
        assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    resumed.save_model()
    assert same_bits(
        [load_file(run / "model.safetensors")["model.norm.weight"]], [resumed.model.model.norm.weight.detach()]
    )


# -- other arguments than before --------------------------------------------------------------------------------------


def test_the_checkpoints_learning_rates_go_on(run, caplog):
    straight = trainer_of(run / "straight", steps=4)
    straight.train()
    resumed = trainer_of(run, steps=4, learning_rate=3e-2, optim_adamw_lr=5e-3)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    said = [line for line in caplog.messages if "learning rates" in line]
    assert said == [
        "The checkpoint's learning rates go on, and not those given: pion 0.01, not 0.03, adamw 0.01, not 0.005."
    ]
    assert same_bits(everything(resumed), everything(straight))
    assert {row["rule"]: row["lr"] for row in json.loads((run / "routing.json").read_text())["summary"]} == {
        "pion": 1e-2,
        "adamw": 1e-2,
    }
    record = read_run(run).record
    assert record["optimizer"]["learning_rate"] == record["arguments"]["learning_rate"] == 1e-2
    assert record["arguments"]["optim_adamw_lr"] == 1e-2


def test_the_checkpoints_schedule_goes_on(run, caplog):
    options = {"lr_scheduler_type": "linear", "warmup_steps": 1}
    resumed = trainer_of(run, steps=4, **options)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    said = [line for line in caplog.messages if "schedule" in line]
    assert len(said) == 1
    assert "lr_scheduler_type 'pion_cosine', not 'linear', warmup_steps" in said[0]
    assert same_bits(everything(resumed), torch.load(run / "end.pt"))
    assert read_run(run).record["optimizer"]["schedule"] == "pion_cosine"
    (run / "checkpoint-2" / MANIFEST).unlink()
    trainer_of(run, steps=4, **options).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert "Another schedule, or length of training, than the checkpoint's: after 2 steps" in caplog.text


def test_the_same_arguments_are_no_matter(run, caplog):
    trainer_of(run, steps=4).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert not [line for line in caplog.messages if "checkpoint's" in line]


def test_skipped_steps_go_on(tmp_path):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.model.norm.weight.grad[0] = float("nan")

    trainer_of(tmp_path, steps=2, callbacks=(Poison(),)).train()
    resumed = trainer_of(tmp_path, steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert unwrap(resumed.optimizer).skipped_steps == 1
    again = trainer_of(tmp_path, steps=4)
    again.create_optimizer()
    again.optimizer.load_state_dict(resumed.optimizer.state_dict())
    assert unwrap(again.optimizer).skipped_steps == 1


def test_a_sharded_checkpoint_has_other_files(run):
    """As FSDP2 leaves it: a folder of model and one of optimizer, each of which ends with its metadata."""
    checkpoint = run / "checkpoint-4"
    dcp.save({"w": torch.ones(4)}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"w": torch.ones(4)}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    for name in ("model.safetensors", "optimizer.pt", MANIFEST):
        (checkpoint / name).unlink()
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert fault_of(checkpoint) is None
    write_manifest(checkpoint)
    assert fault_of(checkpoint) is None
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        flip(checkpoint / name / "__0_0.distcp")
        assert fault_of(checkpoint).startswith(f"is damaged ({name}/__0_0.distcp is not what was saved")
        flip(checkpoint / name / "__0_0.distcp")
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "optimizer_0" / ".metadata").unlink()
    assert fault_of(checkpoint) == "was not saved to its end (optimizer_0/.metadata is missing)"


# -- compiled models --------------------------------------------------------------------------------------------------


class Compiled(PionTrainer):
    """Of a model that its owner compiled."""

    def __init__(self, *args, model, **kwargs):
        super().__init__(*args, model=torch.compile(model, backend="eager"), **kwargs)


class Regional(PionTrainer):
    """Of a model whose layers were compiled."""

    def __init__(self, *args, model, **kwargs):
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = torch.compile(layer, backend="eager")
        super().__init__(*args, model=model, **kwargs)


def unwraps_layers() -> bool:
    """Whether accelerate trains a model whose layers were compiled."""
    try:
        extract_model_from_parallel(torch.nn.Sequential(torch.compile(torch.nn.Linear(1, 1), backend="eager")))
    except KeyError:
        return False
    return True


@pytest.mark.parametrize(("first", "then"), [(PionTrainer, Compiled), (Compiled, PionTrainer), (Regional, Compiled)])
def test_compiled_models_and_others_go_on_with_each_other(first, then, tmp_path, caplog):
    """Stacks have names as well."""
    if first is Regional and not unwraps_layers():
        pytest.skip(f"accelerate {accelerate.__version__} does not train models with compiled layers")
    trainer = trainer_of(tmp_path, steps=2, trainer_class=first, optim="teon", remove_unused_columns=False)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == toy_llama().state_dict().keys() - {"lm_head.weight"}
    resumed = trainer_of(tmp_path, steps=2, trainer_class=then, optim="teon")
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(everything(resumed), everything(trainer))
    assert not [line for line in caplog.messages if "keys" in line and "lm_head.weight']" not in line]  # which is tied
    names = {name for group in unwrap(resumed.optimizer).param_groups for name in group["param_names"]}
    assert names <= {name for name, _ in resumed.model.named_parameters()}


def test_compiled_adapters(tmp_path, caplog):
    class Adapters(PionTrainer):
        def __init__(self, *args, model, **kwargs):
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
            super().__init__(*args, model=torch.compile(model, backend="eager"), **kwargs)

    trainer = trainer_of(tmp_path, steps=2, trainer_class=Adapters, remove_unused_columns=False)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert not any("_orig_mod" in name for name in saved)
    resumed = trainer_of(tmp_path, steps=2, trainer_class=Adapters, remove_unused_columns=False)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(everything(resumed), everything(trainer))


@pytest.mark.timeout(30)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_a_pipe_in_the_place_of_a_file_is_not_written_to(tmp_path):
    trainer = trainer_of(tmp_path, steps=2)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "training_args.bin", "scheduler.pt"):
            os.mkfifo(folder / name)
    trainer.train()
    trainer.save_model()
    assert fault_of(tmp_path / "checkpoint-2") is None
    assert (tmp_path / "config.json").is_file()
