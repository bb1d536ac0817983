"""The scripts of the gallery: what each is started with, and what in it AdamW rightly takes of layers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

TRAINING = (
    "--max_steps=2 --per_device_train_batch_size=2 --learning_rate=1e-3 --logging_steps=1 --seed=0 --report_to=none "
    "--save_strategy=no --use_cpu=true --bf16=false --disable_tqdm=true"
)
TRAINS = re.compile(r"Trainer\(|import \w*Trainer\b")
PEFT = "--use_peft --lora_r=4 --lora_target_modules=all-linear"


@dataclass(frozen=True)
class Case:
    """One way of running a script.

    script: its path below transformers' `examples/pytorch`, or its name in `trl/scripts`.
    arguments: `{models}` and `{data}` are folders of the stand-ins.
    optim: this package's optimizer.
    by_adamw: patterns of names of weights in layers that are AdamW's by right, and why.
    broken: how the script itself fails, under AdamW as well: then it does not count.
    """

    name: str
    script: str
    arguments: str
    optim: str = "pion"
    by_adamw: dict[str, str] = field(default_factory=dict)
    broken: str | None = None

    def __str__(self) -> str:
        return self.name

    def argv(self, stand_ins: Path) -> list[str]:
        places = {"models": stand_ins / "models", "data": stand_ins / "data"}
        task = [] if self.of_trl else ["--do_train"]
        return [*self.arguments.format(**places).split(), *task, *TRAINING.split()]

    @property
    def of_trl(self) -> bool:
        return "/" not in self.script


def files(table: str) -> str:
    return f"--train_file={{data}}/{table}-train.json --validation_file={{data}}/{table}-validation.json"


def model(name: str) -> str:
    return f"--model_name_or_path={{models}}/{name}"


def chats(name: str) -> str:
    return f"--dataset_name={{data}}/{name} --max_length=64"


GENERATES = (
    "--dataset_name={data}/prompts --num_generations=2 --max_completion_length=6 --reward_funcs=toy_rewards.letters"
)
IMAGES = "--remove_unused_columns=false"
SHORT = "--max_source_length=48 --max_target_length=16"
POSITIONS = {"relative_position_bias": "a table of positions"}
HEADS = {r"(bbox|class)_(predictor|embed)": "heads of boxes and classes, one for every layer or of several layers"}

TRL = [
    Case("sft", "sft.py", f"{model('llama')} {chats('chats')}"),
    Case("sft-teon", "sft.py", f"{model('llama')} {chats('chats')}", optim="teon"),
    Case("sft-lora", "sft.py", f"{model('llama')} {chats('chats')} {PEFT}"),
    Case("dpo", "dpo.py", f"{model('llama')} {chats('preferences')}"),
    Case("dpo-lora", "dpo.py", f"{model('llama')} {chats('preferences')} {PEFT}"),
    Case("kto", "kto.py", f"{model('llama')} {chats('judged')}"),
    Case("kto-lora", "kto.py", f"{model('llama')} {chats('judged')} {PEFT}"),
    Case("reward", "reward.py", f"{model('reward')} {chats('preferences')}"),
    Case("reward-lora", "reward.py", f"{model('reward')} {chats('preferences')} {PEFT} --lora_task_type=SEQ_CLS"),
    Case("grpo", "grpo.py", f"{model('llama')} {GENERATES}"),
    Case("grpo-lora", "grpo.py", f"{model('llama')} {GENERATES} {PEFT}"),
    Case("rloo", "rloo.py", f"{model('llama')} {GENERATES}"),
    Case(
        "distillation",
        "distillation.py",
        f"{model('llama')} --teacher_{model('llama').removeprefix('--')} --dataset_name={{data}}/prompts "
        "--max_completion_length=6",
    ),
]
TEXT = "--train_file={data}/text.txt --validation_file={data}/text.txt"
TRANSFORMERS = [
    Case("clm", "language-modeling/run_clm.py", f"{model('gpt2')} {TEXT} --block_size=32"),
    Case(
        "fim",
        "language-modeling/run_fim.py",
        f"{model('llama')} {TEXT} --block_size=32",
        broken="'Embedding' object has no attribute 'mean'",
    ),
    Case("mlm", "language-modeling/run_mlm.py", f"{model('bert')} {TEXT} --max_seq_length=32"),
    Case("mlm-albert", "language-modeling/run_mlm.py", f"{model('albert')} {TEXT} --max_seq_length=32", optim="teon"),
    Case(
        "plm",
        "language-modeling/run_plm.py",
        f"{model('xlnet')} {TEXT} --max_seq_length=32",
        broken="unexpected keyword argument 'processing_classtokenizer'",
    ),
    Case("glue", "text-classification/run_glue.py", f"{model('bert')} {files('pairs')} --max_seq_length=32"),
    Case(
        "classification",
        "text-classification/run_classification.py",
        f"{model('roberta')} {files('labelled')} --text_column_names=sentence --max_seq_length=32 "
        "--ignore_mismatched_sizes=true",
    ),
    Case("xnli", "text-classification/run_xnli.py", f"{model('bert')} --language=en --max_seq_length=32"),
    Case("ner", "token-classification/run_ner.py", f"{model('deberta')} {files('tagged')} --ignore_mismatched_sizes"),
    Case("swag", "multiple-choice/run_swag.py", f"{model('bert')} {files('endings')} --max_seq_length=32"),
    Case("qa", "question-answering/run_qa.py", f"{model('bert')} {files('qa')} --max_seq_length=48 --doc_stride=16"),
    Case(
        "qa-beam-search",
        "question-answering/run_qa_beam_search.py",
        f"{model('xlnet')} {files('qa')} --max_seq_length=48 --doc_stride=16",
        by_adamw={r"r_[rsw]_bias|seg_embed": "biases and embeddings of XLNet's attention"},
    ),
    Case(
        "qa-seq2seq",
        "question-answering/run_seq2seq_qa.py",
        f"{model('t5')} {files('qa')} --max_seq_length=48 --doc_stride=16 --max_answer_length=8",
    ),
    Case("summarization", "summarization/run_summarization.py", f"{model('bart')} {files('summaries')} {SHORT}"),
    Case(
        "translation",
        "translation/run_translation.py",
        f"{model('t5')} {files('translations')} --source_lang=en --target_lang=de {SHORT}",
    ),
    Case(
        "clip",
        "contrastive-image-text/run_clip.py",
        f"{model('clip')} --train_file={{data}}/captions.json --max_seq_length=16 {IMAGES}",
    ),
    Case(
        "siglip",
        "contrastive-image-text/run_clip.py",
        f"{model('siglip')} --train_file={{data}}/captions.json --max_seq_length=16 {IMAGES}",
    ),
    Case(
        "image-classification",
        "image-classification/run_image_classification.py",
        f"{model('vit')} --train_dir={{data}}/images --ignore_mismatched_sizes {IMAGES}",
    ),
    Case(
        "mae",
        "image-pretraining/run_mae.py",
        f"{model('mae')} --dataset_name={{data}}/images --label_names=pixel_values {IMAGES}",
    ),
    Case(
        "mim",
        "image-pretraining/run_mim.py",
        f"{model('swin')} --dataset_name={{data}}/images --label_names=bool_masked_pos {IMAGES} --mask_patch_size=16",
        by_adamw=POSITIONS,
    ),
    Case(
        "detection",
        "object-detection/run_object_detection.py",
        f"{model('detr')} --dataset_name={{data}}/boxes --image_square_size=64 --ignore_mismatched_sizes {IMAGES} "
        "--eval_do_concat_batches=false",
        by_adamw=HEADS,
    ),
    Case(
        "detection-deformable",
        "object-detection/run_object_detection.py",
        f"{model('deformable_detr')} --dataset_name={{data}}/boxes --image_square_size=64 --ignore_mismatched_sizes "
        f"{IMAGES} --eval_do_concat_batches=false",
        by_adamw=HEADS,
    ),
    Case(
        "semantic-segmentation",
        "semantic-segmentation/run_semantic_segmentation.py",
        f"{model('segformer')} --dataset_name={{data}}/masks {IMAGES}",
        by_adamw={r"^decode_head\.": "the head, side by side for every size of features"},
    ),
    Case(
        "instance-segmentation",
        "instance-segmentation/run_instance_segmentation.py",
        f"{model('mask2former')} --dataset_name={{data}}/instances --image_height=64 --image_width=64 {IMAGES}",
        by_adamw=POSITIONS,
    ),
]
CASES = [*TRL, *TRANSFORMERS]


def trl_scripts() -> dict[str, Path]:
    """TRL's installed scripts that train, by name."""
    import trl.scripts

    found = Path(trl.scripts.__file__).parent.glob("*.py")
    return {path.name: path for path in found if TRAINS.search(path.read_text(encoding="utf-8"))}


def transformers_scripts(folder: Path) -> dict[str, Path]:
    """The scripts below transformers' `examples/pytorch` that train with its Trainer, by path."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.glob("*/run_*.py"))}
    return {
        name: path
        for name, path in found.items()
        if not name.endswith("_no_trainer.py") and TRAINS.search(path.read_text(encoding="utf-8"))
    }
