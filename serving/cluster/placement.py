"""How the workers of an engine find their placement group from a process that Ray did not start."""

from __future__ import annotations

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup

from serving.errors import ClusterError


def cluster_address() -> str:
    """Where a process outside Ray joins this cluster."""
    return str(ray.get_runtime_context().gcs_address)


def own_placement_group() -> str:
    """The id of the placement group that this actor runs in; ClusterError where it runs in none."""
    group = ray.util.get_current_placement_group()
    if group is None:
        raise ClusterError("this replica was deployed without a placement group")
    return str(group.id.hex())


def placement_group(group_id: str) -> PlacementGroup:
    """The placement group of an id, also in a process that has not joined the cluster yet."""
    return PlacementGroup(PlacementGroupID.from_hex(group_id))
