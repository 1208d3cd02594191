"""Where trials run: in this process, in several, or on Ray. A seeded search has the same result on all of them."""

from longrope_export.search.executors.local import InProcess
from longrope_export.search.executors.processes import Processes
from longrope_export.search.executors.ray import RayWorkers, check_ray, cluster_threads
from longrope_export.search.executors.source import ModelSource, ObjectiveSource

__all__ = ["InProcess", "ModelSource", "ObjectiveSource", "Processes", "RayWorkers", "check_ray", "cluster_threads"]
