"""What a family's config.json is made of: parts that read fields into our model tree and write them from a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from moe_dist.config.model_schema import ModelConfig
from moe_dist.interop.hub_config import REQUIRED, Fields, put, read_rope, value_at, write_rope

Tree = dict[str, Any]


class Part(Protocol):
    """Some fields of config.json."""

    def read(self, fields: Fields, ours: Tree) -> None:
        """Takes its fields and adds to our tree, which holds what the parts before have put there."""
        ...

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        """Adds its fields to theirs."""
        ...


@dataclass(frozen=True)
class Row:
    """A number or switch that is carried as it is; `also` is another name that it is found under."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    also: str = ""

    def read(self, fields: Fields, ours: Tree) -> None:
        other = fields.take(self.also, self.default) if self.also in fields.left else self.default
        put(ours, self.ours, fields.take(self.theirs, other))

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs[self.theirs] = value_at(model, self.ours)


@dataclass(frozen=True)
class Fixed:
    """A field of which only some values are carried, all of one meaning; the first is written, unless it is None."""

    theirs: str
    allowed: tuple[Any, ...]

    def read(self, fields: Fields, ours: Tree) -> None:
        fields.fixed(self.theirs, *self.allowed)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        if self.allowed and self.allowed[0] is not None:
            theirs[self.theirs] = self.allowed[0]


@dataclass(frozen=True)
class Always:
    """Keys of ours that every model of a family has."""

    ours: Tree

    def read(self, fields: Fields, ours: Tree) -> None:
        for path, value in self.ours.items():
            put(ours, path, value)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        pass  # a model that has others is found out when what was written is read again


@dataclass(frozen=True)
class Rope:
    """The rotary embedding; `theta` is its base where the file says none."""

    theta: float = 10_000.0

    def read(self, fields: Fields, ours: Tree) -> None:
        ours |= read_rope(fields, self.theta)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs |= write_rope(model)


class Heads:
    """Heads of grouped attention; by default every query head has its key, and heads share out the width."""

    def read(self, fields: Fields, ours: Tree) -> None:
        heads = fields.count("num_attention_heads")
        ours["num_heads"], ours["num_kv_heads"] = heads, fields.count("num_key_value_heads", heads)
        ours["head_width"] = fields.count("head_dim", max(1, int(ours["width"]) // heads))

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["num_attention_heads"], theirs["num_key_value_heads"] = model.num_heads, model.num_kv_heads
        theirs["head_dim"] = model.head_width


class Biases:
    """One switch for the biases of all four projections of attention."""

    def read(self, fields: Fields, ours: Tree) -> None:
        has = fields.take("attention_bias", False)
        put(ours, "attention.qkv_bias", has)
        put(ours, "attention.output_bias", has)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["attention_bias"] = model.attention.qkv_bias


class Dense:
    """No block has experts."""

    def read(self, fields: Fields, ours: Tree) -> None:
        ours["num_dense_layers"] = ours["num_layers"]
        ours["ffn_width"] = fields.take("intermediate_size")

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["intermediate_size"] = model.ffn_width


class SparseSteps:
    """Which blocks have experts, as Qwen3-MoE says it."""

    def read(self, fields: Fields, ours: Tree) -> None:
        step, dense = fields.count("decoder_sparse_step", 1), fields.take("mlp_only_layers", [])
        leading = list(range(len(dense)))
        if sorted(dense) != leading or (dense and step != 1):
            rule = "only leading blocks without experts, or one in so many with, are carried"
            raise fields.error("mlp_only_layers", dense, rule, "it changes the model")
        ours["num_dense_layers"], ours["moe_every_layers"] = len(dense), step

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["decoder_sparse_step"] = model.moe_every_layers
        theirs["mlp_only_layers"] = list(range(model.num_dense_layers))


class NoWindows:
    """A family that could have windows and whose models have none."""

    def read(self, fields: Fields, ours: Tree) -> None:
        fields.fixed("use_sliding_window", False)
        fields.left.pop("sliding_window", None)  # not read without the switch
        kinds = fields.take("layer_types", [])
        if any(kind != "full_attention" for kind in kinds):
            raise fields.error("layer_types", kinds, "only full_attention is carried", "it changes the model")

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["use_sliding_window"], theirs["sliding_window"] = False, None


class Windows:
    """A window in all blocks but every so many-th."""

    def read(self, fields: Fields, ours: Tree) -> None:
        layers, window = int(ours["num_layers"]), fields.take("sliding_window", None)
        kinds = fields.take("layer_types", _kinds(layers, 2))
        every = next((every for every in (0, *range(2, layers + 1)) if kinds == _kinds(layers, every)), None)
        if every is None:
            rule = "the last of every so many blocks is full_attention, all others sliding_attention"
            raise fields.error("layer_types", kinds, rule, "it changes the model")
        if window is not None:
            put(ours, "attention.window_tokens", window)
            put(ours, "attention.full_every_layers", every)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["sliding_window"] = model.attention.window_tokens
        theirs["layer_types"] = _kinds(model.num_layers, model.attention.full_every_layers)


def _kinds(layers: int, every: int) -> list[str]:
    full = (bool(every) and number % every == every - 1 for number in range(layers))
    return ["full_attention" if whole else "sliding_attention" for whole in full]


class ConstantGate:
    """Normalised gates of one expert a token are 1, which a model that comes like this means."""

    def read(self, fields: Fields, ours: Tree) -> None:
        moe = ours["moe"]
        moe["constant_gate"] = moe["top_k"] == 1 and moe["normalize_gates"] is True

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        pass


class BestExpertGroups:
    """All experts, or those of the groups whose best expert is best (DeepSeek-V2); `greedy` reads no groups."""

    def read(self, fields: Fields, ours: Tree) -> None:
        method = fields.left.get("topk_method")
        fields.fixed("topk_method", "greedy", "group_limited_greedy")
        groups, open_ones = fields.take("n_group", 1), fields.take("topk_group", 1)
        if method == "group_limited_greedy" and groups > 1:
            put(ours, "moe.num_groups", groups)
            put(ours, "moe.groups_per_token", open_ones)
            put(ours, "moe.group_score_experts", 1)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        limited = model.moe.num_groups > 1
        theirs["topk_method"] = "group_limited_greedy" if limited else "greedy"
        theirs |= {"n_group": model.moe.num_groups, "topk_group": model.moe.groups_per_token}


class Predictors:
    """Modules that predict further tokens are not carried: their weights are refused, and none are written."""

    def read(self, fields: Fields, ours: Tree) -> None:
        fields.left.pop("num_nextn_predict_layers", None)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["num_nextn_predict_layers"] = 0


class SharedExperts:
    """So many shared experts of the width of a routed one, which are one expert of their joint width."""

    def read(self, fields: Fields, ours: Tree) -> None:
        width = fields.count("moe_intermediate_size")
        shared = fields.left.pop("n_shared_experts", None) or 0
        put(ours, "moe.expert_width", width)
        put(ours, "moe.shared_expert_width", shared * width)

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["moe_intermediate_size"] = model.moe.expert_width
        theirs["n_shared_experts"] = model.moe.shared_expert_width // model.moe.expert_width or None


class LatentHeads:
    """Heads of latent attention; theirs give each key/value head a query head."""

    def read(self, fields: Fields, ours: Tree) -> None:
        heads = fields.count("num_attention_heads")
        fields.fixed("num_key_value_heads", heads)
        fields.left.pop("head_dim", None)  # of the part that position turns: qk_rope_head_dim again
        ours["num_heads"] = ours["num_kv_heads"] = heads

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["num_attention_heads"] = theirs["num_key_value_heads"] = model.num_heads


class Pairing:
    """Which channels DeepSeek-V3 turns together."""

    def read(self, fields: Fields, ours: Tree) -> None:
        ours["rope_pairing"] = "interleaved" if fields.take("rope_interleave", True) else "half"

    def write(self, model: ModelConfig, theirs: Tree) -> None:
        theirs["rope_interleave"] = model.rope_pairing == "interleaved"
