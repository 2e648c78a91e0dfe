"""What a preparation made, as a table."""

from rich.console import Console
from rich.table import Table

from .progress import format_bytes
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
        out = [f"{v:,} {k.replace('_', ' ')}" for k, v in s["skipped"].items()]
        if s["duplicates"]:
            out.append(f"{s['duplicates']:,} duplicates")
        shards = sum(e["source"] == name for e in manifest["shards"].values())
        figures = (
            f"{s['documents']:,}",
            f"{s['tokens']:,}",
            format_bytes(s["bytes"]),
            f"{s['validation']['tokens']:,}",
        )
        table.add_row(name, *figures, f"{shards:,}", ", ".join(out) or "nothing")
    console.print(table)
    if done.seconds:
        pace = f"{format_bytes(total / done.seconds)}/s"
        console.print(f"{done.seconds:.1f} s, {pace} of text", highlight=False)
    else:
        console.print("it was there already, complete: nothing to do", highlight=False)
    paths = f"data.paths: ['{done.folder}/train/*.npy']"
    console.print(f"in a run's configuration: {paths}", highlight=False, soft_wrap=True)
