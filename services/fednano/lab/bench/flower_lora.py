"""PEFT LoRA on a whole LLaVA, as a client without a split trains it: runs in Flower's environment and
imports nothing of ours. The loss, the prompts and the optimiser are those of this project's trainer."""

# mypy: ignore-errors

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
_IGNORED = -100


class Examples:
    """What was written for this side: images, and by name lists of (image, question, answer)."""

    def __init__(self, folder):
        with np.load(Path(folder) / "images.npz") as found:
            self.images = [Image.fromarray(pixels) for pixels in found["images"]]
        self.asked = json.loads((Path(folder) / "asked.json").read_text())

    def __getitem__(self, name):
        return [
            (self.images[image], question, answer) for image, question, answer in self.asked[name]
        ]


class WholeModel:
    """The checkpoint with its LoRA: rank `rank` on the LLM's attention projections."""

    def __init__(self, directory, rank, alpha, seed):
        disable_progress_bar()
        torch.set_num_threads(1)
        torch.manual_seed(seed)  # of A; B is zero
        self.processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
        stock = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=_TARGETS)
        self.model = get_peft_model(stock, config).eval()  # nothing here acts otherwise in training
        self._prompts = {}

    @property
    def lora(self):
        return OrderedDict(get_peft_model_state_dict(self.model))

    @lora.setter
    def lora(self, tensors):
        set_peft_model_state_dict(self.model, tensors)

    def train(self, epochs, learning_rate, batch_size, max_grad_norm):
        """AdamW over each epoch's examples in their order; the last epoch's mean loss."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=0.0)
        for examples in epochs:
            losses = []
            for chosen in _batches(examples, batch_size):
                loss = self._loss(chosen)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
                optimizer.step()
                losses += [loss.item()] * len(chosen)
        return sum(losses) / len(losses)

    def accuracy(self, examples, max_new_tokens, batch_size=64):
        """Exact match of greedily generated answers."""
        hits = 0
        for chosen in _batches(examples, batch_size):
            for answer, (_, _, wanted) in zip(
                self._answers(chosen, max_new_tokens), chosen, strict=True
            ):
                hits += answer.strip().casefold() == wanted.strip().casefold()
        return hits / len(examples)

    def _loss(self, chosen):
        """The batch's mean of each sample's mean over the answer's tokens and its end."""
        rows, labels = [], []
        for _, question, answer in chosen:
            prompt, wanted = self._prompt_ids(question), self._answer_ids(answer)
            rows.append(torch.tensor(prompt + wanted))
            labels.append(torch.tensor([_IGNORED] * len(prompt) + wanted))
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id
        )
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, True, _IGNORED)
        logits = self.model(
            input_ids=ids, attention_mask=mask, pixel_values=self._pixels(chosen), use_cache=False
        ).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), wanted[:, 1:], ignore_index=_IGNORED, reduction="none"
        )
        return (each.sum(1) / (wanted[:, 1:] != _IGNORED).sum(1)).mean()

    @torch.inference_mode()
    def _answers(self, chosen, max_new_tokens):
        fed = self.processor(
            images=[image for image, _, _ in chosen],
            text=[self._prompt(question) for _, question, _ in chosen],
            return_tensors="pt",
            padding=True,
        )
        made = self.model.generate(**fed, do_sample=False, max_new_tokens=max_new_tokens)
        new = made[:, fed["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)

    def _pixels(self, chosen):
        images = [image for image, _, _ in chosen]
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def _prompt(self, question):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True)

    def _prompt_ids(self, question):
        """With a placeholder for each of the image's vectors; tokenised once."""
        if question not in self._prompts:
            blank = Image.new("RGB", (32, 32))  # for its count of vectors alone
            fed = self.processor(images=[blank], text=[self._prompt(question)])
            self._prompts[question] = list(fed["input_ids"][0])
        return self._prompts[question]

    def _answer_ids(self, answer):
        tokenizer = self.processor.tokenizer
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]


def _batches(examples, size):
    return [examples[start : start + size] for start in range(0, len(examples), size)]
