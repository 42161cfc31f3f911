"""Runs the notebooks and stores them with their figures: `python -m notebooks.execute`."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def execute(path: Path, parameters: str | None = None) -> NotebookNode:
    """Runs a notebook from top to bottom, in a fresh kernel on the CPU.

    Args:
      path: of the notebook, which is left as it is.
      parameters: source in place of that of the cell tagged "parameters".

    Returns:
      The notebook with its outputs.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters is not None:
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
        cell.source = parameters
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False)
    return client.execute(env={**os.environ, "JAX_PLATFORMS": "cpu"})


def without_noise(notebook: NotebookNode) -> NotebookNode:
    """What differs between machines and editors, and not between runs, taken out."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    for index, cell in enumerate(notebook.cells):
        cell.id = f"{index:02}"
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
    return notebook


def main() -> None:
    for path in NOTEBOOKS:
        print(path.name, flush=True)
        nbformat.write(without_noise(execute(path)), path)


if __name__ == "__main__":
    main()
