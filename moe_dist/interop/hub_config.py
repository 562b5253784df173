"""`config.json` of the hub against our model config: a field is carried, has a known value, or is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moe_dist.config.model_schema import ModelConfig
from moe_dist.errors import ExchangeError

# Fields that say nothing of the mathematics of a forward pass, nor of a step without dropout and balance terms.
_HARMLESS = frozenset(
    {
        "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id",
        "dtype", "eos_token_id", "ep_size", "experts_per_token", "initial_context_length", "initializer_range",
        "max_position_embeddings", "max_window_layers", "model_type", "num_nextn_predict_layers", "output_attentions",
        "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim", "return_dict",
        "router_aux_loss_coef", "seq_aux", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
REQUIRED = object()
_FIX = "--ignore FIELD if you know that it changes nothing here; docs/interop.md lists what is carried"


class Fields:
    """The fields of one config.json, each taken once.

    Args:
        tree: The whole file.
        where: Its path, for errors.
    """

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self.left, self.where = dict(tree), where

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """A field that is carried; null counts as absent.

        Raises:
            ExchangeError: It is absent and has no default.
        """
        value = self.left.pop(name, None)
        if value is None and default is REQUIRED:
            raise self.error(name, "missing", "the model cannot be known without it", "complete the file")
        return default if value is None else value

    def count(self, name: str, default: Any = REQUIRED) -> int:
        """A field that is a whole number from 1 to a million, so that it may be reckoned with.

        Raises:
            ExchangeError: It is none.
        """
        value = self.take(name, default)
        if type(value) is not int or not 1 <= value <= 10**6:
            raise self.error(name, value, "is a whole number from 1 to 1,000,000", "correct the file")
        return value

    def fixed(self, name: str, *allowed: Any) -> None:
        """A field that must be absent or have one of a few values.

        Raises:
            ExchangeError: It has another.
        """
        value = self.left.pop(name, None)
        if value is not None and value not in allowed:
            raise self.error(name, value, f"only {' or '.join(map(repr, allowed)) or 'null'} is carried", _FIX)

    def finish(self, ignored: Iterable[str]) -> None:
        """That nothing is left that might change the mathematics.

        Raises:
            ExchangeError: Naming the first field that is not known.
        """
        for name in sorted(self.left.keys() - _HARMLESS - set(ignored)):
            raise self.error(name, self.left[name], "a field that is not known may change the model", _FIX)

    def error(self, name: str, value: Any, rule: str, fix: str) -> ExchangeError:
        """What is wrong with a field."""
        return ExchangeError(f"{self.where}: {name}", f"{value!r}"[:200], rule, fix)


def read_rope(fields: Fields, theta: float) -> dict[str, Any]:
    """Base and stretching of the rotary embedding, in the form of transformers 4 or of 5.

    Raises:
        ExchangeError: A kind that is not carried, or a field of it that is not known.
    """
    longest = fields.left.get("max_position_embeddings")
    base = fields.take("rope_theta", theta)
    told = {**fields.take("rope_scaling", {}), **fields.take("rope_parameters", {})}
    inner = Fields(told, f"{fields.where}: rope_scaling")
    kind = inner.take("rope_type", inner.left.get("type") or "default")
    inner.left.pop("type", None)
    ours: dict[str, Any] = {"rope_theta": float(inner.take("rope_theta", base))}
    inner.fixed("partial_rotary_factor", 1, 1.0)
    if kind == "linear":
        ours["rope_scaling"] = {"kind": "linear", "factor": float(inner.take("factor"))}
    elif kind == "yarn":
        ours["rope_scaling"] = _read_yarn(inner, longest)
    elif kind != "default":
        raise inner.error("rope_type", kind, "only default, linear and yarn are carried", "it changes the model")
    inner.finish(())
    return ours


def _read_yarn(inner: Fields, longest: Any) -> dict[str, Any]:
    ours = {"kind": "yarn", "factor": float(inner.take("factor"))}
    ours["original_tokens"] = inner.take("original_max_position_embeddings", longest)
    ours["beta_fast"] = float(inner.take("beta_fast", 32.0))
    ours["beta_slow"] = float(inner.take("beta_slow", 1.0))
    ours["whole_bounds"] = inner.left.pop("truncate", True)
    ours["mscale"] = inner.take("mscale", None) or None
    ours["mscale_all_dim"] = inner.take("mscale_all_dim", None) or None
    inner.fixed("attention_factor")
    return ours


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The inverse, in the form of the published directories, which transformers 4 and 5 read."""
    scaling = model.rope_scaling
    found: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if scaling.kind == "linear":
        found["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind == "yarn":
        known: dict[str, Any] = {
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_tokens,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
        known |= {} if scaling.whole_bounds else {"truncate": False}
        weights = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
        found["rope_scaling"] = {"rope_type": "yarn", **known, **{k: v for k, v in weights.items() if v is not None}}
    return found


def value_at(model: ModelConfig, path: str) -> Any:
    """The value of a key below `model`."""
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name)
    return found


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets a key below `model` in a plain tree."""
    *parents, last = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value
