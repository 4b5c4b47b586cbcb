"""Pictures of a validation as SVG: measured figures against simulated ones, and a real run's seconds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from pagedkv.arrays import Float64Array

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 420, 64, 44, 28, 150
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def scatter_picture(
    title: str, points: Mapping[str, Sequence[tuple[float, float, bool]]], *, axes: tuple[str, str], marks: tuple[str, str]
) -> str:
    """Return measured against simulated figures, both on logarithmic axes, one colour per entry of `points`.

    Args:
        title: What is shown.
        points: By name: (measured, simulated, whether its mark is filled).
        axes: What the horizontal and the vertical axis show, with units.
        marks: What filled and hollow marks are.
    """
    figures = [figure for its in points.values() for measured, simulated, _ in its for figure in (measured, simulated)]
    low, high = math.floor(math.log10(min(figures))), math.ceil(math.log10(max(figures)))

    def x(figure: float) -> float:
        return _LEFT + (math.log10(figure) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(figure: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(figure) - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    def body() -> Iterator[str]:
        for power in range(low, high + 1):
            figure = 10.0**power
            label = f"{figure:,.0f}" if power >= 0 else f"{figure:g}"
            yield _line(x(figure), y(10.0**low), x(figure), y(10.0**high), "#ddd")
            yield _line(x(10.0**low), y(figure), x(10.0**high), y(figure), "#ddd")
            yield _text(x(figure), _HEIGHT - _BOTTOM + 16, label, anchor="middle")
            yield _text(_LEFT - 6, y(figure) + 4, label, anchor="end")
        yield _line(x(10.0**low), y(10.0**low), x(10.0**high), y(10.0**high), "#888")
        for i, (name, its) in enumerate(points.items()):
            for measured, simulated, filled in its:
                at = f'cx="{x(measured):.1f}" cy="{y(simulated):.1f}"'
                yield f'<circle {at} r="3" fill="{_COLOURS[i] if filled else "none"}" stroke="{_COLOURS[i]}"/>'
            yield f'<circle cx="{_WIDTH - _RIGHT + 20}" cy="{_TOP + 20 * i}" r="4" fill="{_COLOURS[i]}"/>'
            yield _text(_WIDTH - _RIGHT + 30, _TOP + 20 * i + 4, name)
        yield _text(_WIDTH - _RIGHT + 14, _TOP + 20 * len(points) + 10, f"filled: {marks[0]}")
        yield _text(_WIDTH - _RIGHT + 14, _TOP + 20 * len(points) + 26, f"hollow: {marks[1]}")
        yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, axes[0], anchor="middle")
        yield _text(_LEFT, _TOP - 10, axes[1])

    return _svg(title, body())


def seconds_picture(lines: Mapping[str, Sequence[tuple[str, Float64Array]]], fitted_s: float) -> str:
    """Return curves over seconds, one panel per entry of `lines`: (name, values by second); a mark where the fit ends."""
    panel = (_HEIGHT - _TOP - _BOTTOM) / len(lines)

    def body() -> Iterator[str]:
        for n, (title, curves) in enumerate(lines.items()):
            top, bottom = _TOP + n * panel + 14, _TOP + (n + 1) * panel - 8
            highest = max(float(values.max()) for _, values in curves) or 1.0
            num = max(values.size for _, values in curves)
            scale = (_WIDTH - _LEFT - _RIGHT) / num
            yield _text(_LEFT, top - 4, title)
            yield _line(_LEFT, bottom, _LEFT + num * scale, bottom, "#888")
            yield _line(_LEFT + fitted_s * scale, top, _LEFT + fitted_s * scale, bottom, "#bbb")
            yield _text(_LEFT - 6, top + 8, f"{highest:.0f}", anchor="end")
            for i, (name, values) in enumerate(curves):
                points = " ".join(
                    f"{_LEFT + (s + 0.5) * scale:.1f},{bottom - value / highest * (bottom - top):.1f}"
                    for s, value in enumerate(values.tolist())
                )
                yield f'<polyline points="{points}" fill="none" stroke="{_COLOURS[i]}"/>'
                yield _text(_WIDTH - _RIGHT + 14, top + 12 + 16 * i, name, colour=_COLOURS[i])
        yield _text(_LEFT + fitted_s * (_WIDTH - _LEFT - _RIGHT) / num + 4, _HEIGHT - _BOTTOM + 6, "scored from here on")
        yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, f"seconds, 0 to {num}", anchor="middle")

    return _svg("A real run and its simulation over time", body())


def _svg(title: str, body: Iterator[str]) -> str:
    inner = "\n".join(body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="11" '
        f'role="img">\n<title>{escape(title)}</title>\n<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>\n{inner}\n</svg>\n'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
