"""What Ray's autoscaler on AWS adds: spot machines, and on-demand ones while there are none.

cluster.yaml names it in `RAY_AUTOSCALER_UTILIZATION_SCORER`; Ray's own scorer does not ask whether
a type was to be had. Imports nothing of this repository, since it is copied to the head alone.
"""

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer


def score(
    node_resources: dict[str, Any],
    resources: list[dict[str, Any]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """How good a type is for what waits: the largest is added, None fits nothing.

    A type that AWS refused counts as not to be had for half an hour, then it is tried again.
    """
    fit = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if fit is None:
        return None
    last = node_availability_summary.node_availabilities.get(node_type)
    return (last is None or last.is_available, node_type.endswith("_spot"), fit)
