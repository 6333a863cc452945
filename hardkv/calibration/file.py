"""Calibration: temperatures and risk curves per KV head, with their provenance, in memory and in a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hardkv.cache.model import Traits
from hardkv.calibration.summary import summarize
from hardkv.files import replacing
from hardkv.selectors.budgets import RiskCurves
from hardkv.selectors.scorers.scorer import Scorer, scorer_to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "1"
# Fields of a calibration that are tensors.
TENSORS = ("temperatures", "residuals", "counts", "risk", "kept", "key_means", "value_means", "distortion")


def describe_scorer(scorer: Scorer) -> dict[str, Any]:
    """Return a scorer as plain values: its JSON form, or else the path of its class."""
    try:
        return scorer_to_dict(scorer)
    except ValueError:
        return {"class": f"{type(scorer).__module__}.{type(scorer).__qualname__}"}


@dataclass(eq=False)
class Calibration:
    """What `calibrate` measured for a model and a scorer, with L compressed layers and H KV heads.

    Args:
        temperatures: float32 `[L, H]`, by which `TopP` and `Adaptive` divide scores (Logits Calibration).
        residuals: float32 `[L, H]`, the difference between kept mass and reference mass at these temperatures, root
            mean square over the samples.
        counts, risk: the risk curves by which `Risk` divides its budget: `risk [L, H, K]` is the loss of a head that
            keeps `counts [K]` (int64) tokens; see `hardkv.selectors.RiskCurves`. None: temperatures only.
        kept: int64 `[3, L, H]`, the median number of tokens that Top-p keeps: by raw attention, by scores before, and
            by scores after calibration.
        provenance: model ("name", "geometry", "weights": a fingerprint of them, None where they could not be read),
            "layers", "scorer", "window", "sinks", "interval", "p", "texts_hash", "tokens", "length", "versions".
        path: the file it was loaded from or saved to.
        key_means, value_means: float32 `[L, H, D]` and `[L, H, Dv]`, the mean key and value of each head, without the
            first `sinks` tokens of a text. Caches with `bits` below 16 subtract them. None: not measured.
        distortion: float32 `[L, H, 2, 4]`, the loss of a head, in the unit of `risk`, whose keys (0) or values (1) have
            8, 4, 3 or 2 bits. Keys and values add up. `bits="auto"` chooses by it. None: not measured.
    """

    temperatures: Tensor
    residuals: Tensor
    counts: Tensor | None = None
    risk: Tensor | None = None
    kept: Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    key_means: Tensor | None = None
    value_means: Tensor | None = None
    distortion: Tensor | None = None

    @property
    def curves(self) -> RiskCurves:
        """The risk curves in the form that budgets take.

        Raises:
            ValueError: the calibration has none.
        """
        if self.counts is None or self.risk is None:
            raise ValueError("this calibration holds no risk curves: make one with hardkv.calibrate(model)")
        if "_curves" not in self.__dict__:
            self._curves = RiskCurves(self.counts, self.risk)
        return self._curves

    def save(self, path: "str | PathLike[str]") -> Path:
        """Write a safetensors file (no pickle), whole or not at all; make its folder if needed; return the path.

        Raises:
            OSError: the file cannot be written, or the path is something other than a file.
        """
        metadata = {"format": FORMAT, "provenance": json.dumps(self.provenance)}
        # copies, since tensors that share memory are refused
        copies = {name: tensor.cpu().contiguous().clone() for name, tensor in self._tensors().items()}
        with replacing(path) as file:
            file.write(save(copies, metadata))
        self.path = Path(path)
        return self.path

    @classmethod
    def load(cls, path: "str | PathLike[str]") -> "Calibration":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no calibration at {str(path)!r}: make one with hardkv.calibrate(model)")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is not a calibration file: {error}") from error
        if (
            metadata.get("format") != FORMAT
            or "provenance" not in metadata
            or not {"temperatures", "residuals"} <= set(tensors)
        ):
            raise ValueError(f"{str(path)!r} is not a calibration file of this version of hardkv: calibrate again")
        try:
            provenance = json.loads(metadata["provenance"])
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not a calibration file: {error}") from error
        known = {name: tensors.get(name) for name in TENSORS}
        return cls(**known, provenance=provenance, path=path)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return one line with its file, and the model and weights that it was made for."""
        where = "in memory" if self.path is None else str(self.path)
        name, weights = self.provenance.get("name"), self.provenance.get("weights")
        return ", ".join([where, *([f"of {name!r}"] if name else []), *([f"weights {weights}"] if weights else [])])

    def summary(self, budget: int = 512) -> str:
        """Return a table for the terminal: the provenance, and the results per layer.

        Args:
            budget: n of the `Risk(n)` whose counts at the calibrated length are shown.
        """
        return summarize(self, budget)

    def plot(self, path: "str | PathLike[str] | None" = None, budget: int = 512) -> "Figure":
        """Draw the picture of `hardkv.viz.plot_calibration`, which needs matplotlib.

        Args:
            path: where to save it; the suffix chooses the format.
            budget: as in `summary`.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from hardkv.viz.calibration import plot_calibration  # needs matplotlib

        return plot_calibration(self, path, budget)

    def _tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def check_settings(self, scorer: Scorer, window: int) -> None:
        """Raise ValueError unless the calibration was made for this scorer and window."""
        ours = self.provenance
        theirs = {"scorer": describe_scorer(scorer), "window": window}
        self._compare("cache", ours, theirs)

    def check_model(self, config: Any, layers: list[int]) -> str | None:
        """Raise ValueError unless it was made for such a model; return a warning if only the model's name differs.

        Args:
            config: the model's config.
            layers: indices of the layers that the cache compresses.
        """
        ours = {**self.provenance.get("geometry", {}), "layers": self.provenance.get("layers")}
        traits = Traits.of(config)
        self._compare("model", ours, {**traits.geometry, "layers": layers})
        made_for, name = self.provenance.get("name"), traits.name
        if made_for and name and Path(made_for).name != Path(name).name:
            return f"the calibration was made for {made_for!r} and is used with {name!r}"
        return None

    def check_distortion(self) -> None:
        """Raise ValueError unless the loss by fewer bits was measured."""
        if self.distortion is None or self.risk is None:
            raise ValueError(
                f"bits='auto': the calibration {self} did not measure the loss by fewer bits: calibrate again, "
                "hardkv.calibrate(model), without a measure of your own; head dims must be multiples of 8"
            )

    def _compare(self, kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        different = [
            f"{key} {_json(ours.get(key))} here, {_json(value)} in the {kind}"
            for key, value in theirs.items()
            if _json(ours.get(key)) != _json(value)
        ]
        if different:
            source = f"the calibration {str(self.path)!r}" if self.path is not None else "the calibration"
            raise ValueError(
                f"{source} does not fit the {kind} ({'; '.join(different)}): calibrate with these settings, "
                "hardkv.calibrate(model, scorer=..., window=...), or pass calibration=None"
            )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
