"""One trial of examples/benchmarks/evidence.py: train SmolLM2-135M-Instruct on a task, measure what it learnt and kept.

Everything is made here from seeds, but for the model and the file of unrelated text: the tasks' examples by
reasoning-gym, and 200 general instructions, to which the base model's own sampled answers are kept in
results/evidence_answers.jsonl. The first hundred are measured, the others are what a contender may replay.
"""

import inspect
import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from datasets import Dataset, disable_progress_bars
from reasoning_gym import create_dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, set_seed

from pion_hf import Blend, Inputs, PionTrainingArguments
from pion_hf.integrations.evaluation import IGNORED, answer_tokens, evaluating, exact_match, generate_answers, text_loss
from pion_hf.integrations.kept_data import own_answers
from pion_hf.linalg.products import bfloat16_speedup

MODEL, OTHER_TEXT = "models/smollm2-135m-instruct", "data/python_docs.txt"
ANSWERS = Path(__file__).parent / "results" / "evidence_answers.jsonl"
REPLAYED = Path("runs/evidence/replayed.jsonl")  # those of them that are not measured, for contenders that use them
GENERAL = Path("runs/evidence/general.txt")  # docstrings of torch: neither the task nor anything that is measured
GENERAL_LENGTH = 40_000  # characters, as all of what is replayed
BATCH, WARMUP, SHARES, LONGEST = 8, 0.1, (0.6, 0.8, 1.0), 256
INSTRUCTIONS, SAMPLED_TOKENS = 100, 80
REPLAY = 20  # one example of so many is replayed
TASKS = {  # of reasoning-gym, and their sizes
    "riddles": {"name": "aiw"},
    "needles": {"name": "needle_haystack", "min_num_statements": 4, "max_num_statements": 8},
}
TRAINED_FROM = 1_000_000  # seeds of examples: reasoning-gym's example i has the seed of its set plus i
NEW_TOKENS = 8
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    "osf": lambda: peft.OSFConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
}
FORMS = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "Give three tips about {}.",
    "What are the advantages and disadvantages of {}?",
    "Write the first paragraph of a story about {}.",
    "Summarise the history of {} in two sentences.",
    "What would you tell a friend who is afraid of {}?",
    "List five words that have to do with {}, and say why.",
    "Write a polite e-mail that asks a colleague about {}.",
    "What do most people get wrong about {}?",
)
TOPICS = (
    *("the sea", "trains", "bread", "sleep", "mathematics", "gardens", "money", "music", "winter", "the moon"),
    *("computers", "tea", "friendship", "bridges", "birds", "exams", "cities", "medicine", "football", "libraries"),
)
CAPITALS = """
Afghanistan Kabul, Albania Tirana, Algeria Algiers, Angola Luanda, Argentina Buenos Aires, Armenia Yerevan, Australia
Canberra, Austria Vienna, Azerbaijan Baku, Bahrain Manama, Bangladesh Dhaka, Belarus Minsk, Belgium Brussels, Bolivia
Sucre, Brazil Brasilia, Bulgaria Sofia, Cambodia Phnom Penh, Cameroon Yaounde, Canada Ottawa, Chad N'Djamena, Chile
Santiago, China Beijing, Colombia Bogota, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Denmark Copenhagen, Ecuador
Quito, Egypt Cairo, Eritrea Asmara, Estonia Tallinn, Ethiopia Addis Ababa, Finland Helsinki, France Paris, Georgia
Tbilisi, Germany Berlin, Ghana Accra, Greece Athens, Haiti Port-au-Prince, Honduras Tegucigalpa, Hungary Budapest,
Iceland Reykjavik, India New Delhi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Ireland Dublin, Israel Jerusalem,
Italy Rome, Jamaica Kingston, Japan Tokyo, Jordan Amman, Kazakhstan Astana, Kenya Nairobi, Laos Vientiane, Latvia
Riga, Lebanon Beirut, Liberia Monrovia, Libya Tripoli, Lithuania Vilnius, Madagascar Antananarivo, Malaysia Kuala
Lumpur, Mali Bamako, Malta Valletta, Mongolia Ulaanbaatar, Morocco Rabat, Mozambique Maputo, Namibia Windhoek, Nepal
Kathmandu, Netherlands Amsterdam, Nicaragua Managua, Niger Niamey, Nigeria Abuja, Norway Oslo, Oman Muscat, Pakistan
Islamabad, Paraguay Asuncion, Peru Lima, Philippines Manila, Poland Warsaw, Portugal Lisbon, Qatar Doha, Romania
Bucharest, Russia Moscow, Rwanda Kigali, Senegal Dakar, Serbia Belgrade, Slovakia Bratislava, Somalia Mogadishu, Spain
Madrid, Sudan Khartoum, Sweden Stockholm, Switzerland Bern, Syria Damascus, Thailand Bangkok, Tunisia Tunis, Turkey
Ankara, Uganda Kampala, Ukraine Kyiv, Uruguay Montevideo, Venezuela Caracas, Vietnam Hanoi, Zambia Lusaka, Zimbabwe
Harare
"""  # another skill; no country here has a name of two words


def chat(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def examples(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    made = create_dataset(**TASKS[task], size=count, seed=seed)
    return [chat(item["question"], str(item["answer"])) for item in made]


def trained_on(task: str, steps: int, seed: int) -> list[dict[str, Any]]:
    """As many examples of the task as a training has."""
    return examples(task, BATCH * steps, TRAINED_FROM * (seed + 1))


class AnswersTrainer(Trainer):
    """Takes logits of the answers' tokens alone: of so short answers the others would be most of a step's time."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs["labels"][:, 1:]
        wanted = labels != IGNORED
        with self.accelerator.autocast():  # the Trainer's own is around the model's forward, which is not called here
            logits = answer_logits(model, inputs["input_ids"], inputs["attention_mask"], wanted)
        return cross_entropy(logits, labels[wanted])


def answer_logits(model: nn.Module, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """Float32 logits `(count, vocabulary)` of the tokens behind those that are `wanted`, `(batch, length - 1)`."""
    causal = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return causal.lm_head(causal.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][wanted]).float()


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    return answer_logits(model, ids, mask, wanted).log_softmax(-1)


def directions_of(kind: str, model: nn.Module) -> Any:
    """In place of `Inputs.directions`: as many, but `random` ones, or the `weights`' leading right singular vectors."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()} if kind == "weights" else {}

    def directions(_: Inputs, name: str, n: int, count: int, *__: Any, **___: Any) -> Tensor:
        if kind == "random":
            return torch.linalg.qr(torch.randn(n, count)).Q
        return torch.linalg.svd(weights[name], full_matrices=False).Vh[:count].mT

    return directions


class Bench:
    """The base model's measures, and what every trial needs."""

    def __init__(self) -> None:
        disable_progress_bars()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.text = Path(OTHER_TEXT).read_text(encoding="utf-8")
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_speedup() > 1)
        base = self.base()
        if not ANSWERS.is_file():
            self.sample_answers(base)
        answers = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
        self.own, self.replayed = answers[:INSTRUCTIONS], answers[INSTRUCTIONS:]
        REPLAYED.parent.mkdir(parents=True, exist_ok=True)
        REPLAYED.write_text("".join(json.dumps(row) + "\n" for row in self.replayed), encoding="utf-8")
        documented = (text for _, made in sorted(vars(nn).items()) if (text := inspect.getdoc(made)))
        GENERAL.write_text("\n\n".join(documented)[:GENERAL_LENGTH], encoding="utf-8")
        self.own_tokens = sorted(answer_tokens(self.tokenizer, self.own), key=lambda pair: len(pair[0]))
        self.before_logs = [log_probabilities(base, *batch) for batch in self.own_batches()]

    def base(self) -> nn.Module:
        # Eager attention is the fastest one for so short texts on a CPU.
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()

    def sample_answers(self, base: nn.Module) -> None:
        instructions = [form.format(topic) for form in FORMS for topic in TOPICS]
        random.Random(0).shuffle(instructions)
        set_seed(0)
        rows = own_answers(base, self.tokenizer, instructions, new_tokens=SAMPLED_TOKENS)
        ANSWERS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, contender: dict, task: str, lr: float, seed: int, steps: int) -> Iterator[tuple[float, nn.Module]]:
        """The model at every share of the way, the last 1, after training as `contender` says."""
        options = dict(contender)
        adapter, replay, kept = options.pop("adapter", None), options.pop("replay", False), options.pop("kept", None)
        rows = trained_on(task, steps, seed)
        if replay:
            rows[REPLAY - 1 :: REPLAY] = itertools.islice(itertools.cycle(self.replayed), len(rows) // REPLAY)
        folder = Path("runs/evidence/trial")
        args = PionTrainingArguments(
            output_dir=str(folder),
            learning_rate=lr,
            max_steps=steps,
            warmup_steps=int(WARMUP * steps),
            lr_scheduler_type="linear",
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="group_by_length",
            max_grad_norm=1.0,
            bf16="auto",
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10,
            remove_unused_columns=False,
            **options,
        )
        set_seed(seed)
        model = self.base()
        if adapter:
            model = peft.get_peft_model(model, ADAPTERS[adapter]())
        tokens = answer_tokens(self.tokenizer, rows, max_length=LONGEST)
        data = Dataset.from_list([{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in tokens])
        collate = DataCollatorForSeq2Seq(self.tokenizer)
        trainer = AnswersTrainer(model, args, data_collator=collate, train_dataset=data)
        blend = Blend(trainer.model)
        directions = directions_of(kept, model) if kept else Inputs.directions
        with mock.patch.object(Inputs, "directions", directions):
            trainer.train()
        for share in SHARES:
            blend.apply(share, trainer.optimizer)
            yield share, trainer.model
        shutil.rmtree(folder, ignore_errors=True)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def run(self, contender: dict, task: str, lr: float, seed: int, steps: int, questions: int) -> dict[str, Any]:
        """Measures by share of the way, and seconds."""
        start = time.perf_counter()
        seen = trained_on(task, steps, seed)
        held_out = [row for row in examples(task, 2 * questions, 1) if row not in seen]
        shares = {}
        for share, model in self.train(contender, task, lr, seed, steps):
            shares[f"{share:g}"] = self.measure(model, held_out[:questions])
        return {"shares": shares, "seconds": time.perf_counter() - start}

    def before(self, task: str) -> dict[str, float]:
        """What the base model measures."""
        return self.measure(self.base(), examples(task, 100, 1))

    def measure(self, model: nn.Module, questions: list[dict]) -> dict[str, float]:
        """What it answers, and what of the base model is left."""
        with self.autocast:
            given = generate_answers(model, self.tokenizer, questions, batch_size=50, max_new_tokens=NEW_TOKENS)
            other = text_loss(model, self.tokenizer, self.text)
        with evaluating(model):
            kept = {"other_text": other, "capitals": self.capitals(model), **self.own_answers(model)}
        return {"exact_match": exact_match(given, questions), **kept}

    @torch.no_grad()
    def capitals(self, model: nn.Module) -> float:
        """The share of countries whose own capital is likelier to follow than any other's, by its first token."""
        pairs = [pair.split(maxsplit=1) for pair in CAPITALS.replace("\n", " ").split(",")]
        firsts = torch.tensor([self.tokenizer(f" {capital.strip()}").input_ids[0] for _, capital in pairs])
        texts = [
            self.tokenizer(f"The capital of {country} is", return_tensors="pt").input_ids[0] for country, _ in pairs
        ]
        ids, ends = pad_sequence(texts, batch_first=True), torch.tensor([len(text) - 1 for text in texts])
        logits = model(input_ids=ids).logits[torch.arange(len(ids)), ends][:, firsts]
        return (firsts[logits.argmax(-1)] == firsts).float().mean().item()

    def own_answers(self, model: nn.Module) -> dict[str, float]:
        """Of the base model's own answers, in float32: their loss, and the divergence of `model` from the base model,
        `KL(base || model)`, over all the vocabulary, nats per token."""
        loss = divergence = count = 0
        for batch, before in zip(self.own_batches(), self.before_logs, strict=True):
            ids, _, counts = batch
            after = log_probabilities(model, *batch)
            divergence += kl_div(after, before, reduction="sum", log_target=True).item()
            loss -= after.gather(-1, ids[:, 1:][counts].unsqueeze(-1)).sum().item()
            count += len(after)
        return {"own_loss": loss / count, "own_kl": divergence / count}

    def own_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, their mask, and whether the next one is of an answer."""
        for start in range(0, len(self.own_tokens), BATCH):
            ids, labels = zip(*self.own_tokens[start : start + BATCH], strict=True)
            mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
            wanted = pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, 1:] != IGNORED
            yield pad_sequence(ids, batch_first=True), mask, wanted
