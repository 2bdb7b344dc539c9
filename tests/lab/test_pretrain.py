"""The shipped model, and the script that makes it."""

import json
from pathlib import Path

import fednano.models
import numpy as np
import pytest
import torch
from fednano.lab.pretrain import Settings, answer_loss, normalised, pack, pretrain
from fednano.lab.pretrain_report import accuracy, answers, load, prints, scenes
from fednano.lab.renders import HELD_OUT_FONTS, TRAIN_FONTS, render
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

SHIPPED = Path(fednano.models.__file__).parent / "tiny_llava"


@pytest.fixture(scope="module")
def shipped():
    return load(SHIPPED)


def test_the_shipped_model_reads_fonts_it_never_saw_whatever_is_asked(shipped):
    right = accuracy(*shipped, prints(images=200, seed=1))
    assert len(right) == 7
    assert np.mean(list(right.values())) >= 0.95, right
    assert min(right.values()) >= 0.92, right  # 200 renders scatter by 0.015 about the card's 0.957


def test_the_model_card_claims_95_percent_of_every_question_about_unseen_fonts():
    figures = json.loads((SHIPPED / "figures.json").read_text())["figures"]
    right = [share for name, share in figures.items() if name.startswith("held-out fonts/")]
    assert len(right) == 7
    assert min(right) >= 0.95


def test_the_shipped_model_describes_scenes(shipped):
    right = accuracy(*shipped, scenes(images=100, seed=1))
    assert min(right.values()) >= 0.8, right  # the card: 0.87 or more


def test_the_shipped_model_is_a_stock_llava(shipped):
    model, _ = shipped
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.num_parameters() < 4_000_000


def test_answers_can_have_several_words(shipped):
    picture = next(p for p in render(50, seed=5) if len(p.things) == 2)
    asked = [(Image.fromarray(picture.pixels), "Describe the picture.")]
    left, right = picture.things
    assert answers(*shipped, asked) == [
        f"a {left.colour} {left.noun} and a {right.colour} {right.noun}"
    ]


def test_the_chat_template_puts_the_image_where_the_message_has_it(shipped):
    content = [{"type": "image"}, {"type": "text", "text": "What digit is this?"}]
    turn = [{"role": "user", "content": content}]
    prompt = shipped[1].apply_chat_template(turn, add_generation_prompt=True)
    assert prompt == "<user><image>What digit is this?<assistant>"


def test_words_out_of_the_vocabulary_degrade_to_unk():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert tokenizer.tokenize("Quel CIRCLE, 42?") == ["<unk>", "circle", ",", "4", "2", "?"]


def test_packed_questions_are_worth_the_same_as_single_ones(shipped):
    model, _ = shipped
    pixels = normalised(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8))
    asked = [("What digit is this?", "seven"), ("Is it even?", "no"), ("Name the digit.", "two")]
    together = answer_loss(model, pixels, pack([asked]))
    apart = [answer_loss(model, pixels, pack([[one]])) for one in asked]
    assert together.item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-4)


def test_renders_are_functions_of_their_seed():
    first, again, other = (render(3, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].pixels, other[0].pixels)


def test_held_out_fonts_are_not_trained_on():
    assert not set(HELD_OUT_FONTS) & set(TRAIN_FONTS)


def test_a_short_pre_training_gives_a_model_that_loads(tmp_path):
    settings = Settings(
        images=20, steps_1=2, steps_2=2, steps_3=2, batch_1=4, batch_2=4, eval_images=5
    )
    figures = pretrain(tmp_path, settings, device="cpu", workers=1)
    model, processor = load(tmp_path)
    assert len(answers(model, processor, [(Image.new("RGB", (50, 40)), "Hello?")])) == 1
    assert all(0 <= share <= 1 for share in figures.values())
    assert "| handwriting test | mean |" in (tmp_path / "README.md").read_text()
