"""Write the inventories of docs/_static/inventories: names of other libraries that the manual links, and their pages.

    python docs/inventories.py

Sphinx reads an inventory instead of asking the site of a library, so that the build fetches nothing. An inventory has
the names below only; their addresses follow the rules of each site.
"""

from __future__ import annotations

import zlib
from pathlib import Path

FOLDER = Path(__file__).parent / "_static" / "inventories"
SITES = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "sklearn": "https://scikit-learn.org/stable/",
}
MODULES = {
    "torch": {
        "torch.nn": "nn.html", "torch.optim": "optim.html", "torch.func": "func.html", "torch.export": "export.html",
        "torch.distributed": "distributed.html", "torch.utils.data": "data.html",
    }
}  # fmt: skip
LAYERS = "Module Linear Sequential Conv2d Embedding Dropout BatchNorm2d LayerNorm LSTM"
OPTIMIZERS = "SGD Adam AdamW RAdam NAdam RMSprop Adamax Adagrad Adadelta"
PAGES = {  # names with a page of their own, and the folder of these pages
    "torch": (
        "generated",
        *(f"torch.nn.{n}" for n in LAYERS.split()),
        *(f"torch.optim.{n}" for n in OPTIMIZERS.split()),
        *("torch.sum", "torch.vmap", "torch.Generator"),
    ),
    "numpy": ("reference/generated", "numpy.ndarray", "numpy.memmap", "numpy.random.Generator"),
    "sklearn": (
        "modules/generated", "sklearn.linear_model.LogisticRegression", "sklearn.model_selection.GridSearchCV",
        "sklearn.pipeline.Pipeline", "sklearn.preprocessing.StandardScaler", "sklearn.preprocessing.OneHotEncoder",
    ),
}  # fmt: skip
OTHERS = {
    "torch": {
        "torch.Tensor": "tensors.html#torch.Tensor",
        "torch.utils.data.Dataset": "data.html#torch.utils.data.Dataset",
        "torch.utils.data.DataLoader": "data.html#torch.utils.data.DataLoader",
    }
}
# How the manual writes a name, and the name.
ALIASES = {
    "Tensor": "torch.Tensor", "Dataset": "torch.utils.data.Dataset", "DataLoader": "torch.utils.data.DataLoader",
    "np.memmap": "numpy.memmap",
}  # fmt: skip


def addresses(library: str) -> dict[str, str]:
    """The address of each name of a library, relative to its site."""
    folder, *names = PAGES[library]
    pages = {name: f"{folder}/{name}.html#{name}" for name in names}
    modules = {name: f"{page}#module-{name}" for name, page in MODULES.get(library, {}).items()}
    return pages | modules | OTHERS.get(library, {})


def target(text: str) -> str | None:
    """The full name that a piece of code stands for; None if it is no name of an inventory.

    >>> target("nn.Module"), target("torch.optim.SGD"), target("run.path")
    ('torch.nn.Module', 'torch.optim.SGD', None)
    """
    full = f"torch.{text}" if text.startswith("nn.") else ALIASES.get(text, text)
    return full if any(full in addresses(library) for library in SITES) else None


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for library in SITES:
        kinds = {name: "module" for name in MODULES.get(library, {})}
        lines = (f"{n} py:{kinds.get(n, 'class')} 1 {a} -\n" for n, a in sorted(addresses(library).items()))
        head = f"# Sphinx inventory version 2\n# Project: {library}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        (FOLDER / f"{library}.inv").write_bytes(head.encode() + zlib.compress("".join(lines).encode(), 9))


if __name__ == "__main__":
    main()
