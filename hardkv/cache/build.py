"""Build the layers of a cache: choose the layers to compress, give each its budget, and collect warnings."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.model import Traits
from hardkv.cache.storage.codec import token_nbytes
from hardkv.cache.storage.offload import Offload
from hardkv.calibration.file import Calibration
from hardkv.config import HardKVConfig
from hardkv.selectors.budgets import Budget, Risk
from hardkv.selectors.budgets.bits import CHOICES

# Takes settings, budget, layer_idx, and the number of linear-attention states that the layer holds besides its keys.
LayerFactory = Callable[[HardKVConfig, Budget, int, int], HardKVLayer]

# Layers of DynamicCache that keep every token (these are replaced), and layers that keep only the newest tokens.
FULL = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
SLIDING = (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)


def make_layer(settings: HardKVConfig, budget: Budget, layer_idx: int, states: int) -> HardKVLayer:
    """Make a layer; the `LayerFactory` of HardKVCache."""
    if states:
        return HybridLayer(settings, budget, layer_idx, states)
    return HardKVLayer(settings, budget, layer_idx)


def build_layers(
    traits: Traits,
    settings: HardKVConfig,
    layers: Sequence[Any],
    offload: Offload | None,
    make: LayerFactory,
    warn: Callable[[str], None],
    model: Any = None,
) -> list[Any]:
    """Return the layers of a cache that knows its model. Replace a calibration "auto" in `settings` by a `Calibration`.

    Args:
        traits: of the model. settings: of the cache.
        layers: DynamicCache's layer for every layer of the model. Those with full attention are replaced.
        offload: keeps compressed layers in host memory; None without. make: makes a compressed layer.
        warn: receives warnings for the user. model: the model that calibration "auto" measures.

    Raises:
        ValueError: the bits do not suit the model; or the calibration is "auto" without a model, or was made for
            another model; or the budget does not fit the number of layers.
    """
    cross = traits.cross_attention_layers
    if traits.latent and settings.bits != 16:
        raise ValueError(
            f"bits={settings.bits}: {type(traits.config).__name__} has latent attention (MLA), whose latents are not "
            "quantised: use bits=16"
        )
    full = [idx for idx, layer in enumerate(layers) if type(layer) in FULL and idx not in cross]
    if settings.calibration == "auto":
        from hardkv.calibration.auto import auto  # imported here, because it imports this file

        settings.calibration = auto(model, settings, warn)
    elif isinstance(settings.calibration, Calibration) and (
        warning := settings.calibration.check_model(traits.config, full)
    ):
        warn(warning)
    calibration, built = settings.calibration, list(layers)
    budgets, bits = (
        _with_bits(settings, traits, full) if settings.bits == "auto" else (_budgets(settings, len(full)), None)
    )
    for rank, (idx, budget) in enumerate(zip(full, budgets, strict=True)):
        layer = make(settings, budget, idx, getattr(layers[idx], "number_of_states", 0))
        layer.first, layer.offloading = rank == 0, offload
        layer.bits = layer.bits if bits is None else bits[rank]
        layer.shared, layer.latent = traits.shares_keys, traits.latent
        if isinstance(calibration, Calibration) and budget.uses_temperature:
            layer.temperatures = calibration.temperatures[rank]
        if isinstance(calibration, Calibration) and calibration.key_means is not None:
            assert calibration.value_means is not None
            layer.means = calibration.key_means[rank], calibration.value_means[rank]
        built[idx] = layer
    if warning := _not_compressed(traits, layers):
        warn(warning)
    return built


def build_unknown_layer(
    layer_idx: int, settings: HardKVConfig, offload: Offload | None, make: LayerFactory
) -> HardKVLayer:
    """Return layer `layer_idx` of a cache that does not know its model. It is assumed to use full attention."""
    layer = make(settings, _budgets(settings, None)[0], layer_idx, 0)
    layer.first, layer.offloading, layer.knows_model = layer_idx == 0, offload, False
    return layer


def check_unknown(settings: HardKVConfig) -> None:
    """Raise ValueError for a calibration or a budget that needs to know the model."""
    if settings.calibration not in (None, "online"):
        which = "config=model" if settings.calibration == "auto" else "config=model.config"
        raise ValueError(f"a calibration needs to know the model: pass {which}")
    _budgets(settings, None)


def _budgets(settings: HardKVConfig, num_layers: int | None) -> Sequence[Budget]:
    """Return one budget per compressed layer; a single budget for all if `num_layers` is None."""
    budget, calibration = settings.budget, settings.calibration
    assert isinstance(budget, Budget)
    has_risk = isinstance(calibration, Calibration) and calibration.risk is not None
    curves = calibration.curves if has_risk else None  # type: ignore[union-attr]
    return budget.for_layers(num_layers, settings.window + settings.sinks, curves)


def _with_bits(
    settings: HardKVConfig, traits: Traits, full: Sequence[int]
) -> tuple[Sequence[Budget], list[tuple[int, int]]]:
    """Return one budget per compressed layer, and the layer's bits of keys and values, for bits "auto"."""
    budget, calibration = settings.budget, settings.calibration
    assert isinstance(budget, Risk)
    assert isinstance(calibration, Calibration)
    calibration.check_distortion()
    assert calibration.distortion is not None
    _, _, dim, value_dim = traits.heads(full[0])
    nbytes = [token_nbytes(pair, dim, value_dim, itemsize=2) for pair in CHOICES]
    protected = settings.window + settings.sinks
    return budget.for_bits(protected, calibration.curves, calibration.distortion, nbytes)


def _not_compressed(traits: Traits, layers: Sequence[Any]) -> str | None:
    """Return a warning if some layers grow uncompressed or if nothing is compressed at all; else None."""
    model = type(traits.config).__name__
    attention = [
        type(layer)
        for idx, layer in enumerate(layers)
        if isinstance(layer, CacheLayerMixin) and idx not in traits.cross_attention_layers
    ]
    rest = [kind for kind in attention if kind not in FULL + SLIDING]
    compresses = any(kind in FULL for kind in attention)
    nothing = "" if compresses else ": HardKVCache compresses nothing here"
    if rest:
        kinds = ", ".join(sorted({kind.__name__ for kind in rest}))
        return (
            f"{len(rest)} of {len(layers)} layers of {model} are of a kind of their own ({kinds}), which HardKVCache "
            f"leaves as DynamicCache has it{nothing}"
        )
    if not compresses:
        return (
            f"no layer of {model} uses full attention (sliding-window and linear layers are already bounded){nothing}"
        )
    return None
