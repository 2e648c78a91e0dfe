"""What a preparation made, as a table."""

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .run import Preparation


def show(done: Preparation, console: Console) -> None:
    """Print documents, tokens and bytes of every source, and what was left out."""
    manifest = done.manifest
    table = Table(title=f"{done.folder} ({manifest['tokenizer']['name']}, {manifest['dtype']})", title_justify="left")
    for heading in ("source", "documents", "tokens", "text", "validation tokens", "shards", "left out"):
        table.add_column(heading, justify="left" if heading in ("source", "left out") else "right")
    total = 0
    for name, s in manifest["sources"].items():
        total += s["bytes"]
        left_out = {**s["skipped"], "duplicates": s["duplicates"]}
        left_out_text = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in left_out.items() if n) or "nothing"
        shards = sum(e["source"] == name for e in manifest["shards"].values())
        documents, tokens, validation = s["documents"], s["tokens"], s["validation"]["tokens"]
        table.add_row(
            name, f"{documents:,}", f"{tokens:,}", decimal(s["bytes"]), f"{validation:,}", f"{shards:,}", left_out_text
        )
    console.print(table)
    if done.seconds:
        console.print(f"{done.seconds:.1f} s, {decimal(int(total / done.seconds))}/s of text", highlight=False)
    else:
        console.print("it was there already, complete: nothing to do", highlight=False)
    console.print(
        f"in a run's configuration: data.paths: ['{done.folder}/train/*.npy']", highlight=False, soft_wrap=True
    )
