"""The results of a run as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_llm.serving.bench.metrics import PERCENTILES

ROWS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end to end",
}


def render(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what `lightning-llm bench serve` has measured."""
    console = console or Console(highlight=False)
    console.print(Text(_headline(results)), soft_wrap=True)
    console.print(throughputs_of(results))
    console.print(latencies_of(results))
    for error, times in results["errors"].items():
        console.print(Text(f"{times} times: {error}"), soft_wrap=True)


def throughputs_of(results: Mapping[str, Any]) -> Table:
    """Counts and what was done in a second."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("requests", f"{results['completed']:,}"),
        ("failed", f"{results['failed']:,}"),
        ("seconds", f"{results['duration']:,.2f}"),
        ("prompt tokens", f"{results['total_input_tokens']:,}"),
        ("output tokens", f"{results['total_output_tokens']:,}"),
        ("requests/s", f"{results['request_throughput']:,.2f}"),
        ("output tokens/s", f"{results['output_throughput']:,.1f}"),
        ("tokens/s", f"{results['total_token_throughput']:,.1f}"),
        ("this client, cores", f"{results['client_cpu']:.2f}"),
    ):
        table.add_row(name, value)
    if results["request_goodput"] is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in results["goodput"].items())
        table.add_row(f"good requests/s ({limits})", f"{results['request_goodput']:,.2f}")
    return table


def latencies_of(results: Mapping[str, Any]) -> Table:
    """A row for each latency."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    columns = ["mean", *(f"p{percent}" for percent in PERCENTILES)]
    for column in columns:
        table.add_column(column, justify="right")
    for name, words in ROWS.items():
        values = [results[f"{column}_{name}_ms"] for column in columns]
        table.add_row(f"{words} ({name.upper()})", *("-" if one is None else f"{one:,.1f}" for one in values))
    return table


def _headline(results: Mapping[str, Any]) -> str:
    many = results["max_concurrency"]
    rate = results["request_rate"]
    load = f"{many} at a time" if many else "all at once" if rate == "inf" else f"{rate} a second"
    return f"{results['model_id']} at {results['url']}: {results['dataset']}, {load}"
