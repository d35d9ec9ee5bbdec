"""Adapters by name: in memory the most recently used ones, all of them on disk."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyper_t5 import adapters as ad
from hyper_t5.inference.predictor import Adapter, Predictor
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RECORD = "served.json"  # in an adapter's folder: its digest, and the seconds it took


def check_name(name: str) -> str:
    """Return a valid adapter name; UserError for one that could leave its folder."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"adapter name {name[:60]!r}: use letters, digits, '.', '_' and '-', at most 128"
        )
    return name


def task_digest(checkpoint: str, task: dict[str, Any], settings: str = "") -> str:
    """Return the key of a generated adapter: of the checkpoint, the task's text and settings."""
    content = json.dumps([checkpoint, task, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class AdapterStore:
    """The adapters of a server; used from any thread.

    Args:
      predictor: checks that a loaded adapter belongs to the backbone.
      folder: where each adapter has a folder of its name.
      most: adapters that stay in memory.
    """

    def __init__(self, predictor: Predictor, folder: Path, most: int) -> None:
        self._predictor, self._folder, self._most = predictor, folder, most
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._folders: dict[str, Path] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()
        for path in sorted(folder.glob(f"*/{RECORD}")):
            if NAME.fullmatch(path.parent.name):
                self._folders[path.parent.name] = path.parent
                self._records[path.parent.name] = files.read_json(path)

    def names(self) -> list[str]:
        """Return the names of all adapters."""
        with self._lock:
            return sorted(self._folders)

    def get(self, name: str) -> Adapter | None:
        """Return an adapter, read again from disk where it is no longer in memory."""
        with self._lock:
            if name not in self._folders:
                return None
            if name not in self._loaded:
                self._loaded[name] = self._predictor.load_adapter(self._folders[name])
            self._loaded.move_to_end(name)
            while len(self._loaded) > self._most:
                self._loaded.popitem(last=False)
            return self._loaded[name]

    def find(self, digest: str) -> str:
        """Return the name of the adapter generated with a digest; '' for none."""
        with self._lock:
            records = self._records.items()
            return next((name for name, r in records if r.get("digest") == digest), "")

    def add(self, name: str, adapter: Adapter, record: dict[str, Any]) -> None:
        """Add a generated adapter, or replace the one of this name."""
        with self._lock:
            folder = self._folder / check_name(name)
            new = self._folder / f".{name}.new"  # no adapter's name: a kill leaves the old one
            shutil.rmtree(new, ignore_errors=True)
            adapter.save(new)
            files.write_json(new / RECORD, record)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
            self._folders[name], self._records[name] = folder, record
            self._loaded.pop(name, None)

    def load(self, name: str, folder: Path) -> Adapter:
        """Add a native adapter folder, which stays where it is.

        Raises:
          UserError: damaged, of another backbone, or not finite.
        """
        adapter = self._predictor.load_adapter(folder)
        with self._lock:
            self._folders[check_name(name)], self._records[name] = folder, {}
            self._loaded.pop(name, None)
        return adapter

    def remove(self, name: str) -> bool:
        """Forget an adapter; delete its folder where the server made it."""
        with self._lock:
            folder = self._folders.pop(name, None)
            self._loaded.pop(name, None)
            self._records.pop(name, None)
            if folder is not None and folder.parent == self._folder:
                shutil.rmtree(folder, ignore_errors=True)
            return folder is not None

    def describe(self, name: str) -> dict[str, Any]:
        """Return an adapter's facts: kind, size, norm by layer, what it was made of."""
        adapter = self.get(name)
        assert adapter is not None
        record = self._records.get(name, {})
        spec = adapter.adapters.spec
        kinds = [k for k in ("lora", "prefix", "bottleneck", "memory") if getattr(spec, k)]
        return {
            "name": name,
            "kind": "+".join(kinds) or ("text" if adapter.meta.get("text") else "none"),
            "parameters": ad.parameters_per_task(adapter.adapters),
            "bytes": sum(np.asarray(x).nbytes for x in jax.tree.leaves(adapter.adapters.tree)),
            "layer_norms": _layer_norms(adapter),
            "instruction": adapter.meta.get("instruction", ""),
            "examples_shown": adapter.meta.get("examples_shown", 0),
            "seconds": record.get("seconds", 0.0),
        }


def _layer_norms(adapter: Adapter) -> list[float]:
    """Return the L2 norm of each layer's parameters, the encoder's before the decoder's."""
    squares: dict[tuple[str, int], float] = {}
    for site, content in adapter.adapters.tree.items():
        if site == ad.MEMORY:
            continue
        for leaf in (x for x in jax.tree.leaves(content) if x.dtype != bool):
            for layer, x in enumerate(np.asarray(leaf, np.float64)):
                key = ("decoder" if site.startswith("dec") else "encoder", layer)
                squares[key] = squares.get(key, 0.0) + float(np.square(x).sum())
    order = sorted(squares, key=lambda key: (key[0] == "decoder", key[1]))
    return [squares[key] ** 0.5 for key in order]
