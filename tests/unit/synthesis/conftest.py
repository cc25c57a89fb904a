"""The hand room H and short helpers for tasks."""

import pytest

from spatialvlm.scenes.io import load_scene
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.rows import Reject
from spatialvlm.synthesis.tasks import TASKS

NAMES = ["sofa", "table", "chair1", "chair2", "bookshelf", "lamp", "plant", "toy box", "bin"]


@pytest.fixture(scope="session")
def hand_room(data_dir):
    return load_scene(data_dir / "scenes" / "hand_room.json")


@pytest.fixture(scope="session")
def room(hand_room):
    return SceneContext(hand_room)


@pytest.fixture(scope="session")
def ask(room):
    """Function (task, variant, object names, frames, **more) -> answer, or why it is rejected.

    Answers that are object indices come back as names when the call says ``named=True``.
    """

    def run(task, variant="", objects=(), frames=("F0",), *, ctx=room, named=False, **more):
        indices = [NAMES.index(name) for name in objects]
        args = {"variant": variant, "objects": indices, "frames": list(frames), **more}
        try:
            answer = TASKS[task].derive(ctx, args).answer
        except Reject as reject:
            return str(reject.reason)
        if not named:
            return answer
        return [NAMES[i] for i in answer] if isinstance(answer, list) else NAMES[answer]

    return run
