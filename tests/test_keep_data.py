"""`Inputs.show` and `keep_data`: what is kept is what the model makes of texts that it is shown, not of the task's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import pion_hf
from pion_hf import Inputs, PionTrainer, PionTrainingArguments, RoutedAdamW, Teon, param_groups
from pion_hf.cli import main
from pion_hf.integrations.arguments import resolve_options
from pion_hf.integrations.handler import with_inputs
from tests.conftest import chat_rows, toy_llama, toy_tokenizer, write_jsonl
from tests.test_keep import train

KEEP = 12


def muon(model: nn.Module, **options) -> Teon:
    return Teon(param_groups(model, "muon"), lr=1e-2, stack=1, polar_dtype="float32", **options)


def adamw_routed(model: nn.Module, **options) -> RoutedAdamW:
    return RoutedAdamW(param_groups(model, "adamw_routed"), lr=1e-3, **options)


def shown(count: int = 2) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, 105, (1, 4), generator=draws)} for _ in range(count)]


def layer_inputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.setdefault(f"{name}.weight", []).append(args[0].flatten(0, 1))
            )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("build", [muon, adamw_routed])
def test_outputs_of_what_was_shown_stay_and_those_of_the_task_move(build):
    model, before = toy_llama(), toy_llama()
    inputs = Inputs(model, KEEP)
    inputs.show(model, shown())
    optimizer = build(model, keep=KEEP, inputs=inputs)
    seen, of_task = layer_inputs(toy_llama(), shown()), layer_inputs(toy_llama(), shown(40)[20:])
    train(model, optimizer, steps=4)
    old = dict(before.named_parameters())
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if group["rule"] != "adamw":
                change = p.detach() - old[name].detach()
                kept, moved = (change @ x[name].mT for x in (seen, of_task))
                assert kept.norm() < 1e-4 * moved.norm(), name


def test_nothing_of_what_trains_is_seen_and_the_model_is_as_it_was():
    model = toy_llama(attention_dropout=0.1).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    inputs, state = Inputs(model, 3), torch.get_rng_state()
    inputs.show(model, shown())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    name, weight = "model.layers.1.mlp.up_proj.weight", model.model.layers[1].mlp.up_proj.weight
    before = inputs.directions(name, weight.shape[1], 3, weight.device)
    assert before.norm() > 1
    model(input_ids=torch.randint(5, 105, (2, 8)), labels=torch.randint(5, 105, (2, 8))).loss.backward()
    assert torch.equal(inputs.directions(name, weight.shape[1], 3, weight.device), before)


def test_shown_is_seen_as_passes_that_train_are():
    model, other = toy_llama().eval(), toy_llama().eval()
    inputs, watching = Inputs(model, 3), Inputs(other, 3)
    inputs.show(model, shown())
    for batch in shown():
        other(**batch)
    name, weight = "model.layers.0.self_attn.o_proj.weight", model.model.layers[0].self_attn.o_proj.weight
    found, wanted = (i.directions(name, weight.shape[1], 3, weight.device) for i in (inputs, watching))
    assert torch.equal(found, wanted)


def trained(path, data: str | None, checkpoint, rows, **options) -> dict[str, Tensor]:
    """What is kept of one matrix after two steps."""
    args = PionTrainingArguments(
        output_dir=str(path),
        optim="muon",
        optim_keep=4,
        optim_keep_data=data,
        max_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **options,
    )
    trainer = PionTrainer(model=toy_llama().from_pretrained(checkpoint), args=args, train_dataset=rows)
    trainer.train()
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    return trainer.optimizer.optimizer.state[weight]["kept.0"]


def test_a_trainer_shows_the_rows_of_a_file(tmp_path, checkpoint, token_rows):
    write_jsonl(tmp_path / "chats.jsonl", chat_rows(6))
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{i} and {2 * i} are numbers."} for i in range(6)])
    (tmp_path / "text.txt").write_text("What a model must not forget. " * 40, encoding="utf-8")
    of_task = trained(tmp_path / "run", None, checkpoint, token_rows)
    for form in ("chats.jsonl", "texts.jsonl", "text.txt"):
        of_file = trained(tmp_path / "run", str(tmp_path / form), checkpoint, token_rows)
        assert not torch.allclose(of_file, of_task), form
        assert torch.equal(of_file, trained(tmp_path / "run", str(tmp_path / form), checkpoint, token_rows, seed=1))


@pytest.mark.skipif(not hasattr(transformers.trainer, "is_optimizer_factory"), reason="transformers before 5.2")
def test_a_factory_shows_them_too(tmp_path, checkpoint):
    write_jsonl(tmp_path / "chats.jsonl", chat_rows(6))
    model = toy_llama().from_pretrained(checkpoint)
    kind, options = pion_hf.factory("muon", lr=1e-3, keep=4, keep_data=str(tmp_path / "chats.jsonl"))
    optimizer = kind()(model, **options)
    assert not optimizer.inputs.open
    assert optimizer.inputs.directions("model.layers.0.mlp.up_proj.weight", 32, 4, torch.device("cpu")).norm() > 1


def test_what_cannot_be_shown_is_named(tmp_path, checkpoint, token_rows):
    with pytest.raises(ValueError, match=r"keep_data='x\.jsonl' says what is kept, and keep=0 keeps nothing: set keep"):
        resolve_options("muon", {"keep_data": "x.jsonl"})
    with pytest.raises(ValueError, match=r"keep_data='.*none.jsonl' is no file: name one of chats or texts"):
        trained(tmp_path, str(tmp_path / "none.jsonl"), checkpoint, token_rows)
    write_jsonl(tmp_path / "chats.jsonl", chat_rows(2))
    with pytest.raises(ValueError, match="cannot be read for '': "):
        with_inputs({"keep": 2}, toy_llama(), str(tmp_path / "chats.jsonl"))
    model = toy_llama().from_pretrained(checkpoint)
    for name, text, said in (
        ("rows.jsonl", '{"question": "1+1="}\n', "these are no chats with an answer"),
        ("broken.jsonl", '{"text": \n', "cannot be read for"),
        ("empty.jsonl", "", "there is no text in it"),
        ("nothing.txt", "", "there is no text in it"),
        ("blank.jsonl", '{"text": ""}\n', "there is no text in it"),
        ("number.jsonl", '{"text": 1}\n', "cannot be read for"),
        ("other.jsonl", '{"text": "a"}\n{"words": "b"}\n', "cannot be read for"),
        ("list.jsonl", "[1]\n", "cannot be read for"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"keep_data='.*{name}' cannot be read .*{said}|{said}"):
            with_inputs({"keep": 2}, model, str(tmp_path / name))


def test_a_model_with_an_encoder_is_shown_batches_instead(tmp_path):
    write_jsonl(tmp_path / "chats.jsonl", chat_rows(2))
    config = transformers.T5Config(vocab_size=110, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(
        ValueError,
        match=r"is for causal models, and this one has an encoder: show them batches by pion_hf\.Inputs\.show",
    ):
        with_inputs({"keep": 2}, transformers.T5ForConditionalGeneration(config), str(tmp_path / "chats.jsonl"))


def test_adapters_are_shown_them_through_their_model(tmp_path, checkpoint):
    write_jsonl(tmp_path / "chats.jsonl", chat_rows(6))
    model = get_peft_model(toy_llama().from_pretrained(checkpoint), LoraConfig(r=2, target_modules="all-linear"))
    inputs = with_inputs({"keep": 4}, model, str(tmp_path / "chats.jsonl"))["inputs"]
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert inputs.directions(name, 32, 4, torch.device("cpu")).norm() > 1


@pytest.mark.parametrize("template", [True, False])
def test_a_models_own_answers_are_rows_to_keep(template, tmp_path, checkpoint, token_rows):
    questions, output = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("1+1=\n\n2+2=\n", encoding="utf-8")
    model = shutil.copytree(checkpoint, tmp_path / "model")
    if not template:  # nor a token to pad with, as many base models
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = tokenizer.pad_token = None
        tokenizer.save_pretrained(model)
        (model / "chat_template.jinja").unlink(missing_ok=True)
    arguments = ["--instructions", questions, "--output", output, "--new_tokens", 6]
    main(["answers", "--model", *map(str, [model, *arguments])])
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    asked = [row["prompt"][0]["content"] if template else row["text"].partition("\n")[0] for row in rows]
    assert asked == ["1+1=", "2+2="]
    assert trained(tmp_path / "run", str(output), model, token_rows).norm() > 1
    said = output.read_text(encoding="utf-8")
    main(["answers", "--model", *map(str, [model, *arguments])])
    assert output.read_text(encoding="utf-8") == said


def test_what_cannot_be_answered_is_named(tmp_path, checkpoint):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    for path, said in ((empty, "is empty: write one instruction in every line"), (tmp_path, "cannot be read: ")):
        with pytest.raises(SystemExit, match=f"pion-hf answers: instructions='{path}' {said}"):
            main(["answers", "--model", str(checkpoint), "--instructions", str(path)])
