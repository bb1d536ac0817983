"""`lm_eval_tasks`: benchmarks of lm-evaluation-harness before and after training, on task files of our own."""

from __future__ import annotations

import copy
import json
import random
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pion_hf.cli import main
from pion_hf.cli.benchmarks import Benchmarks
from pion_hf.cli.flags import ReportArguments
from pion_hf.cli.training import ReportingSFTTrainer
from pion_hf.report import summary
from pion_hf.runs.folder import read_run
from tests.test_cli import fails
from tests.test_distributed import launch_by_accelerate
from tests.test_model_card import rows_of

if find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: make test-eval", allow_module_level=True)

ROOT = Path(__file__).parents[1]
TASKS = "tests/data/lm_eval"  # as the task files name their data, from the folder of the project
CHOICE, ANSWER = "lm_eval/sums_choice", "lm_eval/sums_answer"
EXACT = "exact_match,first-number"


@pytest.fixture(autouse=True)
def of_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def ours_alone(monkeypatch):
    """lm_eval without tasks of its own, which take it long to list."""
    from lm_eval import tasks

    manager = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda *, include_path, **_: manager(include_path=include_path, include_defaults=False)
    )


def with_tasks(*names: str, **options) -> dict:
    """Keys of a recipe."""
    return {"lm_eval_tasks": list(names) or ["sums_choice,sums_answer"], "lm_eval_include_path": TASKS, **options}


def benchmarks(*names: str, **options) -> Benchmarks:
    return Benchmarks(ReportArguments(**with_tasks(*names, **options)), seed=0)


@torch.no_grad()
def directly(model, tokenizer, opening: str = "", end: str = "", limit: int | None = None) -> dict[str, dict]:
    """What lm_eval should find, question by question, without batches or padding."""

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [json.loads(line) for line in Path(TASKS, "sums.jsonl").read_text().splitlines()][:limit]
    model, right = model.eval(), {"acc": [], "acc_norm": [], EXACT: []}
    for row in rows:
        question = ids(f"{opening}{row['question']}{end}")
        scores = []
        for choice in map(ids, row["choices"]):
            logits = model(torch.cat([question, choice])[None]).logits[0, len(question) - 1 : -1]
            scores.append(logits.log_softmax(-1).gather(1, choice[:, None]).sum().item())
        best = max(range(4), key=lambda i: scores[i])
        fairest = max(range(4), key=lambda i: scores[i] / len(row["choices"][i]))
        right["acc"].append(best == row["label"])
        right["acc_norm"].append(fairest == row["label"])
        written = model.generate(question[None], max_new_tokens=4, do_sample=False)[0, len(question) :]
        found = re.search(r"\d+", tokenizer.decode(written, skip_special_tokens=True).split("\n")[0])
        right[EXACT].append(bool(found) and found.group() == row["answer"])
    means = {name: np.mean(values) for name, values in right.items()}
    return {CHOICE: {name: means[name] for name in ("acc", "acc_norm")}, ANSWER: {EXACT: means[EXACT]}}


def figures(measures: dict[str, dict]) -> dict[str, dict]:
    """Without standard errors."""
    return {d: {m: v for m, v in of.items() if "_stderr" not in m} for d, of in measures.items() if "lm_eval/" in d}


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_tasks_are_measured_before_and_after(bf16, recipe, tmp_path, checkpoint, tokenizer, capsys):
    learning = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 60, "per_device_train_batch_size": 16}
    asked = with_tasks(lm_eval_apply_chat_template=True, lm_eval_limit=8)
    main(["sft", "--config", recipe(**learning, **asked, optim_adamw_lr=None, bf16=bf16, eval_strategy="no")])
    run = tmp_path / "run"
    record = json.loads((run / "eval.json").read_text())
    prompt = {"opening": "<user>", "end": "<end><assistant>", "limit": 8}
    if not bf16:
        for moment, folder in (("before", checkpoint), ("after", run)):
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert figures(record[moment]) == directly(model, tokenizer, **prompt)
    before, after = record["before"], record["after"]
    assert after[ANSWER][EXACT] >= 0.5 > before[ANSWER][EXACT]
    assert after[CHOICE]["acc"] > before[CHOICE]["acc"]
    # The standard error of a share of so many.
    share = after[CHOICE]["acc"]
    assert after[CHOICE]["acc_stderr"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    assert {"learnt", "forgotten"}.isdisjoint(record)
    assert record["lm_eval"]["tasks"]["sums_answer"] == {"version": 1.0, "num_fewshot": 0, "questions": 8}
    # The table, the card, and the page's.
    said = f"{before[ANSWER][EXACT]:.1%} ± {before[ANSWER]['exact_match_stderr,first-number']:.1%}"
    printed = capsys.readouterr().out
    assert "lm_eval/sums_choice: acc" in printed
    assert said in printed
    text = (run / "README.md").read_text()
    row = next(r for r in rows_of(text, "domain") if r["domain"] == ANSWER)
    assert (row["measure"], row["before"]) == ("exact match, first-number", said)
    assert "± one standard error, the first 8 questions of each task, in the chat template" in text
    rows = {(r[0], r[1]): r[2:] for r in summary.results_table([read_run(run)]).rows}
    change = f"{after[ANSWER][EXACT] - before[ANSWER][EXACT]:+.1%}"
    assert rows[ANSWER, "exact match, first-number"] == [row["before"], row["after"], change]
    assert len(rows) == 3


def test_cpt_asks_in_plain_text(recipe, tmp_path, checkpoint, tokenizer):
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("7+2=9\n" * 200, encoding="utf-8")
    flags = ["--lm_eval_tasks", "sums_choice", "sums_answer", f"--lm_eval_include_path={TASKS}"]
    main(["cpt", "--config", recipe(dataset_name=str(tmp_path / "text"), max_length=32), *flags])
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    for moment, folder in (("before", checkpoint), ("after", tmp_path / "run")):
        assert figures(record[moment]) == directly(AutoModelForCausalLM.from_pretrained(folder), tokenizer)


def test_grpo_measures_beside_the_reward(recipe, tmp_path):
    keys = {"reward_funcs": "think_format_reward", "num_generations": 4, "max_completion_length": 8}
    main(["grpo", "--config", recipe(**keys, **with_tasks("sums_choice"))])
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(record["before"]) == set(record["after"]) == {"task", CHOICE}
    assert record["learnt"] == record["after"]["task"]["reward"] - record["before"]["task"]["reward"]


def test_several_runs_side_by_side_and_their_best(recipe, tmp_path):
    asked, names = with_tasks("sums_choice"), ("first", "second")
    for name in names:
        main(["sft", "--config", recipe(**asked, output_dir=str(tmp_path / name), optim="muon", max_steps=1)])
    table = summary.results_table([read_run(tmp_path / name) for name in names])
    assert [c for c in table.columns if "lm_eval" in c] == [f"{CHOICE}: acc", f"{CHOICE}: acc norm"]
    place = table.columns.index(f"{CHOICE}: acc")
    assert all(" ± " in row[place] for row in table.rows)
    assert {(1, place), (2, place)} <= table.best  # the same run twice


def test_worked_examples_are_the_same_every_time(model, tokenizer):
    read = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read[-1].append(inputs[0].tolist()))
    asked = {count: benchmarks("sums_choice", lm_eval_num_fewshot=count) for count in (0, 2)}
    found = []
    for count in (0, 2, 2):
        read.append([])
        found.append(asked[count].measure(model, tokenizer, batch_size=4, precision="no"))
        assert asked[count].about["tasks"]["sums_choice"]["num_fewshot"] == count
    assert read[1] == read[2]
    assert found[1] == found[2]
    longest = [max(len(row) for batch in batches for row in batch) for batches in read]
    assert longest[0] == len("0+3=13") - 1  # what the last token says is not read
    assert longest[1] > 2 * longest[0]


# -- what it leaves alone ---------------------------------------------------------------------------------------------


def drawn() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(1).item()]


def test_the_state_of_training_is_as_before(model, tokenizer):
    asked = benchmarks()
    model.train().config.use_cache = False
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    weights, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    state = copy.deepcopy((random.getstate(), np.random.get_state(), torch.get_rng_state()))
    expected, names = drawn(), set(vars(model))
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    asked.measure(model, tokenizer, batch_size=4, precision="no")
    assert drawn() == expected
    assert model.training
    assert model.config.to_dict() == config
    assert set(vars(model)) == names
    assert tokenizer.padding_side == "right"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"]])
def test_weights_that_an_adapter_unties_stay_untied(saved, model, tokenizer):
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved))
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 * p.requires_grad)
    before = {name: id(p) for name, p in adapted.named_parameters(remove_duplicate=False)}
    measured = benchmarks().measure(adapted, tokenizer, batch_size=4, precision="no")
    assert {name: id(p) for name, p in adapted.named_parameters(remove_duplicate=False)} == before
    assert figures(measured) == directly(adapted, tokenizer)


def test_before_is_the_base_model_of_an_adapter(recipe, tmp_path, checkpoint, tokenizer):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "optim": "pion_lora"}
    main(["sft", "--config", recipe(**lora, **with_tasks())])
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert figures(record["before"]) == directly(model, tokenizer)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "run")
    assert figures(record["after"]) == directly(model, tokenizer)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_evaluation(precision, dtype, model, tokenizer):
    seen = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    benchmarks().measure(model, tokenizer, batch_size=4, precision=precision)
    assert seen == {dtype}


def test_a_group_that_adds_up_stands_for_its_tasks(ours_alone, model, tokenizer, tmp_path):
    choice = Path(TASKS, "sums_choice.yaml").read_text()
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(choice.replace("sums_choice", name))
    group = "group: {}\ntask: [first, second]\n"
    (tmp_path / "sum.yaml").write_text(group.format("sum") + "aggregate_metric_list: [{metric: acc}]\n")
    (tmp_path / "list.yaml").write_text(group.format("list"))
    options = {"lm_eval_include_path": str(tmp_path)}
    measure = partial(Benchmarks.measure, model=model, tokenizer=tokenizer, batch_size=4, precision="no")
    alone = measure(benchmarks("first", **options))["lm_eval/first"]
    summed = measure(benchmarks("sum", **options))
    assert summed["lm_eval/sum"]["acc"] == pytest.approx(alone["acc"])
    assert set(summed) == {"lm_eval/sum"}
    assert set(measure(benchmarks("list", **options))) == {"lm_eval/first", "lm_eval/second"}
    assert set(measure(benchmarks("f*", "second", **options))) == {"lm_eval/first", "lm_eval/second"}


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_several_processes_and_a_resumed_run(how, recipe, tmp_path, checkpoint, tokenizer):
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    path = recipe(**keys, **with_tasks())
    launch_by_accelerate(how, tmp_path, "sft", "--config", path)
    first = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert figures(first["before"]) == directly(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer)
    assert figures(first["after"]) == directly(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), tokenizer)
    launch_by_accelerate(how, tmp_path, "sft", "--config", path, "--resume_from_checkpoint", "true")
    again = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (again["before"], again["after"]) == (first["before"], first["after"])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_eval_limit": 0}, "lm_eval_limit must be at least 1: leave it out for no limit, got 0"),
        ({"lm_eval_num_fewshot": -1}, "lm_eval_num_fewshot must be at least 0, got -1"),
        ({"lm_eval_include_path": "nowhere"}, "lm_eval_include_path: there is no folder 'nowhere'"),
    ],
)
def test_options_that_are_none(changes, message, recipe):
    assert message in fails("sft", "--config", recipe(**with_tasks() | changes))


def test_an_unknown_task_is_named_before_a_model_is_loaded(recipe, monkeypatch):
    """Among all that lm_eval has."""
    monkeypatch.setattr(ReportingSFTTrainer, "train", lambda self, **kwargs: pytest.fail("it trained"))
    monkeypatch.setattr("trl.SFTTrainer.__init__", lambda self, **kwargs: pytest.fail("it loaded a model"))
    said = fails("sft", "--config", recipe(**with_tasks("sums_choice,arc_esay")))
    assert said == "pion-hf sft: lm_eval_tasks: 'arc_esay' is not a known task of lm_eval. Did you mean 'arc_easy'?"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sums.jsonl", "no.jsonl", "cannot load 'sums_answer': Unable to find"),
        ("generate_until", "guess", "cannot load 'sums_answer': Got invalid output_type"),
        ("metadata:", "unsafe_code: true\nmetadata:", "'sums_answer' runs what the model writes"),
    ],
)
def test_tasks_that_cannot_be_measured(old, new, message, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.SFTTrainer.__init__", lambda self, **kwargs: pytest.fail("it loaded a model"))
    (tmp_path / "tasks").mkdir()
    task = Path(TASKS, "sums_answer.yaml").read_text().replace(old, new)
    (tmp_path / "tasks" / "task.yaml").write_text(task)
    said = fails("sft", "--config", recipe(**with_tasks("sums_answer", lm_eval_include_path=str(tmp_path / "tasks"))))
    assert said.startswith("pion-hf sft: lm_eval_tasks: ")
    assert message in said
    assert "\n" not in said


# -- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_model(recipe, tmp_path):
    """From `make demo`, or `examples/prepare_smollm2.py`."""
    name = ROOT / "models" / "smollm2-135m-instruct"
    if not name.is_dir():
        pytest.skip("there is no models/smollm2-135m-instruct: examples/prepare_smollm2.py makes it")
    keys = {"model_name_or_path": str(name), "dtype": "float32", "eval_strategy": "no", "learning_rate": 3e-4}
    main(["sft", "--config", recipe(**keys, **with_tasks())])
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert record["before"][CHOICE]["acc"] > 0.25  # of four
    assert set(record["after"]) == {CHOICE, ANSWER}
