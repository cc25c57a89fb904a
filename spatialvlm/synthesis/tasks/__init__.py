"""All tasks by id. A new task is a class with three methods and one line here."""

from spatialvlm.synthesis.tasks import (
    blocks,
    camera,
    correspondence,
    extra,
    intern,
    measure,
    multiview,
    reasoning,
    relation,
    structured,
    vsi,
    vsti,
)
from spatialvlm.synthesis.tasks.base import Task

_ALL: tuple[Task, ...] = (
    # OpenSpatial, in the order of its 19 sub-tasks
    measure.SizeAbs(),
    measure.SizeRel(),
    measure.DistAbs(),
    structured.GroundingCam9(),
    relation.LeftRight(),
    relation.HighLow(),
    relation.FrontBehind(),
    camera.DepthChoice(),
    camera.DepthOrder(),
    camera.DistObjCam(),
    camera.CamMotion(),
    camera.CamPose(),
    multiview.MvDistAbs(),
    multiview.MvDistRel(),
    multiview.MvPos(),
    correspondence.CorrPoint(),
    correspondence.CorrObj(),
    reasoning.SceneCaption(),
    reasoning.RoutePlan(),
    # VSI-Bench
    vsi.VsiCount(),
    vsi.VsiObjSize(),
    vsi.VsiRoomSize(),
    vsi.VsiAbsDist(),
    vsi.VsiRelDist(),
    vsi.VsiRelDir(),
    vsi.VsiOrder(),
    reasoning.VsiRoute(),
    # VSTI-Bench
    vsti.CamObjAbs(),
    vsti.CamObjRel(),
    vsti.ObjObjNearFar(),
    vsti.ObjObjLeftRight(),
    vsti.ObjObjUpDown(),
    vsti.CamDisp(),
    vsti.CamDir(),
    vsti.DistChange(),
    # SSR
    structured.SsrLcm(),
    structured.SsrGrounding7(),
    # InternSpatial
    intern.IsPosition(),
    intern.IsSize(),
    intern.IsExist(),
    intern.IsCount(),
    intern.IsRotation(),
    # Further
    extra.LocateCell(),
    extra.CellMap(),
    extra.ObjectColour(),
    extra.Proximity(),
    extra.Grounding2d(),
    reasoning.LocationText(),
    multiview.MvSizeRel(),
    blocks.DaBlocks(),
)
TASKS: dict[str, Task] = {task.id: task for task in _ALL}
"""Task id -> task, in the order of the documentation."""

__all__ = ["TASKS", "Task"]
