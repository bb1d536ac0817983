"""Schedules: their values at every step, their place in transformers, what is logged and what `plan --plot` draws."""

from __future__ import annotations

import json
import math
import re
import struct
from fractions import Fraction

import pytest
import torch
import transformers
import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from pion_hf import Pion, PionTrainer, PionTrainingArguments, register
from pion_hf.cli import curves, main
from pion_hf.cli.recipe import RecipeParser
from pion_hf.integrations.callbacks import RunCallback
from pion_hf.integrations.handler import groups_from
from pion_hf.integrations.optimizers import learning_rates
from pion_hf.integrations.schedules import SCHEDULES, check_options
from pion_hf.integrations.trl import PionSFTConfig
from tests.conftest import toy_llama
from tests.test_cli import fails
from tests.test_trainer import QUIET, StopAfter

LENGTHS = [(1, 0), (1, 1), (2, 1), (7, 0), (10, 3), (25, 25), (40, 7), (101, 10)]


def stand_in(*rules: str | None) -> torch.optim.Optimizer:
    """One group for each rule, with learning rate 1; None is a group without a rule."""
    groups = [{"params": [torch.zeros(1)], **({} if rule is None else {"rule": rule})} for rule in rules]
    return torch.optim.SGD(groups, lr=1.0)


def scheduled(name: str, steps: int, warmup: int, *rules: str | None, **options) -> list[list[float]]:
    """The rates at every step and at the one after the last, for each rule's group, through transformers."""
    optimizer = stand_in(*rules)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=options
    )
    found = []
    for _ in range(steps + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [list(rates) for rates in zip(*found, strict=True)]


def literal_cosine(steps: int, warmup: int, low: float) -> list[float]:
    found = []
    for step in range(steps + 1):
        if step < warmup:
            found.append((step + 1) / warmup)
        elif step == warmup:
            found.append(1.0)
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            found.append(low + (1 - low) * 0.5 * (1 + math.cos(angle)))
    return found


def literal_wsd(steps: int, warmup: int, low: str, fraction: str) -> list[float]:
    """In exact fractions."""
    start = steps * (1 - Fraction(fraction))
    found = []
    for step in range(steps + 1):
        rate = Fraction(1)
        if step > start:
            rate = 1 - (1 - Fraction(low)) * (step - start) / (steps - start)
        if step < warmup and Fraction(step + 1, warmup) < rate:
            rate = Fraction(step + 1, warmup)
        found.append(float(rate))
    return found


def close(found: list[float], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-15)


# -- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), LENGTHS)
def test_cosine_warms_up_the_adamw_groups_only(steps, warmup):
    matrices, adamw, unruled = scheduled("pion_cosine", steps, warmup, "pion", "adamw", None)
    close(matrices, literal_cosine(steps, 0, 0.01))
    close(adamw, literal_cosine(steps, warmup, 0.01))
    assert unruled == adamw


@pytest.mark.parametrize(("steps", "warmup"), LENGTHS)
def test_wsd_treats_all_groups_alike(steps, warmup):
    matrices, adamw, unruled = scheduled("teon_wsd", steps, warmup, "teon", "adamw", None)
    close(matrices, literal_wsd(steps, warmup, "0", "0.4"))
    assert adamw == unruled == matrices


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (40, 7)])
def test_options_reach_each_kind_of_group(steps, warmup):
    own = {"matrix_warmup_steps": 2, "adamw_warmup_steps": 5.0, "min_lr_ratio": 0.2, "adamw_min_lr_ratio": 0.05}
    matrices, adamw = scheduled("pion_cosine", steps, warmup, "pion", "adamw", **own)
    close(matrices, literal_cosine(steps, 2, 0.2))
    close(adamw, literal_cosine(steps, 5, 0.05))
    matrices, adamw = scheduled("teon_wsd", steps, warmup, "muon", "adamw", decay_fraction=0.75, **own)
    close(matrices, literal_wsd(steps, 2, "0.2", "0.75"))
    close(adamw, literal_wsd(steps, 5, "0.05", "0.75"))


def test_none_means_the_warmup_of_the_arguments():
    (matrices,) = scheduled("pion_cosine", 10, 3, "pion", matrix_warmup_steps=None, min_lr_ratio=0)
    close(matrices, literal_cosine(10, 3, 0))


def test_where_warmup_and_decay_overlap_the_smaller_applies():
    (rates,) = scheduled("teon_wsd", 10, 8, "teon", decay_fraction=1)
    close(rates, [min((t + 1) / 8, (10 - t) / 10) for t in range(11)])


def test_rates_stay_at_their_last_after_the_training():
    for name, low in (("pion_cosine", 0.01), ("teon_wsd", 0.0)):
        optimizer = stand_in("pion", "adamw")
        scheduler = SCHEDULES[name](optimizer, 2, 5)
        optimizer.step()
        for _ in range(9):
            scheduler.step()
        close(scheduler.get_last_lr(), [low, low])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_restored_schedule_goes_on_where_it_was(name):
    def begin(steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, list]:
        optimizer = stand_in("pion", "adamw", None)
        scheduler = SCHEDULES[name](optimizer, 3, 20, min_lr_ratio=0.1)
        return optimizer, scheduler, advance(optimizer, scheduler, steps)

    def advance(optimizer, scheduler, steps: int) -> list[list[float]]:
        found = []
        for _ in range(steps):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return found

    *_, straight = begin(20)
    optimizer, scheduler, first = begin(8)
    saved, weights = scheduler.state_dict(), optimizer.state_dict()
    assert json.loads(json.dumps(saved))["last_epoch"] == 8, "the state is plain data"
    optimizer, scheduler, _ = begin(0)
    optimizer.load_state_dict(weights)
    scheduler.load_state_dict(saved)
    assert first + advance(optimizer, scheduler, 12) == straight


# -- in transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_a_full_member(name):
    member = SchedulerType(name)
    assert member is getattr(SchedulerType, name.upper())
    assert list(SchedulerType).count(member) == 1
    assert TYPE_TO_SCHEDULER_FUNCTION[member] is SCHEDULES[name]


def test_registering_again_adds_no_schedule():
    members, functions = list(SchedulerType), dict(TYPE_TO_SCHEDULER_FUNCTION)
    register()
    assert list(SchedulerType) == members
    assert functions == TYPE_TO_SCHEDULER_FUNCTION


@pytest.mark.parametrize("arguments", [TrainingArguments, PionTrainingArguments])
@pytest.mark.parametrize("options", [{"decay_fraction": 0.2}, '{"decay_fraction": 0.2}'], ids=["dict", "json"])
def test_arguments_take_name_and_options(arguments, options, tmp_path):
    args = arguments(
        output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type="teon_wsd", lr_scheduler_kwargs=options, max_steps=9
    )
    assert args.lr_scheduler_type is SchedulerType("teon_wsd")
    assert args.lr_scheduler_kwargs == {"decay_fraction": 0.2}
    assert json.loads(args.to_json_string())["lr_scheduler_type"] == "teon_wsd"


def test_command_lines_take_name_and_options(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--lr_scheduler_type", "pion_cosine"]
    flags += ["--lr_scheduler_kwargs", '{"min_lr_ratio": 0.1}']
    for parser in (HfArgumentParser(TrainingArguments), RecipeParser((PionSFTConfig,))):
        (args,) = parser.parse_args_into_dataclasses(flags)
        assert args.lr_scheduler_type is SchedulerType("pion_cosine")
        assert args.lr_scheduler_kwargs == {"min_lr_ratio": 0.1}


def test_recipes_take_name_and_options(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    keys = {"lr_scheduler_type": "teon_wsd", "lr_scheduler_kwargs": {"decay_fraction": 0.3}, "use_cpu": True}
    recipe.write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path)}), encoding="utf-8")
    (args,) = RecipeParser((PionSFTConfig,)).parse_recipe(["--config", str(recipe)])
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("teon_wsd", {"decay_fraction": 0.3})
    with pytest.raises(ValueError, match="Did you mean 'teon_wsd'"):
        RecipeParser((PionSFTConfig,)).parse_recipe(["--config", str(recipe), "--lr_scheduler_type", "teon_wds"])


# -- what is refused --------------------------------------------------------------------------------

WRONG_OPTIONS = [
    ({"min_lr": 0.1}, "'min_lr' is not a known option of teon_wsd in lr_scheduler_kwargs. Did you mean 'min_lr_ratio'"),
    ({"decay_fraction": 0}, "lr_scheduler_kwargs: decay_fraction must be in (0, 1]"),
    ({"decay_fraction": 1.5}, "got 1.5; for no decay set lr_scheduler_type to constant_with_warmup"),
    ({"decay_fraction": "0.4x"}, "lr_scheduler_kwargs: decay_fraction must be a number, got '0.4x'"),
    ({"decay_fraction": True}, "decay_fraction must be a number, got True"),
    ({"decay_fraction": None}, "decay_fraction must be a number, got None"),
    ({"decay_fraction": float("nan")}, "decay_fraction must be a number, got nan"),
    ({"min_lr_ratio": "0.01x"}, "min_lr_ratio must be a number, got '0.01x'"),
    ({"min_lr_ratio": None}, "min_lr_ratio must be a number, got None"),
    ({"min_lr_ratio": -0.1}, "lr_scheduler_kwargs: min_lr_ratio must be in [0, 1]"),
    ({"adamw_min_lr_ratio": 2}, "adamw_min_lr_ratio must be in [0, 1]"),
    ({"matrix_warmup_steps": -1}, "lr_scheduler_kwargs: matrix_warmup_steps must be a whole number"),
    ({"adamw_warmup_steps": 2.5}, "adamw_warmup_steps must be a whole number of optimizer steps"),
    ({"adamw_warmup_steps": "2"}, "adamw_warmup_steps must be a whole number of optimizer steps"),
    ({"matrix_warmup_steps": float("inf")}, "matrix_warmup_steps must be a whole number"),
    ({"matrix_warmup_steps": 11}, "matrix_warmup_steps is 11, but the training has only 10 steps: shorten"),
]


def test_text_for_a_number_says_how_to_write_it_where_nobody_converts_it():
    with pytest.raises(ValueError, match=r"YAML reads 1e-2 as text: write 0\.01"):
        scheduled("teon_wsd", 10, 2, "teon", "adamw", min_lr_ratio="1e-2")


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_options_name_the_field_the_value_and_the_way_out(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        scheduled("teon_wsd", 10, 2, "teon", "adamw", **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        PionTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=10,
            lr_scheduler_type="teon_wsd",
            lr_scheduler_kwargs=options,
        )


def test_a_schedule_has_its_own_options_only():
    with pytest.raises(ValueError, match="'decay_fraction' is not a known option of pion_cosine"):
        check_options("pion_cosine", {"decay_fraction": 0.4})
    with pytest.raises(ValueError, match="Did you mean 'pion_cosine'"):
        check_options("pion_cosin", {})


def test_options_that_are_no_mapping(tmp_path):
    fixed = {"output_dir": str(tmp_path), "use_cpu": True, "lr_scheduler_type": "pion_cosine"}
    with pytest.raises(ValueError, match=r"must be a dict or a JSON object.*got 'min_lr_ratio=0\.1'"):
        PionTrainingArguments(lr_scheduler_kwargs="min_lr_ratio=0.1", **fixed)
    with pytest.raises(ValueError, match=re.escape("'{min_lr_ratio: 0.1}' is not JSON")):
        PionTrainingArguments(lr_scheduler_kwargs="{min_lr_ratio: 0.1}", **fixed)


def test_a_warmup_of_the_arguments_beyond_the_training_is_all_of_it():
    """As with the schedules of transformers: a recipe is tried with one step first."""
    longer, whole = (scheduled("pion_cosine", 10, warmup, "pion", "adamw") for warmup in (11, 10))
    assert longer == whole
    assert whole[1][:10] == pytest.approx([0.1 * (step + 1) * whole[1][9] for step in range(10)])


def test_options_for_groups_that_there_are_not_are_pointed_out():
    with pytest.warns(UserWarning, match="the optimizer has no group for matrix_warmup_steps"):
        scheduled("teon_wsd", 10, 0, None, matrix_warmup_steps=2)


# -- training ---------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, token_rows):
    """Trains the toy model for 6 steps and returns the trainer; the learning rate is 1e-2, AdamW's 1e-3."""

    def run(trainer_class=PionTrainer, *callbacks, resume: str | None = None, **options) -> Trainer:
        arguments = PionTrainingArguments if trainer_class is PionTrainer else TrainingArguments
        fixed = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 2}
        args = arguments(**{"output_dir": str(tmp_path), **QUIET, **fixed, **options})
        trainer = trainer_class(model=toy_llama(), args=args, train_dataset=token_rows, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "learning_rate" in entry]


PION = {"optim": "pion", "optim_args": "adamw_lr=1e-3", "lr_scheduler_type": "pion_cosine", "warmup_steps": 3}


class Tracker(transformers.TrainerCallback):
    """What a tracker of experiments would be sent."""

    def __init__(self) -> None:
        self.sent: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append(dict(logs))


def test_our_trainer_logs_the_rates_of_both_kinds_of_groups(train):
    tracker = Tracker()
    trainer = train(PionTrainer, tracker, **PION)
    matrices = [1e-2 * m for m in literal_cosine(6, 0, 0.01)[:6]]
    adamw = [1e-3 * m for m in literal_cosine(6, 3, 0.01)[:6]]
    close(logged(trainer, "learning_rate"), matrices)
    assert logged(trainer, "learning_rate/pion") == logged(trainer, "learning_rate")
    close(logged(trainer, "learning_rate/adamw"), adamw)
    sent = [entry for entry in tracker.sent if "learning_rate" in entry]
    assert [entry["learning_rate/adamw"] for entry in sent] == logged(trainer, "learning_rate/adamw")


def test_the_callback_logs_them_in_a_plain_trainer(train):
    trainer = train(Trainer, RunCallback(), **PION)
    assert logged(trainer, "learning_rate/pion") == logged(trainer, "learning_rate")
    close(logged(trainer, "learning_rate/adamw"), [1e-3 * m for m in literal_cosine(6, 3, 0.01)[:6]])
    assert not any("learning_rate/pion" in e for e in trainer.state.log_history if "learning_rate" not in e)


def test_other_optimizers_follow_the_schedule_as_adamw_groups(train):
    trainer = train(PionTrainer, optim="adamw_torch", lr_scheduler_type="teon_wsd", warmup_steps=2)
    close(logged(trainer, "learning_rate"), [1e-2 * m for m in literal_wsd(6, 2, "0", "0.4")[:6]])
    assert not any(key.startswith("learning_rate/") for entry in trainer.state.log_history for key in entry)


def test_options_reach_a_real_run(train):
    trainer = train(**{**PION, "lr_scheduler_kwargs": '{"matrix_warmup_steps": 2, "min_lr_ratio": 0.5}'})
    close(logged(trainer, "learning_rate/pion"), [1e-2 * m for m in literal_cosine(6, 2, 0.5)[:6]])


def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(train, tmp_path):
    saving = {**PION, "save_strategy": "steps", "save_steps": 3}
    straight = train(output_dir=str(tmp_path / "straight"), **PION)
    train(PionTrainer, StopAfter(3), **saving)
    resumed = train(resume=str(tmp_path / "checkpoint-3"), **saving)
    for key in ("learning_rate", "learning_rate/pion", "learning_rate/adamw"):
        assert len(logged(resumed, key)) == 6
        assert logged(resumed, key) == logged(straight, key)


def test_groups_of_one_rule_that_differ_are_logged_one_by_one():
    weights = [torch.nn.Parameter(torch.eye(3)) for _ in range(3)]
    rules = [{"rule": "pion"}, {"rule": "adamw", "lr": 1e-3}, {"rule": "adamw", "lr": 2e-3}]
    optimizer = Pion([{"params": [w], **rule} for w, rule in zip(weights, rules, strict=True)], lr=1e-2)
    rates = {"learning_rate/pion": 1e-2, "learning_rate/adamw/1": 1e-3, "learning_rate/adamw/2": 2e-3}
    assert learning_rates(optimizer) == rates
    # Under the same names where a schedule begins at 0 for all.
    get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=4)
    assert learning_rates(optimizer) == dict.fromkeys(rates, 0.0)


def test_groups_of_other_optimizers_are_logged_where_they_differ():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 2e-3}]
    assert learning_rates(torch.optim.AdamW(weights, lr=1e-3)) == {}
    assert learning_rates(torch.optim.AdamW(groups, lr=1e-3)) == {"learning_rate/0": 1e-3, "learning_rate/1": 2e-3}
    assert learning_rates(None) == {}


# -- plan --plot ------------------------------------------------------------------------------------


def planned(tmp_path, **options) -> tuple[PionTrainingArguments, list[curves.Curve]]:
    fixed = {"max_steps": 12, "learning_rate": 1e-2, "warmup_steps": 0.25, "use_cpu": True}
    args = PionTrainingArguments(output_dir=str(tmp_path), report_to="none", **{**fixed, **options})
    routing, groups = groups_from(args, toy_llama(), "pion", {"adamw_lr": 1e-3})
    return args, curves.learning_rate_curves(args, Pion(groups, lr=args.learning_rate), routing)


def test_curves_of_our_schedules(tmp_path):
    _, (matrices, adamw) = planned(tmp_path, lr_scheduler_type="pion_cosine", lr_scheduler_kwargs={"min_lr_ratio": 0})
    assert matrices.label == "pion: matrix"
    assert adamw.label == "adamw: embedding, norm"
    close(list(matrices.rates), [1e-2 * m for m in literal_cosine(12, 0, 0.0)[:12]])
    close(list(adamw.rates), [1e-3 * m for m in literal_cosine(12, 3, 0.0)[:12]])


def test_curves_of_transformers_schedules(tmp_path):
    _, (matrices, adamw) = planned(tmp_path, lr_scheduler_type="linear")
    linear = [t / 3 if t < 3 else (12 - t) / 9 for t in range(12)]
    close(list(matrices.rates), [1e-2 * m for m in linear])
    close(list(adamw.rates), [1e-3 * m for m in linear])
    with pytest.raises(ValueError, match="unexpected keyword argument 'min_lr'"):
        planned(tmp_path, lr_scheduler_type="linear", lr_scheduler_kwargs={"min_lr": 0.1})


def test_groups_with_equal_rates_share_a_curve(tmp_path):
    args, (curve,) = planned(tmp_path, lr_scheduler_type="constant", optim_adamw_lr=None, learning_rate=1e-3)
    assert curve == ("pion: matrix; adamw: embedding, norm", (1e-3,) * args.max_steps)


def test_the_picture_says_what_it_shows(tmp_path):
    args, found = planned(tmp_path, lr_scheduler_type="teon_wsd")
    (axes,) = curves.picture(args, found).axes
    assert axes.get_title() == "pion, teon_wsd, 12 steps"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "learning rate")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [curve.label for curve in found]
    lines = axes.get_lines()
    assert len({line.get_color() for line in lines}) == len({line.get_linestyle() for line in lines}) == 2
    for line, curve in zip(lines, found, strict=True):
        assert list(line.get_xdata()) == list(range(1, 13))
        assert tuple(line.get_ydata()) == curve.rates


PLAN = ["plan", "--optim", "pion", "--optim_adamw_lr", "1e-3", "--learning_rate", "1e-2"]


@pytest.mark.parametrize("schedule", [*SCHEDULES, "linear"])
def test_plan_writes_a_picture(schedule, checkpoint, tmp_path):
    path = tmp_path / "new" / "folder" / "rates.png"
    flags = ["--lr_scheduler_type", schedule, "--max_steps", "20", "--plot", str(path)]
    main([*PLAN, "--model_name_or_path", str(checkpoint), *flags])
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1050, 600)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--plot: the length of the run is unknown without the data: add --max_steps N"),
        (["--max_steps", "9", "--plot", "rates.pgn"], "'.pgn' is not a known kind of picture (--plot rates.pgn). Did"),
        (["--max_steps", "9", "--plot", "rates"], "'' is not a known kind of picture (--plot rates). Known: .eps"),
        (
            ["--max_steps", "9", "--eval_strategy", "epoch", "--lr_scheduler_type", "reduce_lr_on_plateau"],
            "--plot: lr_scheduler_type='reduce_lr_on_plateau' follows the evaluation loss",
        ),
        (
            ["--max_steps", "9", "--lr_scheduler_type", "pion_cosine", "--lr_scheduler_kwargs", '{"min_lr": 0.1}'],
            "Did you mean 'min_lr_ratio'",
        ),
    ],
)
def test_pictures_that_cannot_be_made_are_refused_before_anything_is_loaded(flags, message):
    assert message in fails(*PLAN, "--model_name_or_path", "no/such-model", "--plot", "rates.png", *flags)


def test_a_picture_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file" / "rates.png", tmp_path / "file" / "deeper" / "rates.png"):
        said = fails(*PLAN, "--model_name_or_path", str(checkpoint), "--max_steps", "9", "--plot", str(path))
        assert f"--plot: cannot write '{path}': " in said
