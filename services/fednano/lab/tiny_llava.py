"""The architecture of the embedded model: a genuine LLaVA that is small enough to ship.

CLIP vision tower (32 px, patches of 8 px, so 16 tokens), two-layer projector, Llama with tied
embeddings; words are the vocabulary. Everything is stock Hugging Face, so that the model is cut,
served, tuned and exported by the same code as LLaVA-1.5.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fednano.client.digits import SIDE, WORDS
from fednano.lab.renders import COLOURS, SHAPES

PATCH = 8  # pixels
IMAGE_TOKENS = (SIDE // PATCH) ** 2
WIDTH = 128
SPECIAL = ("<pad>", "<unk>", "</s>", "<image>", "<user>", "<assistant>")
PAD, UNK, EOS, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
# Words of the questions and answers of pre-training, then words a reader is likely to type; the
# latter are untrained, and whatever is in neither list becomes <unk>.
_TRAINED = (
    "a and colour describe digit even four greater in is it no numeral picture shape than the "
    "there this what write yes as which name"
)
_SPARE = (
    "an are bottom color count dark how image left letter light many not number "
    "object odd of on or left right say see show small large smaller less tell that to top "
    "with word you can please"
)
_PUNCTUATION = ". , ? ! : ; ' -"
# <image> stands wherever the picture is in the message; a turn of the assistant ends in </s>.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)


def build_model(vocabulary: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model; seed torch before."""
    model = LlavaForConditionalGeneration(_config(vocabulary))
    # CLIP's own initialisation (0.02) hides from the small tower where a patch lies.
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    torch.nn.init.normal_(positions, std=0.3)
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=16, do_sample=False
    )
    return model


def build_processor() -> LlavaProcessor:
    """Image processor (PIL, without torchvision), tokenizer and chat template."""
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=half,
        image_std=half,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words in lower case, digits and punctuation one by one, <unk> for the rest."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *_words()))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image>",
            "user_token": "<user>",
            "assistant_token": "<assistant>",
        },
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write weights (fp16), configuration, tokenizer, processor and chat template."""
    out.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config)
    half.generation_config = model.generation_config
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    build_processor().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    _name_the_tokenizer_class(out / "tokenizer_config.json")


def _name_the_tokenizer_class(path: Path) -> None:
    """Under the name that every release of transformers knows; 5 writes its backend's."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def _words() -> list[str]:
    numerals = "0123456789"
    listed = [*WORDS, *numerals, *COLOURS, *SHAPES]
    listed += _TRAINED.split() + _SPARE.split() + _PUNCTUATION.split()
    return list(dict.fromkeys(listed))


def _config(vocabulary: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
