"""The README's two pictures, out of what the demo has left behind.

    python -m ray_jobs.demo
    python docs/make_pictures.py outputs/demo/search-1

`pictures/report.svg` is the report's own drawing of learning curves and of what mattered, for a README's width and a telephone's;
`pictures/before_after.gif` shows the same episodes of the simulator twice, the published recipe beside the best policy.
"""

import json
import re
import sys
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

PICTURES = Path(__file__).with_name("pictures")
VARIABLE = re.compile(r"--(\w+): (#\w+)")
WIDTH, MARGIN = 480, 12  # of the report's picture, in pixels
TILE, NAMES, GAP = 208, 22, 16  # of the film: a policy's square, the line above it, the space between
MOST_S, EVERY = 12, 2  # seconds of film, and frames of which one is shown


def report(search: Path) -> str:
    """A drawing of its own (SVG) with two of the report's, in its light colours."""
    page = (search / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    colours = {}
    for name, value in VARIABLE.findall(style):
        colours.setdefault(name, value)  # those of the dark theme come later
    rules = "\n".join(line for line in style.splitlines() if re.match(r"svg |\.(grid|line|dot|key)", line))
    rules = re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], rules).replace("svg text", "text")
    curves = re.search(r'<h2>Learning curves.*?<div class="narrow">(<svg.*?</svg>)', page, re.S)[1]
    mattered = re.search(r"<h2>What mattered.*?(<svg.*?</svg>)", page, re.S)[1]
    tiles = re.findall(r'<div class="tile"><span>(.*?)</span><b>(.*?)</b><span>(.*?)</span></div>', page)[:3]

    parts, y = [], MARGIN
    for number, (name, value, note) in enumerate(tiles):
        x = MARGIN + number * (WIDTH - 2 * MARGIN) / len(tiles)
        for line, (text, size, ink) in enumerate(
            ((name, 11, "soft"), (value, 19, "ink"), (note, 10, "soft"))
        ):
            style = f"font-size:{size}px;fill:{colours[ink]}"
            parts.append(f'<text x="{x}" y="{y + (10, 32, 47)[line]}" style="{style}">{text}</text>')
    y += 64
    keys = [
        ("best", "best"),
        ("baseline", "published recipe"),
        ("other", "trained in full"),
        ("pruned", "given up"),
    ]
    for number, (kind, text) in enumerate(keys):
        x = MARGIN + (0, 78, 212, 340)[number]
        parts.append(
            f'<path class="line {kind}" d="M{x} {y}h22"/><text x="{x + 28}" y="{y + 4}">{text}</text>'
        )
    y += 14
    for drawing in (curves, mattered):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())
        shown = WIDTH - 2 * MARGIN
        place = f'x="{MARGIN}" y="{y}" width="{shown}" height="{height * shown / width}"'
        parts.append(drawing.replace("<svg", f"<svg {place}", 1))
        y += height * shown / width + MARGIN
    paper = f'<rect width="{WIDTH}" height="{y}" fill="{colours["paper"]}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}">'
    return f"{head}<style>{rules}</style>{paper}{''.join(parts)}</svg>\n"


def film(search: Path) -> list[Image.Image]:
    """Frames with both policies beside each other, in the episodes of which both have a video."""
    results = json.loads((search / "evaluation" / "evaluation.json").read_text())["results"]
    videos = {}
    for name, result in results.items():
        side = "best" if "best" in name else "recipe"
        episodes = result["simulator"]["per_episode"]
        videos[side] = {e["seed"]: search / "evaluation" / e["video"] for e in episodes if e.get("video")}
    rates = {
        "best" if "best" in name else "recipe": r["simulator"]["success_rate"] for name, r in results.items()
    }
    titles = {
        "recipe": f"published recipe: {rates['recipe']:.0%} of episodes",
        "best": f"best of the search: {rates['best']:.0%}",
    }
    frames = []
    for seed in sorted(set(videos["best"]) & set(videos["recipe"])):
        both = [_frames(videos[side][seed]) for side in titles]
        length = max(map(len, both))
        for number in range(0, length, EVERY):
            picture = Image.new("RGB", (2 * TILE + GAP, TILE + NAMES), "white")
            draw = ImageDraw.Draw(picture)
            for place, (side, shown) in enumerate(zip(titles, both, strict=True)):
                left = place * (TILE + GAP)
                picture.paste(
                    shown[min(number, len(shown) - 1)].resize((TILE, TILE), Image.NEAREST), (left, NAMES)
                )
                draw.text((left, 3), titles[side], "#1d2329", font=ImageFont.load_default(13))
            frames.append(picture)
    return frames


def _frames(video: Path) -> list[Image.Image]:
    with av.open(str(video)) as file:
        return [frame.to_image() for frame in file.decode(video=0)]


def main(search: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "report.svg").write_text(report(search))
    frames = film(search)
    first, *others = [frame.quantize(32) for frame in frames[: MOST_S * 10]]
    first.save(PICTURES / "before_after.gif", save_all=True, append_images=others, duration=100, loop=0)
    for file in sorted(PICTURES.iterdir()):
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
