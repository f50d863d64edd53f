"""Run benchmarks.   python -m benchmarks.run [NAME ...] [--small]

Each NAME is a module of this package; its docstring says what it compares. A benchmark checks first that all ways give
equal results, then times them in turn and prints a table. The results go to results/MACHINE/NAME.json, and the tables
of all machines into docs/performance.md. `--small` shrinks everything to seconds, as a test; it writes nothing unless
--out names a folder. Freed memory is kept, as our commands do on a CPU (stage1_tokenizer/engine/processor.py), so that
the peers profit from it too.
"""

import argparse
import json
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.measure import measure_floors
from benchmarks.record import RESULTS, Results, machine, machine_name, write
from stage1_tokenizer.engine import processor

NAMES = ("gpt_decoding", "pixelcnn", "quantizer", "tokenizer", "training_step", "prior_training", "growth")
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


class Benchmark(Protocol):
    """Interface of the modules in NAMES."""

    def measure(self, device: torch.device, small: bool) -> Results:
        """Check that the ways agree, time them, and return results that JSON can hold. Prints progress."""
        ...

    def table(self, results: Results) -> str:
        """Return results of `measure`, from any machine, as Markdown."""
        ...


def benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name."""
    module: Benchmark = import_module(f"benchmarks.{name}")
    return module


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run: {', '.join(NAMES)}; default: all")
    parser.add_argument("--small", action="store_true", help="run everything in tiny sizes, as a test")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, even if there is a GPU")
    parser.add_argument("--out", type=Path, help="folder for the JSON files; default: benchmarks/results/MACHINE")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing; write the tables in docs/performance.md again"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    if options.tables:
        write_tables()
        return
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    processor.keep_freed_memory()
    print(f"{machine_name()}: {machine()}")
    folder = options.out or (None if options.small else RESULTS / machine_name())
    for name in options.names or NAMES:
        began = time.perf_counter()
        floors = measure_floors(device, options.small)
        print(f"\n== {name}\n{floors.text()}", flush=True)
        module = benchmark(name)
        results = {"floors": floors.row(), **module.measure(device, options.small)}
        results["took_s"] = round(time.perf_counter() - began)
        print(f"\n{table(name, results)}\n{results['took_s']} s", flush=True)
        if folder is not None:
            print(f"written: {write(folder, name, results)}")
    if folder is not None and folder.parent == RESULTS:
        write_tables()


def write_tables() -> None:
    """Write the tables of all committed results between the marks in docs/performance.md."""
    page = PAGE.read_text(encoding="utf-8")
    for name in NAMES:
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"{PAGE} has no {begin.strip()} ... {end}"
        page = before + begin + "\n" + "\n".join(tables(name)) + "\n" + end + after
    PAGE.write_text(page, encoding="utf-8")


def table(name: str, results: Results) -> str:
    """Return the results of a benchmark as Markdown, with a table for each size."""
    return "\n\n".join(benchmark(name).table(each) for each in (results, results.get("second")) if each)


def tables(name: str) -> list[str]:
    """Return a piece of Markdown for each machine on which the benchmark ran."""
    pieces = []
    for path in sorted(RESULTS.glob(f"*/{name}.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        on = results["machine"]
        floors = results["floors"]
        bfloat16 = f"{floors['bfloat16_gflops']:,.0f}" if floors["bfloat16_gflops"] else "emulated"
        pieces.append(
            f"**{on.get('gpu', on['processor'])}** ({on['instructions']}, {on['threads']} threads, "
            f"torch {on['torch']}; floors: {floors['float32_gflops']:,.0f} GFLOP/s float32, {bfloat16} bfloat16, "
            f"{floors['memory_gb_per_s']:,.0f} GB/s; {results['took_s']} s)\n\n{table(name, results)}\n"
        )
    return pieces


if __name__ == "__main__":
    main()
