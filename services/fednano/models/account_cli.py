"""`fednano account`: what a model would cost its clients."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fednano.models.account_options import Adapted, Fisher, LoraTargets, Plan, WireDType
from fednano.models.cli import AsJson


def account_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's directory, a hub id, or tiny-llava, llava-1.5-7b, llava-1.5-13b."
        ),
    ],
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Of the NanoAdapters.")] = 64,
    modality: Annotated[
        list[Adapted] | None,
        typer.Option(help="That has an adapter; may be repeated.", show_default="image and text"),
    ] = None,
    fisher: Annotated[
        Fisher,
        typer.Option(
            help="When it is estimated: last-epoch for fednano-ef, extra-pass for fednano,"
            " none for what merges without."
        ),
    ] = Fisher.LAST_EPOCH,
    batch_size: Annotated[int, typer.Option(min=1, max=4096)] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of text before the answer.")] = 100,
    image_tokens: Annotated[
        int | None, typer.Option(min=0, help="Of a sample.", show_default="of one image")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="With the end token.")] = 24,
    samples: Annotated[int, typer.Option(min=1, help="Of one client.")] = 1000,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Local ones in a round.")] = 1,
    wire_dtype: Annotated[
        WireDType, typer.Option(help="Of embeddings and gradients.")
    ] = WireDType.FP16,
    lora_rank: Annotated[
        int, typer.Option(min=1, max=1024, help="Of LoRA on the whole model.")
    ] = 64,
    lora_targets: Annotated[
        LoraTargets, typer.Option(help="The LLM's query and value layers, or all linear ones.")
    ] = LoraTargets.QUERY_VALUE,
    as_json: AsJson = False,
) -> None:
    """What a model costs its clients: parameters, memory and bytes, from its configuration alone."""
    from fednano.models.account import MetaModel, account
    from fednano.models.account_view import show

    plan = Plan(
        rank=rank,
        modalities=tuple(dict.fromkeys(modality or Adapted)),
        fisher=fisher,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        image_tokens=image_tokens,
        answer_tokens=answer_tokens,
        samples=samples,
        epochs=epochs,
        wire_dtype=wire_dtype,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
    )
    found = account(MetaModel(model), plan)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        show(found)
