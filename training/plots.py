"""Where a model of pictures and words looks, and what it takes for alike, as plots of scenes it never learned from.

python -m training.plots runs/vlm/final.safetensors --out runs/vlm/plots

attention.png    by layer and head, over the picture, as each word of a caption is said
similarity.png   of pictures and captions, each with each
embeddings.png   t-SNE of the embeddings of pictures that show one object, and of their captions
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from tqdm import tqdm

from mm_edge.cli import at_least
from mm_edge.errors import EdgeError, needs
from mm_edge.sim.rooms import COLOURS, SHAPES
from training import vlm
from training.lessons import Texts, padded
from training.metrics import recall_at
from training.scenes import Scene, make_scene
from training.vision_language import VisionLanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IN_MATRIX = 16  # pictures
LONGEST = 12  # words of the caption over which attention is drawn
LEAST_SHARE = 0.05  # of the attention, that is drawn as much: who looks everywhere looks nowhere
MARKERS = dict(zip(SHAPES, "osD"))
DPI = 110


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the weights, beside their recipe.yaml")
    parser.add_argument("--out", type=Path, help="folder for the plots (plots, beside the weights)")
    parser.add_argument("--scenes", type=at_least(20), default=300)
    parser.add_argument("--seed", type=at_least(0), default=3_000_000, help="of the first scene")
    args = parser.parse_args(argv)
    out = args.out or args.checkpoint.parent / "plots"
    try:
        recipe, model = vlm.read_model(args.checkpoint)
        if recipe.data:
            raise ValueError(f"{args.checkpoint}: learned from a folder; the plots are of scenes")
        _find_libraries()
        seeds = range(args.seed, args.seed + args.scenes)
        scenes, texts = [make_scene(seed) for seed in tqdm(seeds, "scenes", leave=False)], Texts(vlm.words(recipe))
        out.mkdir(parents=True, exist_ok=True)
        for name, plot in (("attention", attention), ("similarity", similarity), ("embeddings", embeddings)):
            plot(model, texts, scenes).savefig(out / f"{name}.png", dpi=DPI)
            print(out / f"{name}.png")
    except (OSError, ValueError, EdgeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _find_libraries() -> None:
    """Before scenes are made. Raises MissingDependency."""
    with needs("plots", "matplotlib", "compare"):
        import matplotlib
    matplotlib.use("agg")
    with needs("t-SNE", "sklearn", "compare"):
        import sklearn.manifold  # noqa: F401


@torch.no_grad()
def attention(model: VisionLanguageModel, texts: Texts, scenes: list[Scene]) -> Figure:
    """A column for each word, a row for each head of each layer; outlined is the object that a word names."""
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    scene = max(scenes, key=_fit_to_be_drawn)
    seen = model.encode_image(torch.from_numpy(scene.image)[None])
    tokens = torch.tensor([texts.caption(scene.captions[0])])
    looked = torch.stack(model.decode(tokens, seen).attention, 1)[0, ..., :-1].unflatten(-1, model.image.grid).numpy()
    says = texts.text(model.generate(seen, model.begin(1))[0].tolist())
    said = [*scene.captions[0].replace(",", "").split(), "(end)"]
    named, masks = vlm.shapes_after(scene.captions[0]), {thing.name: thing.mask for thing in scene.things}
    (layers, heads), (height, width) = looked.shape[:2], scene.image.shape[:2]
    rows, panel_in = layers * heads, 1.15
    figure = pyplot.figure(figsize=(panel_in * (len(said) + 3.6), max(6.5, panel_in * height / width * rows + 0.6)))
    left, right = figure.subfigures(1, 2, width_ratios=[3.1, len(said) + 0.5])
    shown = left.add_axes((0.04, 0.55, 0.92, 0.4))
    shown.imshow(scene.image)
    shown.set_axis_off()
    note = (
        f"caption: {scene.captions[0]}",
        f"the model says: {textwrap.shorten(says, 120)}",
        "Attention as the word above is said; in each corner the most that one cell gets. Outlined: the object that "
        "the word names, at which head 1 of the last layer learned to look.",
    )
    left.text(0.05, 0.5, "\n\n".join(textwrap.fill(part, 42) for part in note), va="top", fontsize=10)
    axes = right.subplots(rows, len(said), squeeze=False)
    right.subplots_adjust(0.055, 0.01, 0.995, 1 - 0.35 / figure.get_figheight(), wspace=0.04, hspace=0.06)
    grey = np.repeat(scene.image.mean(-1, keepdims=True), 3, -1).astype(np.uint8) // 2 + 90
    most = max(LEAST_SHARE, np.quantile(looked.max((-1, -2)), 0.85))
    scale = PowerNorm(0.5, 0, most, clip=True)
    for row, of_head in enumerate(looked.reshape(rows, *looked.shape[2:])):
        for column, (word, weights) in enumerate(zip(said, of_head)):
            panel, drawn = axes[row, column], cv2.resize(weights, (width, height), interpolation=cv2.INTER_CUBIC)
            panel.imshow(grey)
            heat = panel.imshow(drawn, cmap="inferno", norm=scale, alpha=np.clip(1.3 * scale(drawn), 0, 0.9))
            corner = panel.text(3, 14, f"{weights.max():.0%}", fontsize=7, color="w")
            corner.set_path_effects([withStroke(linewidth=1.5, foreground="k")])
            if named[column] in masks:
                panel.contour(masks[named[column]], [0.5], colors="cyan", linewidths=1.2)
            panel.set(xticks=[], yticks=[])
            if not row:
                panel.set_title(word, fontsize=11)
        name = f"layer {row // heads + 1}\nhead {row % heads + 1}"
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    bar = left.colorbar(heat, cax=left.add_axes((0.06, 0.09, 0.8, 0.02)), orientation="horizontal", extend="max")
    bar.solids.set_alpha(1)
    bar.set_label("share of the attention in a cell")
    bar.ax.xaxis.set_major_locator(MaxNLocator(3))
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _fit_to_be_drawn(scene: Scene) -> tuple[bool, int, int, float]:
    """A short caption, many objects, of different shapes, none of them hardly to be seen."""
    short = len(scene.captions[0].split()) < LONGEST
    least = min((int(t.mask.sum()) for t in scene.things), default=0)
    return short, len(scene.things), len({t.shape for t in scene.things}), least


@torch.no_grad()
def similarity(model: VisionLanguageModel, texts: Texts, scenes: list[Scene]) -> Figure:
    """Of IN_MATRIX scenes of which no two show the same: a row for each caption, a column for each picture."""
    from matplotlib import pyplot

    different: dict[tuple[str, ...], Scene] = {}
    for scene in scenes:
        different.setdefault(tuple(thing.name for thing in scene.things), scene)
    chosen = [different[key] for key in sorted(list(different)[:IN_MATRIX])]
    images = torch.from_numpy(np.stack([scene.image for scene in chosen]))
    read = model.encode_text(padded([texts.tokens(scene.captions[0]) for scene in chosen]))
    alike = (read @ model.encode_image(images).embedding.T).numpy()
    n, right = len(chosen), np.eye(len(chosen), dtype=bool)
    figure, axes = pyplot.subplots(figsize=(0.8 * n + 4.5, 0.8 * n + 1.4))
    figure.subplots_adjust(3.6 / figure.get_figwidth(), 0.02, 0.93, 1 - 1.25 / figure.get_figheight())
    drawn = axes.imshow(alike, cmap="viridis", aspect="auto")
    for i, scene in enumerate(chosen):
        best = alike[i].argmax()
        axes.plot(best, i, "o", mfc="none", mec="black" if best == i else "red", ms=16, mew=2)
        thumbnail = axes.inset_axes((i - 0.48, -1.32, 0.96, 0.76), transform=axes.transData)
        thumbnail.imshow(scene.image)
        thumbnail.set_axis_off()
    axes.set_yticks(range(n), [scene.captions[0].removesuffix(" from left to right") for scene in chosen], fontsize=9)
    axes.set_xticks([])
    figure.suptitle(
        f"Of each caption the picture that is most like it, ringed: {recall_at(alike, right, 1):.0%} are its own (red: "
        f"another's). Of each picture the caption: {recall_at(alike.T, right, 1):.0%}", fontsize=10,
    )  # fmt: skip
    figure.colorbar(drawn, label="cosine similarity", fraction=0.025, pad=0.02)
    return figure


@torch.no_grad()
def embeddings(model: VisionLanguageModel, texts: Texts, scenes: list[Scene]) -> Figure:
    """Of scenes that show one object: its colour is the colour, its shape the marker; texts have a black edge."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from sklearn.manifold import TSNE

    things = [scene.things[0] for scene in scenes if len(scene.things) == 1]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes if len(scene.things) == 1]))
    labels = vlm.labelled()
    read = model.encode_text(padded([texts.tokens(text) for text in labels.values()]))
    both = torch.cat([model.encode_image(images).embedding, read]).numpy()
    at = TSNE(metric="cosine", init="pca", perplexity=min(20, len(both) / 4), random_state=0).fit_transform(both)
    figure, axes = pyplot.subplots(figsize=(10, 7.5), layout="constrained")
    for (x, y), thing in zip(at, things):
        axes.plot(x, y, MARKERS[thing.shape], color=COLOURS[thing.colour], ms=6, alpha=0.6, mew=0)
    for (x, y), name in zip(at[len(things) :], labels):
        colour, shape = name.split()
        axes.plot(x, y, MARKERS[shape], color=COLOURS[colour], ms=11, mec="k", mew=1.6)
        axes.annotate(labels[name], (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=8)
    keys = [Line2D([], [], ls="", marker=MARKERS[shape], color="grey", mew=0, label=f"picture of a {shape}")
            for shape in SHAPES]  # fmt: skip
    keys.append(Line2D([], [], ls="", marker="o", color="lightgrey", mec="k", mew=1.6, ms=11, label="text"))
    axes.legend(handles=keys, loc="best", fontsize=9)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"t-SNE of the embeddings of {len(things)} pictures of one object and of {len(labels)} texts")
    return figure


if __name__ == "__main__":
    sys.exit(main())
