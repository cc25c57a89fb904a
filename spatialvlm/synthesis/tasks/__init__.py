"""All tasks by id. A new task is a class with three methods and one line here."""

from spatialvlm.synthesis.tasks.base import Task
from spatialvlm.synthesis.tasks.camera import DepthChoice
from spatialvlm.synthesis.tasks.extra import LocateCell, ObjectColour
from spatialvlm.synthesis.tasks.intern import IsCount
from spatialvlm.synthesis.tasks.measure import DistAbs
from spatialvlm.synthesis.tasks.relation import FrontBehind, HighLow, LeftRight
from spatialvlm.synthesis.tasks.vsi import VsiCount, VsiOrder

_ALL: tuple[Task, ...] = (
    DistAbs(),
    LeftRight(),
    HighLow(),
    FrontBehind(),
    DepthChoice(),
    VsiCount(),
    VsiOrder(),
    IsCount(),
    LocateCell(),
    ObjectColour(),
)
TASKS: dict[str, Task] = {task.id: task for task in _ALL}
"""Task id -> task, in the order of the documentation."""

__all__ = ["TASKS", "Task"]
