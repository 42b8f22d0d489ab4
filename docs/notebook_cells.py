"""The notebook without Jupyter: run its code cells, keep what they give, and show it as a page.

    python docs/notebook_cells.py docs/notebook.ipynb

runs the code cells one after another in a fresh process, and writes what they print and draw into the notebook.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

Cell = dict[str, Any]


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook as its file has it."""
    return json.loads(path.read_text())


def run_cells(cells: list[Cell]) -> None:
    """Run the code cells in one namespace, and give each what it printed and what its last expression is."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
    for count, cell in enumerate(code_cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _run(_read_source(cell), f"cell {count}", names)

        cell["execution_count"] = count
        cell["outputs"] = []
        if printed.getvalue():
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
        if value is not None:
            cell["outputs"].append(_show(value, count))


def _run(source: str, name: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value is that of its last line, where that is an expression."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return eval(compile(ast.Expression(last.value), name, "eval"), names) if last else None


def _show(value: Any, count: int) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if hasattr(value, "savefig"):
        drawn, few_colours = io.BytesIO(), io.BytesIO()
        value.savefig(drawn, format="png", dpi=90)
        Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(few_colours, "png", optimize=True)
        data = {"image/png": base64.b64encode(few_colours.getvalue()).decode(), "text/plain": ["a figure"]}
    return {"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"}


def format_page(path: Path) -> str:
    """The notebook as Markdown: texts, code, and what the code gave when it was last run."""
    parts = []
    for cell in read_notebook(path)["cells"]:
        source = _read_source(cell)
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_format_output(output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def _format_output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "image/png" in data:
        return f'<img alt="what the cell draws" src="data:image/png;base64,{data["image/png"].strip()}">'
    return "```text\n" + "".join(data["text/plain"]).rstrip() + "\n```"


def _read_source(cell: Cell) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="run it, and write nothing")
    args = parser.parse_args()

    notebook = read_notebook(args.notebook)
    run_cells(notebook["cells"])
    if not args.check:
        args.notebook.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
