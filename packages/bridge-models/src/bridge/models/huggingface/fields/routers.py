"""Routers: expert selection, weights and load balancing.

A router of transformers takes the softmax over all experts, then the top-k. If it normalises these weights, the result
equals a softmax over the top-k scores (``moe_router_pre_softmax`` off); otherwise ``moe_router_pre_softmax`` is on.
"""

from __future__ import annotations

from bridge.config.problems import describe_value
from bridge.models.huggingface.fields.row import Row, always
from bridge.models.huggingface.translation import COUNT, FLAG, NUMBER, TEXT, Name, Translation


def softmax_router(*, normalises: bool | None) -> Row:
    """Return the row of a router with softmax scores.

    Args:
        normalises: The default of ``norm_topk_prob`` in transformers; None if there is no such field, and the router
            always normalises.
    """

    def read(t: Translation) -> None:
        pre_softmax = normalises is not None and not t["norm_topk_prob"]
        if not pre_softmax and t["num_experts_per_tok"] == 1:
            t.refuse(
                "num_experts_per_tok",
                "Megatron-Core does not normalise the weight of a single expert: must be at least 2",
            )
        t["transformer.moe_router_pre_softmax"] = pre_softmax

    def write(t: Translation) -> None:
        pre_softmax = t["transformer.moe_router_pre_softmax"]
        if normalises is not None:
            t["norm_topk_prob"] = not pre_softmax
        elif pre_softmax:
            t.refuse("transformer.moe_router_pre_softmax", f"{t.model_type} normalises weights: must be false")

    names = {} if normalises is None else {"norm_topk_prob": Name(FLAG, normalises)}
    return Row(names, ("transformer.moe_router_pre_softmax",), read, write)


_GROUPS = ("transformer.moe_router_num_groups", "transformer.moe_router_group_topk")


def sigmoid_router(groups: int, chosen_groups: int) -> tuple[Row, ...]:
    """Return the rows of a router with normalised sigmoid scores that ranks groups by their best two experts.

    Megatron-Core ranks groups by their best top-k / ``topk_group`` experts.

    Args:
        groups: The default of ``n_group`` in transformers.
        chosen_groups: The default of ``topk_group`` in transformers.
    """

    def read(t: Translation) -> None:
        n_group, chosen, each = t["n_group"] or 1, t["topk_group"] or 1, t["num_experts_per_tok"]
        if t["norm_topk_prob"] != (each > 1):
            must = "true" if each > 1 else "false"
            t.refuse(
                "norm_topk_prob", f"Megatron-Core normalises if and only if a token has several experts: must be {must}"
            )
        if n_group == 1:
            return
        if chosen < n_group and each // chosen != 2:
            raise t.refuse(
                "topk_group",
                f"{t.model_type} ranks groups by their best two experts, Megatron-Core by the best {each // chosen}",
            )
        t["transformer.moe_router_num_groups"], t["transformer.moe_router_group_topk"] = n_group, chosen

    def write(t: Translation) -> None:
        n_group, chosen = (t[path] for path in _GROUPS)
        each = t["transformer.moe_router_topk"]
        if chosen and chosen < n_group and each // chosen != 2:
            t.refuse(
                _GROUPS[1], f"Megatron-Core ranks groups by the best {each // chosen} experts, {t.model_type} by two"
            )
        t["n_group"], t["topk_group"] = (n_group, chosen) if chosen else (1, 1)
        t["norm_topk_prob"] = each > 1

    names = {
        "n_group": Name(COUNT, groups, null=True),
        "topk_group": Name(COUNT, chosen_groups, null=True),
        "norm_topk_prob": Name(FLAG, True),
    }
    return (
        always("transformer.moe_router_score_function", "sigmoid", "routers of {model_type} use sigmoid scores"),
        always("transformer.moe_router_enable_expert_bias", True, "{model_type} selects experts with a router bias"),
        Row(names, _GROUPS, read, write),
    )


def _read_greedy(t: Translation) -> None:
    if t["topk_method"] != "group_limited_greedy":
        if t["topk_method"] not in ("greedy", None):
            t.refuse("topk_method", f"expected greedy or group_limited_greedy, got {describe_value(t['topk_method'])}")
        return
    # Megatron-Core ranks groups by their best `each // chosen` experts, transformers by their best one.
    groups, chosen, each = t["n_group"], t["topk_group"], t["num_experts_per_tok"]
    if None in (groups, chosen, each):
        raise t.refuse("topk_method", "group_limited_greedy needs n_group, topk_group and num_experts_per_tok")
    if chosen < groups and each // chosen != 1:
        raise t.refuse(
            "topk_method",
            f"{t.model_type} ranks groups by their best expert, Megatron-Core by the best {each // chosen}",
        )
    t["transformer.moe_router_num_groups"], t["transformer.moe_router_group_topk"] = groups, chosen


def _write_greedy(t: Translation) -> None:
    groups, chosen = (t[path] for path in _GROUPS)
    if not chosen:
        t["topk_method"] = "greedy"
        return
    each = t["transformer.moe_router_topk"]
    if chosen < groups and each // chosen != 1:
        t.refuse(_GROUPS[1], f"Megatron-Core ranks groups by the best {each // chosen} experts, {t.model_type} by one")
    t["topk_method"], t["n_group"], t["topk_group"] = "group_limited_greedy", groups, chosen


GREEDY_ROUTER = Row(
    {"topk_method": Name(TEXT, "greedy", null=True), "n_group": Name(COUNT), "topk_group": Name(COUNT)},
    _GROUPS,
    _read_greedy,
    _write_greedy,
)


def weight_scale(default: float) -> Row:
    """Return the row of the factor on expert weights."""

    def read(t: Translation) -> None:
        if (scale := t["routed_scaling_factor"]) != 1:
            t["transformer.moe_router_topk_scaling_factor"] = float(scale)

    def write(t: Translation) -> None:
        t["routed_scaling_factor"] = t["transformer.moe_router_topk_scaling_factor"] or 1.0

    fields = ("transformer.moe_router_topk_scaling_factor",)
    return Row({"routed_scaling_factor": Name(NUMBER, default)}, fields, read, write)


def load_balancing(name: str, default: float | None, kind: str, *, note: str = "") -> Row:
    """Return the row of the coefficient of the load-balancing loss.

    Args:
        name: The field.
        default: Its default in transformers; None for no such loss.
        kind: The value of ``moe_router_load_balancing_type``.
        note: A note for the user when it is read.
    """

    def read(t: Translation) -> None:
        if (weight := t[name]) is None:
            return
        t["transformer.moe_aux_loss_coeff"] = float(weight)
        t["transformer.moe_router_load_balancing_type"] = kind
        if note:
            t.note(f"$.{name} is kept: {note}")

    def write(t: Translation) -> None:
        weight, balanced = t["transformer.moe_aux_loss_coeff"], t["transformer.moe_router_load_balancing_type"]
        if isinstance(weight, list) or (weight and balanced != kind):
            t.note("$.transformer.moe_aux_loss_coeff is left out: config.json has no field for this load balancing")
        elif weight or default is not None:
            t[name] = weight

    fields = ("transformer.moe_aux_loss_coeff", "transformer.moe_router_load_balancing_type")
    return Row({name: Name(NUMBER, default)}, fields, read, write)


AUX_LOSS = load_balancing(
    "router_aux_loss_coef",
    0.001,
    "aux_loss",
    note="Megatron-Core computes this loss per layer; transformers computes it over all layers, times top-k",
)
