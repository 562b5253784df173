"""Mistakes of layouts, each what a trainer has shipped or could: what is patched, the cell that shows it, and the words
of the diagnosis. They are planted in the ranks of a proof; the oracle is made elsewhere and does not see them.
"""

from __future__ import annotations

from unittest import mock

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_dist.train import step as step_module
from tests.verify import patches
from tests.verify.mistake import Mistake

WIDE = {"tensor": 1, "expert": 4}
COPIES = {"tensor": 1, "expert": 2}
ALONE = {"tensor": 1, "expert": 1}
CUT = {"tensor": 2, "expert": 2}
PADDED = {"rows": "padded"}
ONE_LAYER = {"model.num_layers": 1}
JITTER = {"model.moe.input_jitter": 0.3}
NO_TERMS = {"model.moe.balance_loss": 0.0, "model.moe.z_loss": 0.0}
DENSE_FIRST = {"model.num_layers": 3, "model.num_dense_layers": 1, "model.moe.selection_bias": True}

APART = "ranks hold different values"
OTHERS_RIGHT = "router and shared expert are right"
EXPERTS_RIGHT = "those of the experts are right"
BY_ROUTER = "what comes through the router alone is wrong"
LOST = "routing is right: rows are lost, mixed up or weighed wrongly"

MISTAKES: dict[str, Mistake] = {
    "expert gradients over the expert degree": Mistake(
        "1",
        lambda: patches.scaled("experts", lambda g: 1 / g.mesh.layout.expert),
        ("gradients", "experts"),
        ("gradients of the experts are exactly 1/4x the oracle's", "and expert degree", OTHERS_RIGHT),
        WIDE,
    ),
    "expert gradients times the expert degree": Mistake(
        "1",
        lambda: patches.scaled("experts", lambda g: g.mesh.layout.expert),
        ("gradients", "experts"),
        ("gradients of the experts are exactly 4x the oracle's", "and expert degree", OTHERS_RIGHT),
        WIDE,
        shipped="DeepSpeed #6546",
    ),
    "expert gradients times the expert-data degree": Mistake(
        "1",
        lambda: patches.scaled("experts", lambda g: g.mesh.layout.expert_data),
        ("gradients", "experts"),
        ("gradients of the experts are exactly 2x the oracle's", "and expert-data degree"),
        COPIES,
    ),
    "expert gradients times the expert-tensor degree": Mistake(
        "1",
        lambda: patches.scaled("experts", lambda g: g.mesh.layout.expert_tensor),
        ("gradients", "experts"),
        ("gradients of the experts are exactly 2x the oracle's", "and expert-tensor degree"),
        {**ALONE, "expert_tensor": 2},
    ),
    "parameters shared out, gradients averaged": Mistake(
        "1",
        lambda: mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None),
        ("gradients", "embedding"),
        ("exactly 1/4x", "gradients of the experts are exactly 1/2x the oracle's", "expert-data degree"),
        {**COPIES, "keeping": "fsdp"},
    ),
    "parameters shared out, those of a tensor group not summed": Mistake(
        "5",
        lambda: mock.patch("moe_dist.parallel.gradients._sum_together", lambda parts, group: None),
        ("gradients", "norms"),
        ("gradients of the norms, router and shared expert are", "those of the embedding, attention"),
        {**CUT, "keeping": "fsdp"},
    ),
    "expert gradients not summed over copies": Mistake(
        "1",
        lambda: patches.left_on_their_rank(".experts."),
        ("gradients", "experts"),
        ("gradients of the experts are wrong by no common factor", APART),
        COPIES,
    ),
    "dense gradients averaged over ranks": Mistake(
        "2",
        lambda: patches.scaled("dense", lambda g: 1 / g.mesh.layout.ranks),
        ("gradients", "embedding"),
        ("embedding, attention, norms, router and shared expert are exactly 1/4x", "number of ranks", EXPERTS_RIGHT),
        COPIES,
    ),
    "loss is the mean of micro-batches": Mistake(
        "2",
        patches.mean_over_micro_batches,
        ("gradients", "embedding"),
        ("exactly 1/2x the oracle's (2 is the number of micro-batches of a rank)", "no group is right"),
        {**ALONE, "micro": 1},
    ),
    "loss is the mean of the ranks' means": Mistake(
        "2",
        patches.mean_of_means,
        ("gradients", "embedding"),
        ("wrong by no common factor", "no group is right"),
        {**COPIES, "rows": "unequal"},
    ),
    "balance gradient once for each micro-batch": Mistake(
        "2",
        lambda: patches.balance_times(2),
        ("gradients", "embedding"),
        ("router are wrong by no common factor", "those of the experts and shared expert are right", BY_ROUTER),
        {**ALONE, "micro": 1},
        ONE_LAYER,
        shipped="Automodel #3359",
    ),
    "balance term once for each tensor rank": Mistake(
        "2",
        patches.balance_of_every_tensor_rank,
        ("loss", "balance"),
        ("balance is exactly 2x the oracle's", "tensor degree"),
        CUT,
        shipped="Megatron-LM #5047",
    ),
    "balance from the counts of this rank only": Mistake(
        "3",
        lambda: mock.patch("moe_dist.parallel.apply.share_counts", lambda model, mesh: None),
        ("loss", "balance"),
        ("balance is", "times the oracle's"),
        {**COPIES, "scope": "global", "micro": 4},
    ),
    "global balance of each micro-step by itself": Mistake(
        "3",
        lambda: mock.patch.object(step_module, "counts_first", lambda *given: False),
        ("loss", "balance"),
        ("balance is", "times the oracle's"),
        {**COPIES, "scope": "global", "micro": 1},
    ),
    "global balance of a running demand": Mistake(
        "3",
        lambda: patches.ranks_configured({"model.moe.global_balance": "running"}),
        ("loss", "balance"),
        ("balance is", "times the oracle's"),
        {**COPIES, "scope": "global", "micro": 1},
    ),
    "recompute routes again, with other random numbers": Mistake(
        "4",
        patches.recompute_routes_again,
        ("gradients", "embedding"),
        ("wrong by no common factor", "the forward pass is right: look at recompute"),
        {**COPIES, "capacity": "padded", "recompute": "full"},
        JITTER,
    ),
    "recompute follows the choices and draws again": Mistake(
        "4",
        patches.recompute_draws_again,
        ("gradients", "embedding"),
        ("wrong by no common factor", "the forward pass is right: look at recompute"),
        {**COPIES, "recompute": "full"},
        JITTER,
    ),
    "recompute counts the demand again": Mistake(
        "4",
        patches.counted_in_every_forward,
        ("routing", "demand"),
        ("tokens are routed alike", "demand exactly 2x the oracle's"),
        {**COPIES, "recompute": "full"},
        shipped="torchtitan #1593",
    ),
    "router gradients left on their rank": Mistake(
        "5",
        lambda: patches.left_on_their_rank("router.weight"),
        ("gradients", "router"),
        ("gradients of the router are wrong by no common factor", APART, "experts and shared expert are right"),
        COPIES,
    ),
    "router gradients not summed over the tensor group": Mistake(
        "5",
        lambda: patches.summed_over("data", lambda name: "router.weight" in name),
        ("gradients", "router"),
        ("gradients of the router are wrong by no common factor", APART, "experts and shared expert are right"),
        CUT,
        shipped="Megatron-LM #619",
    ),
    "norm gradients not summed over the tensor group": Mistake(
        "5",
        lambda: patches.summed_over("data", lambda name: name.endswith("norm.weight")),
        ("gradients", "norms"),
        ("gradients of the norms are wrong by no common factor", APART, "router, experts and shared expert are right"),
        CUT,
        shipped="Megatron-LM #1446",
    ),
    "router sees partial sums of attention": Mistake(
        "5",
        patches.partial_sums,
        ("routing", "choices"),
        ("ask for other experts in the first MoE layer: look at the router, its random numbers or its input",),
        CUT,
    ),
    "gates without gradient": Mistake(
        "6",
        patches.gates_detached,
        ("gradients", "embedding"),
        ("gradients of the router are zero: they are lost or cut off", BY_ROUTER),
        COPIES,
        {**ONE_LAYER, **NO_TERMS},
    ),
    "balance term without gradient": Mistake(
        "6",
        lambda: patches.balance_times(0),
        ("gradients", "embedding"),
        ("router are wrong by no common factor", "those of the experts and shared expert are right", BY_ROUTER),
        COPIES,
        ONE_LAYER,
        shipped="Automodel #1412",
    ),
    "gradient of the gates dropped on the way": Mistake(
        "6",
        lambda: patches.gates_of_rows(Tensor.detach),
        ("gradients", "embedding"),
        ("gradients of the router are zero", BY_ROUTER),
        {**COPIES, "dispatch": "deduplicated"},
        {**ONE_LAYER, **NO_TERMS},
    ),
    "capacity counted on a rank": Mistake(
        "9",
        lambda: patches.ranks_configured({"model.moe.capacity_group": "rank"}),
        ("routing", "drops"),
        ("the same choices are made and others dropped in the first MoE layer: look at capacity",),
        {**COPIES, "capacity": "drop by probability", "micro": 4},
    ),
    "drops by position in place of probability": Mistake(
        "9",
        lambda: patches.ranks_configured({"model.moe.drop_policy": "position_token_major"}),
        ("routing", "drops"),
        ("others dropped in the first MoE layer: look at capacity or its order",),
        {**COPIES, "capacity": "drop by probability"},
    ),
    "loss divided by all tokens, padding too": Mistake(
        "10",
        patches.divided_by_all_tokens,
        ("loss", "cross_entropy"),
        (
            "cross_entropy is exactly 5/16x the oracle's",
            "balance is exactly 5/16x the oracle's",
            "tokens are miscounted",
        ),
        {**COPIES, **PADDED},
    ),
    "balance demand counts padding": Mistake(
        "10",
        patches.padding_in_balance_demand,
        ("loss", "balance"),
        ("balance is", "times the oracle's"),
        {**COPIES, **PADDED},
    ),
    "padding takes rows of experts": Mistake(
        "10",
        patches.padding_dispatched,
        ("routing", "drops"),
        ("the same choices are made and others dropped in the first MoE layer: look at capacity",),
        {**COPIES, **PADDED},
    ),
    "z-loss counts padding": Mistake(
        "10",
        patches.padding_in_z_loss,
        ("loss", "z"),
        ("z is", "times the oracle's"),
        {**COPIES, **PADDED},
    ),
    "demand counted after drops": Mistake(
        "11",
        patches.demand_after_drops,
        ("routing", "demand"),
        ("tokens are routed alike", "demand wrong by no common factor"),
        {**COPIES, "capacity": "drop by probability"},
    ),
    "norm counts dense parameters once a rank": Mistake(
        "13",
        patches.norm_over_all_ranks,
        ("gradient norm", "grad_norm"),
        ("all gradients are right, their global norm is", "times the oracle's"),
        COPIES,
    ),
    "norm of what a rank holds": Mistake(
        "13",
        patches.norm_of_this_rank,
        ("gradient norm", "grad_norm"),
        ("all gradients are right, their global norm is wrong by no common factor",),
        WIDE,
    ),
    "clipped by the norm of what a rank holds": Mistake(
        "13",
        patches.clipped_by_this_rank,
        ("weights", "embedding"),
        ("gradients and their norm are right", "clipping or the optimizer"),
        WIDE,
    ),
    "clipped before the sums over ranks": Mistake(
        "13",
        patches.clipped_before_the_sums,
        ("gradients", "embedding"),
        ("wrong by no common factor", "no group is right"),
        COPIES,
    ),
    "gradient of idle experts left unfilled": Mistake(
        "14",
        patches.idle_experts_not_filled,
        ("gradients", "experts"),
        ("gradients of the experts are not finite: memory that was never filled", OTHERS_RIGHT),
        ALONE,
        {"model.moe.num_experts": 64},
    ),
    "mean over the tokens of a rank that has none": Mistake(
        "14",
        patches.mean_of_means,
        ("gradients", "embedding"),
        ("not finite", "division by zero"),
        {**COPIES, "rows": "a rank without rows"},
    ),
    "first weights of experts by their place on a rank": Mistake(
        "16",
        patches.experts_named_by_place,
        ("first weights", "experts"),
        ("the first weights of the experts are not the oracle's", "the names they are drawn by"),
        COPIES,
    ),
    "every rank draws first weights of its own": Mistake(
        "16",
        patches.first_weights_by_rank,
        ("first weights", "embedding"),
        ("ranks that hold the same differ: look at seeds",),
        COPIES,
    ),
    "jitter drawn by the place on a rank": Mistake(
        "16",
        patches.positions_by_rank,
        ("routing", "choices"),
        ("ask for other experts in the first MoE layer", "its random numbers"),
        COPIES,
        JITTER,
    ),
    "load of this rank alone": Mistake(
        "18",
        patches.load_of_this_rank,
        ("routing", "demand"),
        ("tokens are routed alike, but not each is counted once over all ranks: demand wrong", "served rows wrong"),
        COPIES,
    ),
    "rows left in order of arrival": Mistake(
        "19",
        patches.rows_in_order_of_arrival,
        ("routing", "choices"),
        ("tokens ask for other experts in MoE layer 1, while the layers before it route alike", "mixed up"),
        {**COPIES, "micro": 4},
    ),
    "demands of expert layers handed to dense ones": Mistake(
        "20",
        patches.biases_by_block,
        ("weights", "router"),
        ("selection biases are moved otherwise",),
        COPIES,
        DENSE_FIRST,
    ),
    "tied embedding without the output's gradient": Mistake(
        "21",
        patches.output_weight_detached,
        ("gradients", "embedding"),
        ("gradients of the embedding are wrong by no common factor", "router, experts and shared expert are right"),
        CUT,
    ),
    "largest score of this rank's part of the vocabulary": Mistake(
        "21",
        patches.largest_of_this_rank,
        ("loss", "cross_entropy"),
        ("cross_entropy is", "parts of the vocabulary are badly joined"),
        CUT,
    ),
    "routers not updated": Mistake(
        "22",
        patches.routers_not_updated,
        ("weights", "router"),
        ("gradients and their norm are right, the update of the router is not",),
        COPIES,
    ),
    "ranks cut to the rows of the shortest": Mistake(
        "23",
        patches.rows_of_the_shortest,
        ("routing", "demand"),
        ("tokens are routed alike, but not each is counted once over all ranks",),
        {**COPIES, "rows": "unequal"},
    ),
    "dense gradients summed with the experts' group": Mistake(
        "sums",
        lambda: patches.summed_over("expert_data", lambda name: ".experts." not in name),
        ("gradients", "embedding"),
        ("router and shared expert are wrong by no common factor", APART, EXPERTS_RIGHT),
        COPIES,
        shipped="DeepSpeed #3521",
    ),
    "gradients summed at every micro-batch": Mistake(
        "sums",
        patches.summed_at_every_micro_batch,
        ("gradients", "embedding"),
        ("wrong by no common factor", "no group is right"),
        {**COPIES, "micro": 1},
    ),
    "shared expert scaled by the tensor degree": Mistake(
        "sums",
        patches.shared_scaled_by_tensor_degree,
        ("gradients", "shared expert"),
        ("gradients of the shared expert are exactly 2x the oracle's", "tensor degree"),
        CUT,
    ),
    "parts of cut experts not added up": Mistake(
        "sums",
        patches.partial_rows,
        ("loss", "cross_entropy"),
        ("cross_entropy is", LOST),
        {**ALONE, "expert_tensor": 2},
        ONE_LAYER,
    ),
    "gates applied twice": Mistake(
        "gates",
        lambda: patches.gates_of_rows(Tensor.square),
        ("loss", "cross_entropy"),
        ("cross_entropy is", LOST),
        {**COPIES, "dispatch": "deduplicated"},
        ONE_LAYER,
    ),
    "gates left after drops renormalised": Mistake(
        "gates",
        lambda: patches.ranks_configured({"model.moe.renormalize_after_drop": True}),
        ("loss", "cross_entropy"),
        ("cross_entropy is", LOST),
        {**COPIES, "capacity": "drop by probability"},
        ONE_LAYER,
    ),
    "router scores in fp32": Mistake(
        "types",
        patches.scores_in_fp32,
        ("loss", "balance"),
        ("balance is the oracle's up to rounding, as if computed in a narrower type",),
        COPIES,
        ONE_LAYER,
    ),
}
