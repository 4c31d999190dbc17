"""A picture from its empty axes to its file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sorted.files import replaced_file


@contextmanager
def drawing(path: Path, title: str, width: float, height: float, columns: int = 1, **more) -> Iterator[tuple]:
    """Yields a figure and its axes (an array of them for several columns) to draw on; then writes the PNG, whole or not at all.

    Args:
        path: Of the picture; its folder is made.
        title: Above all axes.
        width, height: In hundreds of points.
        columns: Axes side by side.
        **more: For matplotlib's ``subplots``.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height), dpi=100, layout="constrained", **more)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as aside:
            figure.savefig(aside, format="png")
        pyplot.close(figure)
