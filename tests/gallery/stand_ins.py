"""What stands in for a hub in the gallery: tiny models with random weights, and toy data, as folders and files.

Everything is made here, without a network. `make` fills a folder: `models/<name>` are checkpoints with a tokenizer or
an image processor, `data` what the scripts read, `xnli` a dataset of the hub by its name, `toy_rewards.py` a reward.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, XLNetTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, START, END, MASK = range(len(SPECIAL))
IDS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
VOCABULARY = 300
WIDTH, HEADS, LAYERS, INNER = 32, 4, 2, 48
IMAGE, PATCH = 64, 16
ROWS = 12
WORDS = "the quick brown fox jumps over a lazy dog while seven grey owls watch from an old oak and say nothing at all"
LABELS = ["sphinx", "quartz", "vow"]
CHAT_TEMPLATE = (
    "{% for message in messages %}[CLS]{{ message['role'] }}: {{ message['content'] }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS]assistant: {% endif %}"
)
REWARD = '''"""A reward that differs between answers."""


def letters(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(map(str.isalpha, text)) % 7) for text in texts]
'''

COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
ENCODER = {**COMMON, "intermediate_size": INNER, "max_position_embeddings": 128, **IDS}
VIT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "encoder_stride": PATCH,
}
SWIN = {
    "image_size": IMAGE,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
    "encoder_stride": 32,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
DETECTOR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "num_queries": 6,
}
MASK2FORMER = {
    "backbone_config": {"model_type": "swin", **SWIN},
    "feature_size": WIDTH,
    "mask_feature_size": WIDTH,
    "hidden_dim": WIDTH,
    "encoder_feedforward_dim": INNER,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS + 1,
    "num_attention_heads": HEADS,
    "dim_feedforward": INNER,
    "num_queries": 6,
    "train_num_points": 64,
}
DECODER = {"num_key_value_heads": 2, "tie_word_embeddings": True, **ENCODER}
TEXT_TOWER = {**ENCODER, "projection_dim": 16}
VISION_TOWER = {**VIT, "projection_dim": 16}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 128,
    "decoder_start_token_id": END,
    "forced_eos_token_id": END,
    **IDS,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "d_ff": INNER,
    "decoder_start_token_id": PAD,
    **IDS,
}
XLNET = {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": INNER, **IDS}

# Folder -> model type, class of the model, changes to the config, image processor (None: a tokenizer instead).
MODELS: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "llama": ("llama", "LlamaForCausalLM", DECODER, None),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {**ENCODER, "n_positions": 128}, None),
    "reward": ("llama", "LlamaForSequenceClassification", {**DECODER, "num_labels": 1}, None),
    "bert": ("bert", "BertForMaskedLM", ENCODER, None),
    "roberta": ("roberta", "RobertaForSequenceClassification", {**ENCODER, "max_position_embeddings": 160}, None),
    "albert": ("albert", "AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}, None),
    "deberta": ("deberta-v2", "DebertaV2ForTokenClassification", ENCODER, None),
    "xlnet": ("xlnet", "XLNetLMHeadModel", XLNET, None),
    "t5": ("t5", "T5ForConditionalGeneration", T5, None),
    "bart": ("bart", "BartForConditionalGeneration", SEQ2SEQ, None),
    "clip": ("clip", "CLIPModel", {"text_config": TEXT_TOWER, "vision_config": VISION_TOWER}, "CLIP"),
    "siglip": ("siglip", "SiglipModel", {"text_config": ENCODER, "vision_config": VIT}, "Siglip"),
    "vit": ("vit", "ViTForImageClassification", VIT, "ViT"),
    "swin": ("swin", "SwinForMaskedImageModeling", SWIN, "ViT"),
    "mae": (
        "vit_mae",
        "ViTMAEForPreTraining",
        {
            **VIT,
            "decoder_hidden_size": WIDTH,
            "decoder_num_hidden_layers": LAYERS,
            "decoder_num_attention_heads": HEADS,
            "decoder_intermediate_size": INNER,
        },
        "ViT",
    ),
    "segformer": (
        "segformer",
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 32,
            "num_labels": 3,
        },
        "Segformer",
    ),
    "mask2former": ("mask2former", "Mask2FormerForUniversalSegmentation", MASK2FORMER, "Mask2Former"),
    "detr": ("detr", "DetrForObjectDetection", {**DETECTOR, "backbone_config": RESNET}, "Detr"),
    "deformable_detr": (
        "deformable_detr",
        "DeformableDetrForObjectDetection",
        {**DETECTOR, "backbone_config": RESNET},
        "DeformableDetr",
    ),
}


def make(folder: Path) -> Path:
    """Everything, in a new folder."""
    tokenizer = make_tokenizer()
    for name in MODELS:
        make_model(name, folder / "models" / name, make_pieces() if name == "xlnet" else tokenizer)
    data = folder / "data"
    data.mkdir()
    chance = random.Random(0)
    for name, of in TABLES.items():
        for split, count in (("train", ROWS), ("validation", 4)):
            rows, path = [of(chance) for _ in range(count)], data / f"{name}-{split}.json"
            if name == "qa":  # as SQuAD has it
                path.write_text(json.dumps({"data": rows}), encoding="utf-8")
            else:
                write_jsonl(path, rows)
    for name, of in CHATS.items():
        (data / name).mkdir()
        for split, count in (("train", ROWS), ("test", 4)):
            write_jsonl(data / name / f"{split}.jsonl", [of(chance) for _ in range(count)])
    (data / "text.txt").write_text("".join(sentence(chance, 12) + ".\n" for _ in range(200)), encoding="utf-8")
    make_images(data)
    make_xnli(folder / "xnli", chance)
    (folder / "toy_rewards.py").write_text(REWARD, encoding="utf-8")
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of a few sentences, with pairs as BERT joins them."""
    chance = random.Random(0)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((sentence(chance, 12) for _ in range(100)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", START), ("[SEP]", END)]
    )
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
        chat_template=CHAT_TEMPLATE,
        **special,
    )


def make_pieces() -> XLNetTokenizer:
    """XLNet's, which is read with no other model than this: the words, and single letters."""
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eop>", "<eod>"]
    words = dict.fromkeys([*(f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in WORDS.split()), *string.ascii_letters])
    return XLNetTokenizer(vocab=[*((token, 0.0) for token in special), *((word, -5.0) for word in words)])


def make_model(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A checkpoint with weights that are random but seeded."""
    kind, architecture, changes, processor = MODELS[name]
    config = AutoConfig.for_model(kind, **changes)
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    if processor in (None, "CLIP", "Siglip"):
        tokenizer.save_pretrained(folder)
    if processor is not None:
        size = {"shortest_edge": IMAGE} if processor == "CLIP" else {"height": IMAGE, "width": IMAGE}
        getattr(transformers, f"{processor}ImageProcessor")(size=size).save_pretrained(folder)


# -- data -------------------------------------------------------------------------------------------------------------


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS.split(), k=words))


def qa(chance: random.Random) -> dict[str, Any]:
    context = sentence(chance, 16)
    word = chance.choice(context.split())
    answers = {"text": [word], "answer_start": [context.index(word)]}
    return {"id": str(chance.random()), "question": sentence(chance, 5), "context": context, "answers": answers}


def tagged(chance: random.Random) -> dict[str, Any]:
    words = sentence(chance, 6).split()
    return {"tokens": words, "ner_tags": [chance.choice(["O", "B-ANIMAL", "I-ANIMAL"]) for _ in words]}


def endings(chance: random.Random) -> dict[str, Any]:
    choices = {f"ending{i}": sentence(chance, 4) for i in range(4)}
    return {"sent1": sentence(chance, 6), "sent2": sentence(chance, 2), **choices, "label": chance.randrange(4)}


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


# Name of a table -> a row of it; one file for each split.
TABLES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "pairs": lambda c: {"sentence1": sentence(c, 6), "sentence2": sentence(c, 6), "label": c.randrange(2)},
    "labelled": lambda c: {"sentence": sentence(c, 8), "label": c.choice(LABELS)},
    "tagged": tagged,
    "endings": endings,
    "qa": qa,
    "summaries": lambda c: {"text": sentence(c, 20), "summary": sentence(c, 4)},
    "translations": lambda c: {"translation": {"en": sentence(c, 8), "de": sentence(c, 8)}},
}
# Name of a folder -> a row; for TRL.
CHATS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "chats": lambda c: {"messages": turn("user", sentence(c, 6)) + turn("assistant", sentence(c, 5))},
    "prompts": lambda c: {"prompt": turn("user", sentence(c, 6))},
    "preferences": lambda c: {
        "prompt": turn("user", sentence(c, 5)),
        "chosen": turn("assistant", sentence(c, 5)),
        "rejected": turn("assistant", sentence(c, 4)),
    },
    "judged": lambda c: {
        "prompt": turn("user", sentence(c, 5)),
        "completion": turn("assistant", sentence(c, 4)),
        "label": c.random() < 0.5,
    },
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_images(data: Path) -> None:
    """A folder by class, captions, and datasets of boxes, of masks and of instances."""
    draw = np.random.default_rng(0)

    def image() -> Image.Image:
        return Image.fromarray(draw.integers(0, 255, (IMAGE, IMAGE, 3), dtype=np.uint8))

    captions = []
    for label in LABELS:
        for i in range(4):
            path = data / "images" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image().save(path)
            captions.append({"image_path": str(path), "caption": f"a {label} {i}"})
    write_jsonl(data / "captions.json", captions)

    pictures = datasets.Image()
    box = {"id": 0, "area": 400.0, "bbox": [8.0, 8.0, 20.0, 20.0], "category": 1}
    boxes = {
        "image_id": datasets.Value("int64"),
        "image": pictures,
        "objects": {
            "id": datasets.List(datasets.Value("int64")),
            "area": datasets.List(datasets.Value("float32")),
            "bbox": datasets.List(datasets.List(datasets.Value("float32"), 4)),
            "category": datasets.List(datasets.ClassLabel(names=LABELS)),
        },
    }
    write_dataset(
        data / "boxes",
        boxes,
        lambda i: {"image_id": i, "image": image(), "objects": {key: [value] for key, value in box.items()}},
    )

    def masks(i: int) -> dict[str, Any]:
        mask = draw.integers(0, len(LABELS), (IMAGE, IMAGE), dtype=np.uint8)
        return {"image": image(), "label": Image.fromarray(mask)}

    write_dataset(data / "masks", {"image": pictures, "label": pictures}, masks)
    names = {str(i): name for i, name in enumerate(LABELS)}
    (data / "masks" / "id2label.json").write_text(json.dumps(names), encoding="utf-8")

    def instances(i: int) -> dict[str, Any]:
        mask = np.zeros((IMAGE, IMAGE, 3), dtype=np.uint8)
        mask[:20, :20, :2], mask[30:, 30:, :2] = (1, 1), (2, 2)
        return {
            "image": image(),
            "annotation": Image.fromarray(mask),
            "semantic_class_to_id": {name: k for k, name in enumerate(LABELS)},
        }

    classes = {name: datasets.Value("int64") for name in LABELS}
    columns = {"image": pictures, "annotation": pictures, "semantic_class_to_id": classes}
    write_dataset(data / "instances", columns, instances)


def write_dataset(folder: Path, columns: dict[str, Any], row: Callable[[int], dict[str, Any]]) -> None:
    folder.mkdir()
    features = datasets.Features(columns)
    for split, count in (("train", ROWS), ("validation", 4), ("test", 4)):
        rows = datasets.Dataset.from_list([row(i) for i in range(count)], features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def make_xnli(folder: Path, chance: random.Random) -> None:
    """A dataset with a config, which `load_dataset("xnli", "en")` finds in the working folder."""
    features = {
        "premise": datasets.Value("string"),
        "hypothesis": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
    }
    write_dataset(
        folder,
        features,
        lambda i: {"premise": sentence(chance, 6), "hypothesis": sentence(chance, 4), "label": chance.randrange(3)},
    )
    splits = "".join(f"  - split: {split}\n    path: {split}-*.parquet\n" for split in ("train", "validation", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:\n{splits}---\n")
