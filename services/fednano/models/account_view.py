"""An account as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fednano.models.account import Account, Size
from fednano.models.account_traffic import Traffic


def show(found: Account) -> None:
    """On standard output."""
    console = Console(highlight=False)
    for table in (_halves(found), _trained(found), _traffic(found)):
        console.print(table)
    for line in _notes(found):
        console.print(line, soft_wrap=True)


def _halves(found: Account) -> Table:
    sizes = found.sizes
    table = Table(title=f"{sizes.name} in {sizes.dtype}, cut in two", title_justify="left")
    table.add_column("part")
    for name in ("parameters", "share", "bytes"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Size]] = [("edge half", sizes.edge)]
    rows += [(f"  {part}", size) for part, size in sizes.edge_parts.items()]
    rows += [("LLM half", sizes.llm), ("  embedding table", sizes.embedding_table)]
    rows += [("whole", sizes.whole)]
    for name, size in rows:
        share = size.parameters / sizes.whole.parameters
        table.add_row(name, f"{size.parameters:,}", f"{share:.2%}", decimal(size.bytes))
    return table


def _trained(found: Account) -> Table:
    table = Table(title="What is trained, and exchanged every round in fp32", title_justify="left")
    table.add_column("method")
    for name in ("parameters", "share", "bytes", "client holds"):
        table.add_column(name, justify="right")
    plan = found.plan
    adapters = f"NanoAdapters, rank {plan.rank}, {' and '.join(plan.modalities)}"
    lora = f"LoRA in the LLM, rank {plan.lora_rank}, {plan.lora_targets}"
    for name, row in ((adapters, found.adapters), (lora, found.lora)):
        size, held = row.trained, decimal(row.client_bytes)
        table.add_row(name, f"{size.parameters:,}", f"{row.share:.4%}", decimal(size.bytes), held)
    return table


def _traffic(found: Account) -> Table:
    plan = found.plan
    tokens = plan.prompt_tokens + (plan.image_tokens or 0) + plan.answer_tokens
    title = (
        f"One client's traffic, batches of {plan.batch_size} x {tokens:,} tokens in"
        f" {plan.wire_dtype}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("wire")
    table.add_column("per")
    for name in ("sent", "received"):
        table.add_column(name, justify="right")
    adapters = found.adapters.traffic
    for name, wire in (("dense", found.dense), ("factored", found.factored)):
        if wire.once.total:
            table.add_row(name, "run, at most", *_cells(wire.once))
        for span, traffic in (("step", wire.step), ("epoch", wire.epoch), ("round", wire.round)):
            table.add_row(name, span, *_cells(traffic))
        table.add_row("", "of it adapters", *_cells(adapters), end_section=True)
    table.add_row("none: LoRA", "round", *_cells(found.lora.traffic))
    return table


def _cells(traffic: Traffic) -> tuple[str, str]:
    return decimal(traffic.bytes_sent), decimal(traffic.bytes_received)


def _notes(found: Account) -> list[str]:
    sizes, paper = found.sizes, found.paper
    plan, pays = found.plan, found.pays_after_epochs
    when = "never pay" if pays is None else f"have paid after {pays:.2f} epochs or before"
    table = decimal(sizes.embedding_table.bytes)
    return [
        f"An epoch is {plan.samples:,} samples; a round is {plan.epochs} of them, adapters, and what"
        f" the Fisher costs ({plan.fisher}).",
        f"The factored wire's uploads {when}, both directions taken together.",
        f"Without the embedding table ({table}) a client asks for a row of"
        f" {decimal(sizes.embedding_row_bytes)} once for every distinct text token.",
        f"As FedNano counts: encoder {paper.encoder_parameters:,}, with adapters"
        f" {paper.client_parameters:,} ({paper.client_share:.1%}); upload"
        f" {paper.upload_parameters:,} ({paper.upload_share:.2%}).",
    ]
