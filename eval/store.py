"""Manage the output folder of the harness: settings, and one JSONL per configuration, which later runs continue."""

import json
from pathlib import Path
from typing import Any

from hardkv.files import write_text

SETTINGS = "run.json"
# Settings that may change between two runs into one folder; the results stay comparable.
FREE = ("machines", "budgets")


class Store:
    """One output folder, seen by process `rank`; other ranks write only their own part files.

    Every process appends finished samples to `LABEL.RANK.part`; `merge` moves them into `LABEL.jsonl`.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank

    def open(self, settings: dict[str, Any]) -> None:
        """Begin a run, or continue one with the same settings; keys of `FREE` may differ and are updated.

        Raises:
            ValueError: the folder holds results for other settings.
            OSError: the folder is not writable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.settings() if (self.folder / SETTINGS).exists() else settings
        # as JSON stores them
        new = json.loads(json.dumps(settings))
        different = [name for name in new if name not in FREE and new[name] != found.get(name)]
        if different:
            told = "; ".join(f"{name} {found.get(name)!r} there, {new[name]!r} now" for name in different)
            raise ValueError(f"{self.folder} holds results of other settings ({told}): choose another --out")
        machines = [*found["machines"], *(name for name in new["machines"] if name not in found["machines"])]
        self._write(found | {"machines": machines})
        for label in {_label(path) for path in self.folder.glob("*.part")}:
            self.merge(label)

    def settings(self) -> dict[str, Any]:
        """Return the settings that `open` wrote.

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        path = self.folder / SETTINGS
        if not path.exists():
            raise FileNotFoundError(f"{self.folder} holds no {SETTINGS}: no results of python -m eval.run are there")
        return json.loads(path.read_text())

    def budget(self, text: str, tokens: int) -> int:
        """Return the tokens that a fraction means in this folder; the first use decides."""
        settings = self.settings()
        if text not in settings["budgets"]:
            settings["budgets"][text] = tokens
            self._write(settings)
        return settings["budgets"][text]

    def labels(self) -> list[str]:
        """Return the configurations with results."""
        return sorted(path.stem for path in self.folder.glob("*.jsonl"))

    def records(self, label: str) -> list[dict[str, Any]]:
        """Return the merged samples of a configuration, in the order of problem and sample ids."""
        return _read(self.folder / f"{label}.jsonl")

    def append(self, label: str, records: list[dict[str, Any]]) -> None:
        """Store this process's finished samples."""
        with (self.folder / f"{label}.{self.rank}.part").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def merge(self, label: str) -> None:
        """Move all processes' samples into `LABEL.jsonl`, each sample once."""
        whole = self.folder / f"{label}.jsonl"
        parts = sorted(path for path in self.folder.glob("*.part") if _label(path) == label)
        records = {(record["id"], record["sample"]): record for path in [whole, *parts] for record in _read(path)}
        lines = [json.dumps(record) + "\n" for _, record in sorted(records.items())]
        write_text(whole, "".join(lines))
        for path in parts:
            path.unlink()

    def _write(self, settings: dict[str, Any]) -> None:
        write_text(self.folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _label(part: Path) -> str:
    return part.name.rsplit(".", 2)[0]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # an interrupted process was writing this line; its sample runs again
            break
    return records
