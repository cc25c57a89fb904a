"""Camera walks: collision-free, smooth, looking at the furniture in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.random import Generator
from scipy import ndimage, sparse

from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.rooms.placement import CELL_M, Placed, Shell, floor_grid, walkable
from spatialvlm.scenes.transforms import Array, wrap_deg

FRAME_S = 0.5
MAX_TURN_DEG = 45.0
"""Per frame: 90 degrees per second."""
MAX_STEP_M = 0.75
NUM_CANDIDATES = 8
MIN_WALKABLE_M2 = 3.0
WALK_MARGIN_M = 0.33
"""Of cell centres to furniture and walls; the line between cells then keeps 0.25 m."""


@dataclass(frozen=True)
class View:
    """How the walk looks at things."""

    hfov_deg: tuple[float, float] = (55.0, 85.0)
    eye_m: tuple[float, float] = (1.3, 1.6)
    pitch_deg: tuple[float, float] = (-25.0, -5.0)
    nearest_m: float = 0.7
    """Objects nearer than this do not count as looked at."""
    again: float = 0.15
    """Worth of having an object in view that was already seen, against 1 for a new one."""


REALISTIC = View()
SMALL = View((72.0, 85.0), (1.45, 1.7), (-24.0, -12.0), nearest_m=1.3, again=0.9)


def walkable_component(shell: Shell, placed: list[Placed]) -> Bool[np.ndarray, "X Y"] | None:
    """Largest connected walkable region; ``None`` when it is too small or the room falls apart."""
    free = walkable(shell, placed, margin=WALK_MARGIN_M)
    labels, count = ndimage.label(free)
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    largest = int(sizes.argmax())
    enough = sizes[largest] * CELL_M**2 >= MIN_WALKABLE_M2 and sizes[largest] >= 0.8 * sizes.sum()
    return labels == largest + 1 if enough else None


def draw_walk(
    shell: Shell,
    placed: list[Placed],
    region: Bool[np.ndarray, "X Y"],
    rng: Generator,
    *,
    num_frames: int,
    width: int,
    height: int,
    view: View = REALISTIC,
) -> list[Camera]:
    """Best of several random walks: the one that is expected to see most objects.

    Args:
        shell: The room.
        placed: Furniture, also what the camera looks at.
        region: Walkable cells (:func:`walkable_component`).
        rng: Source of all choices.
        num_frames: Number of cameras, half a second apart.
        width: Image width in pixels.
        height: Image height in pixels.
        view: Field of view, eye height and pitch.
    """
    targets = np.array([item.box.center for item in placed if item.label != "rug"])
    hfov = float(rng.uniform(*view.hfov_deg))
    eye = float(rng.uniform(*view.eye_m))
    grid, _ = floor_grid(shell)
    graph, cells = _graph(region)
    best: tuple[float, Array, list[tuple[float, float]]] | None = None
    for _ in range(NUM_CANDIDATES):
        line = _random_line(grid, region, graph, cells, rng)
        positions = _resample(line, num_frames)
        eyes = np.c_[positions, np.full(num_frames, eye)]
        start = float(rng.uniform(-180, 180))
        headings, worth = _look_around(eyes, targets, hfov, hfov * height / width, start, view)
        if best is None or worth > best[0]:
            best = (worth, eyes, headings)
    assert best is not None
    return [
        Camera.look(tuple(point), heading, pitch, hfov_deg=hfov, width=width, height=height)
        for point, (heading, pitch) in zip(best[1], best[2], strict=True)
    ]


def _graph(region: Array) -> tuple[sparse.csr_matrix, Array]:
    """8-connected graph of the walkable cells; diagonals never cut a blocked corner."""
    index = np.full(region.shape, -1)
    cells = np.argwhere(region)
    index[region] = np.arange(len(cells))
    rows, columns, weights = [], [], []
    for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1)):
        a = cells
        b = cells + np.array([dx, dy])
        inside = (b >= 0).all(axis=1) & (b < region.shape).all(axis=1)
        a, b = a[inside], b[inside]
        open_ = region[b[:, 0], b[:, 1]]
        if dx and dy:
            open_ &= region[b[:, 0], a[:, 1]] & region[a[:, 0], b[:, 1]]
        rows.append(index[a[open_, 0], a[open_, 1]])
        columns.append(index[b[open_, 0], b[open_, 1]])
        weights.append(np.full(int(open_.sum()), np.hypot(dx, dy)))
    flat = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(flat, shape=(len(cells), len(cells))), cells


def _random_line(
    grid: Array, region: Array, graph: sparse.csr_matrix, cells: Array, rng: Generator
) -> Float[np.ndarray, "N 2"]:
    """Shortest paths through random waypoints, smoothed where the smooth curve stays walkable."""
    waypoints = [int(rng.integers(len(cells)))]
    for _ in range(int(rng.integers(2, 6))):
        candidates = rng.integers(len(cells), size=6)
        apart = np.abs(cells[candidates][:, None] - cells[waypoints][None]).sum(axis=2).min(axis=1)
        waypoints.append(int(candidates[apart.argmax()]))
    _, previous = sparse.csgraph.dijkstra(
        graph, directed=False, indices=waypoints[:-1], return_predecessors=True
    )
    route = [waypoints[0]]
    for leg, goal in enumerate(waypoints[1:]):
        back = [goal]
        while back[-1] != waypoints[leg]:
            back.append(int(previous[leg, back[-1]]))
        route += back[-2::-1]
    line = grid[cells[route, 0], cells[route, 1]]
    smooth = _catmull_rom(line[np.unique(np.r_[0 : len(line) : 7, len(line) - 1])])
    inside = ((smooth - grid[0, 0] + CELL_M / 2) / CELL_M).astype(int)
    walkable_curve = region[inside[:, 0], inside[:, 1]].all()
    chosen: Array = smooth if walkable_curve else line
    return chosen


def _catmull_rom(points: Float[np.ndarray, "N 2"], samples: int = 8) -> Float[np.ndarray, "M 2"]:
    """Uniform Catmull-Rom spline through all points."""
    if len(points) < 3:
        return points
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, samples, endpoint=False)[:, None]
    pieces = []
    for i in range(len(points) - 1):
        p0, p1, p2, p3 = padded[i : i + 4]
        pieces.append(
            0.5
            * (
                2 * p1
                + (p2 - p0) * t
                + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
                + (3 * p1 - p0 - 3 * p2 + p3) * t**3
            )
        )
    return np.concatenate([*pieces, points[-1:]])


def _resample(line: Float[np.ndarray, "N 2"], count: int) -> Float[np.ndarray, "count 2"]:
    """``count`` points at equal steps of at most 0.75 m along the beginning of the line."""
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    at = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0, min(at[-1], MAX_STEP_M * (count - 1)), count)
    return np.stack([np.interp(wanted, at, line[:, i]) for i in (0, 1)], axis=1)


def _look_around(
    eyes: Float[np.ndarray, "F 3"],
    targets: Float[np.ndarray, "N 3"],
    hfov: float,
    vfov: float,
    start_deg: float,
    view: View,
) -> tuple[list[tuple[float, float]], float]:
    """Heading and pitch of every frame: towards what has not been seen yet, turning slowly.

    Returns:
        ``(heading, pitch)`` in degrees per frame, and what the walk is worth: objects seen at least
        once, plus ``view.again`` times the mean number of objects in view.
    """
    looks = 0
    seen = np.zeros(len(targets), dtype=bool)
    turns: list[tuple[float, float]] = []
    heading = start_deg
    for frame, eye in enumerate(eyes):
        offset = targets - eye
        ground = np.hypot(offset[:, 0], offset[:, 1])
        bearing = np.degrees(np.arctan2(offset[:, 1], offset[:, 0]))
        limit = 180.0 if frame == 0 else MAX_TURN_DEG
        options = heading + np.linspace(-limit, limit, 25)
        away = np.abs((bearing[None] - options[:, None] + 180) % 360 - 180)  # [25, N]
        near = (ground > view.nearest_m) & (ground < 6.5)
        in_view = (away < 0.42 * hfov) & near
        gain = (in_view & ~seen).sum(axis=1) + view.again * in_view.sum(axis=1)
        # Nothing new in reach: keep turning towards the rest.
        gain = gain - 0.003 * np.where(~seen, away, 0.0).mean(axis=1)
        choice = int(gain.argmax())
        heading = wrap_deg(float(options[choice]))
        looked = in_view[choice]
        focus = looked & ~seen if (looked & ~seen).any() else looked
        pitch = -10.0
        if focus.any():
            pitch = float(np.degrees(np.arctan2(offset[focus, 2], ground[focus])).mean())
        pitch = float(np.clip(pitch, *view.pitch_deg))
        elevation = np.degrees(np.arctan2(offset[:, 2], ground))
        inside = looked & (np.abs(elevation - pitch) < 0.5 * vfov)
        seen |= inside
        looks += int(inside.sum())
        turns.append((heading, pitch))
    return turns, float(seen.sum()) + view.again * looks / len(eyes)


def eye_clearances(
    cameras: Sequence[Camera], shell: Shell, placed: list[Placed]
) -> tuple[float, float]:
    """Least distance of the eyes from any box and from any wall, in metres."""
    boxes = min(
        (item.box.distance_to_point(camera.centre) for item in placed for camera in cameras),
        default=9.9,
    )
    walls = min(
        float((camera.centre[:2] - wall.start) @ wall.inward)
        for wall in shell.walls
        for camera in cameras
        if -1e-9 <= (camera.centre[:2] - wall.start) @ wall.along <= wall.length
        and (camera.centre[:2] - wall.start) @ wall.inward > 0
    )
    return boxes, walls
