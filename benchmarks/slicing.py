"""Image bytes to model-ready tensors: ours beside transformers' MiniCPM-V 4.6, Idefics3 and LLaVA-NeXT, in one run.

    python benchmarks/slicing.py                                 # 2 threads and 1 thread, then memory
    python benchmarks/slicing.py --scale-resolution 336          # or 364: the slices of LLaVA-NeXT, of Idefics3
    python benchmarks/slicing.py --threads 1 --rounds 3 --limit 6 --no-memory

**The same work.** Every processor gets the same bytes and resizes with the same (bicubic) filter. Ours plans the image
(policy `adaptive`, patches of 14 px, merged 2 x 2, up to 9 slices); each peer is then set, image by image, to the same
number of slices and, within that, to the nearest number of pixels that its own geometry allows: MiniCPM-V by its
`scale_resolution` and `max_slice_nums`, Idefics3 by the sides of tile and image, LLaVA-NeXT by its one pinpoint, which
is our grid. Where they cannot be equal, the table shows it: MiniCPM-V grows by 56 px; Idefics3 makes only grids of the
image's own aspect ratio; LLaVA-NeXT always adds an overview, also to one slice. Views count the overview.

**The fastest way of each.** A processor of transformers takes no bytes. Each peer is tried with bytes decoded by
torchvision and by Pillow, and with its torchvision and its PIL backend; ours with both of its backends. The fastest
way of each, image by image, counts. EXIF orientation, which ours reads, is left out for Pillow's ways of the peers.

**Reduced decode.** Ours may decode a large JPEG at a fraction of its size (`do_reduced_decode`), which changes pixels a
little; it is measured with that, as it comes, and without.

**Time.** In every round, the processors take turns at an image; a figure is the median of the rounds. The ratio is the
time of the fastest peer over ours. CPU time is of the process, all threads.

**Memory.** The highest resident size above that before the call, each in a fresh fork of a process that has imported
all and processed one small image. The bytes are read before; decoding, and the tensors handed out, count.

The pictures are made here, from fixed seeds: noise of all scales for photographs, printed words for scans.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import io
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont

from vlmslice.image_loading import read_image_size
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.image_processing_pil import VlmSliceImageProcessorPil
from vlmslice.slicing import SlicePlan, SlicingConfig, plan_slices

OURS, OURS_FULL = "ours", "ours, full decode"
PATCH_SIZE = 14
MAX_SLICES = 9
TOO_SLOW = 1.3
"""A way that took so many times the fastest one's time in the first round is not tried again."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# --- pictures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One file to be made: what it shows, its size in px, and how it is stored."""

    kind: str
    height: int
    width: int
    format: str
    mode: str = "RGB"

    @property
    def name(self) -> str:
        grey = " grey" if self.mode == "L" else ""
        return f"{self.kind} {self.height}x{self.width}{grey} {self.format}"

    @property
    def megapixels(self) -> float:
        return self.height * self.width / 1e6

    def encode(self) -> bytes:
        pixels = (photograph if self.kind == "photograph" else print_page)(self.height, self.width)
        buffer = io.BytesIO()
        options = {"quality": 90} if self.format == "JPEG" else {"compress_level": 6}
        Image.fromarray(pixels).convert(self.mode).save(buffer, self.format, **options)
        return buffer.getvalue()


PICTURES = [
    Picture("photograph", 274, 365, "JPEG"),
    Picture("photograph", 612, 816, "JPEG"),
    Picture("photograph", 612, 816, "PNG"),
    Picture("photograph", 1224, 1632, "JPEG"),
    Picture("photograph", 3024, 4032, "JPEG"),
    Picture("photograph", 4912, 7360, "JPEG"),
    Picture("scan", 1169, 827, "PNG"),
    Picture("scan", 2339, 1654, "PNG", "L"),
    Picture("scan", 3508, 2480, "PNG"),
    Picture("scan", 3508, 2480, "JPEG"),
    Picture("scan", 7016, 4961, "PNG", "L"),
    Picture("scan", 7016, 4961, "JPEG", "L"),
    Picture("strip", 100, 1000, "PNG"),
    Picture("strip", 500, 4000, "JPEG"),
    Picture("strip", 8000, 500, "PNG"),
    Picture("strip", 1200, 10000, "JPEG"),
    Picture("strip", 30000, 1200, "JPEG"),
]
"""Photographs, scans of A4 pages at 100, 200, 300 and 600 dpi, and strips of 8:1 to 25:1."""


def photograph(height: int, width: int) -> np.ndarray:
    """`uint8[height, width, 3]`: smooth noise of ever finer scales, and a grain as of a camera."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 128, np.int16)
    for cell, contrast in ((1 / 3, 45), (1 / 24, 30), (1 / 160, 16)):
        shape = [max(round(side / (max(height, width) * cell)), 2) for side in (height, width)]
        coarse = np.clip(rng.normal(128, contrast, (*shape, 3)), 0, 255).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        pixels -= 128
    grain = rng.normal(0, 5, (512, 512, 1)).astype(np.int16)
    for top in range(0, height, 512):
        for left in range(0, width, 512):
            block = pixels[top : top + 512, left : left + 512]
            block += grain[: block.shape[0], : block.shape[1]]
    return np.clip(pixels, 0, 255).astype(np.uint8)


def print_page(height: int, width: int) -> np.ndarray:
    """`uint8[height, width, 3]`: lines of words, 80 on a page as tall as wide, on paper that is not quite white."""
    rng = random.Random(0)
    line_height = max(min(height, width) // 60, 12)
    font = ImageFont.load_default(line_height * 2 // 3)
    page = Image.new("RGB", (width, height), (250, 249, 245))
    draw = ImageDraw.Draw(page)
    column = Image.new("RGB", (min(width, 60 * line_height), line_height))
    for top in range(line_height, height - line_height, line_height):
        for left in range(line_height, width - line_height, column.width):
            words = ("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(14))
            draw.text((left, top), " ".join(words), fill=(30, 30, 40), font=font)
    pixels = np.array(page)
    grain = np.random.default_rng(0).integers(-2, 3, (512, 512, 1)).astype(np.int16)
    for top in range(0, height, 512):
        for left in range(0, width, 512):
            block = pixels[top : top + 512, left : left + 512]
            block[:] = np.clip(block + grain[: block.shape[0], : block.shape[1]], 0, 255)
    return pixels


# --- processors -----------------------------------------------------------------------------------------------

Process = Callable[[bytes], Any]


@dataclass(frozen=True)
class Way:
    """One way from the bytes of one image to tensors: a processor, its backend and what decodes for it."""

    processor: str
    name: str
    num_slices: int
    views_megapixels: float
    process: Process


def ways(size: tuple[int, int], scale_resolution: int) -> Iterator[Way]:
    """Every way of every processor for an image of this size, ours first."""
    config = SlicingConfig(
        scale_resolution=scale_resolution, patch_size=PATCH_SIZE, max_slice_nums=MAX_SLICES
    )
    plan = plan_slices(*size, config)
    num_pixels = sum(math.prod(view.size) for view in plan.views)
    for ours, reduced in ((OURS, True), (OURS_FULL, False)):
        for name, processor_class in (
            ("torchvision", VlmSliceImageProcessor),
            ("PIL", VlmSliceImageProcessorPil),
        ):
            processor = processor_class(**config.to_dict(), do_reduced_decode=reduced)
            yield Way(ours, name, len(plan.slices), num_pixels / 1e6, process_by(processor))
    for peer in (minicpm, idefics3, llava_next):
        kwargs, num_slices, num_pixels = peer(plan)
        for name, process in peer_ways(peer.__name__, kwargs):
            yield Way(PEERS[peer.__name__][0], name, num_slices, num_pixels / 1e6, process)


def process_by(processor: Any) -> Process:
    return lambda encoded: processor(encoded, return_tensors="pt")


PEERS = {
    "minicpm": ("MiniCPM-V 4.6", "minicpmv4_6", "MiniCPMV4_6ImageProcessor"),
    "idefics3": ("Idefics3", "idefics3", "Idefics3ImageProcessor"),
    "llava_next": ("LLaVA-NeXT", "llava_next", "LlavaNextImageProcessor"),
}


PEER_NAMES = [name for name, *_ in PEERS.values()]


def build_peer(peer: str, backend: str, **kwargs: Any) -> Any:
    """An image processor of transformers; `backend` is "" (torchvision) or "Pil"."""
    from importlib import import_module

    _, package, class_name = PEERS[peer]
    module = f"transformers.models.{package}.image_processing_{'pil_' if backend else ''}{package}"
    return getattr(import_module(module), class_name + backend)(resample=Image.Resampling.BICUBIC, **kwargs)


def peer_ways(peer: str, kwargs: dict[str, Any]) -> Iterator[tuple[str, Process]]:
    from torchvision.io import ImageReadMode, decode_image

    fast, plain = build_peer(peer, "", **kwargs), build_peer(peer, "Pil", **kwargs)

    def with_torchvision(encoded: bytes) -> Any:
        data = torch.frombuffer(encoded, dtype=torch.uint8)
        image = decode_image(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return fast(image, return_tensors="pt")

    yield "torchvision", with_torchvision
    yield "Pillow, torchvision", lambda encoded: fast(Image.open(io.BytesIO(encoded)), return_tensors="pt")
    yield "Pillow, PIL", lambda encoded: plain(Image.open(io.BytesIO(encoded)), return_tensors="pt")


Match = tuple[dict[str, Any], int, int]
"""Arguments of a peer, the slices that it then makes of an image, and the pixels of all its views."""


def nearest(plan: SlicePlan, candidates: Iterator[Match]) -> Match:
    """The candidate nearest in slices, of those alike in that the one nearest in pixels."""
    num_pixels = sum(math.prod(view.size) for view in plan.views)

    def distance(match: Match) -> tuple[int, float]:
        return abs(match[1] - len(plan.slices)), abs(math.log(match[2] / num_pixels))

    return min(candidates, key=distance)


def minicpm(plan: SlicePlan) -> Match:
    geometry = build_peer("minicpm", "")

    def candidates() -> Iterator[Match]:
        for scale in range(4 * PATCH_SIZE, 560, PATCH_SIZE):
            for most in {len(plan.slices), MAX_SLICES}:
                grid = geometry.get_sliced_grid(plan.image_size, most, scale)
                arguments = scale, PATCH_SIZE, "16x"
                num_pixels = math.prod(
                    geometry.find_best_resize(plan.image_size, *arguments, allow_upscale=grid is None)
                )
                if grid is not None:
                    refined = geometry.get_refine_size(plan.image_size, grid, *arguments, allow_upscale=True)
                    num_pixels += math.prod(refined)
                num_slices = 1 if grid is None else math.prod(grid)
                yield {"scale_resolution": scale, "max_slice_nums": most}, num_slices, num_pixels

    return nearest(plan, candidates())


def idefics3(plan: SlicePlan) -> Match:
    geometry = build_peer("idefics3", "")

    def candidates() -> Iterator[Match]:
        for along in range(1, 2 * MAX_SLICES):
            for tile in range(4 * PATCH_SIZE, min(560, 4096 // along), PATCH_SIZE):
                sides = {
                    "size": {"longest_edge": along * tile},
                    "max_image_size": {"longest_edge": tile},
                }
                num_views, rows, cols = geometry.get_number_of_image_patches(*plan.image_size, sides)
                yield sides, max(rows * cols, 1), max(num_views, 1) * tile * tile

    return nearest(plan, candidates())


def llava_next(plan: SlicePlan) -> Match:
    def candidates() -> Iterator[Match]:
        for tile in range(4 * PATCH_SIZE, 560, PATCH_SIZE):
            pinpoints = [[side * tile for side in plan.grid]]
            sides = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
            num_pixels = (len(plan.slices) + 1) * tile * tile
            yield sides | {"image_grid_pinpoints": pinpoints}, len(plan.slices), num_pixels

    return nearest(plan, candidates())


# --- measuring ------------------------------------------------------------------------------------------------


def time_ways(path: Path, scale_resolution: int, rounds: int) -> list[dict[str, Any]]:
    """The seconds of every way at one image: the median of the rounds, on the clock and of the CPU."""
    encoded = path.read_bytes()
    rivals = list(ways(read_image_size(encoded), scale_resolution))
    for way in rivals:
        made = way.process(encoded)["pixel_values"].numel() / 3e6
        if way.processor not in (OURS, OURS_FULL) and abs(made - way.views_megapixels) > 1e-6:
            raise SystemExit(
                f"{way.processor} made {made} megapixels, not {way.views_megapixels} as computed"
            )
    first = {way: run(way, encoded)[0] for way in rivals}
    fastest = {way.processor: math.inf for way in rivals}
    for way, seconds in first.items():
        fastest[way.processor] = min(fastest[way.processor], seconds)
    rivals = [way for way in rivals if first[way] <= TOO_SLOW * fastest[way.processor]]
    taken: dict[Way, list[tuple[float, float]]] = {way: [] for way in rivals}
    for _ in range(rounds):
        for way in rivals:
            taken[way].append(run(way, encoded))
    return [
        {
            "processor": way.processor,
            "way": way.name,
            "slices": way.num_slices,
            "megapixels": way.views_megapixels,
            "seconds": statistics.median(wall for wall, _ in times),
            "cpu_seconds": statistics.median(cpu for _, cpu in times),
        }
        for way, times in taken.items()
    ]


def run(way: Way, encoded: bytes) -> tuple[float, float]:
    """Seconds on the clock and of the CPU."""
    start, cpu_start = time.perf_counter(), time.process_time()
    way.process(encoded)
    return time.perf_counter() - start, time.process_time() - cpu_start


def peak_megabytes(path: Path, scale_resolution: int, processor: str, name: str) -> float:
    """Peak of the resident size above its start, in a fork of this process, which must not have used threads."""
    encoded = path.read_bytes()
    size = read_image_size(encoded)
    [way] = [way for way in ways(size, scale_resolution) if (way.processor, way.name) == (processor, name)]
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from the present size
            before = resident("VmHWM")
            way.process(encoded)
            os.write(write_end, str(resident("VmHWM") - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text) / 1024


def resident(field: str) -> int:
    """A line of /proc/self/status, in KiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


def warm_up(scale_resolution: int) -> None:
    """Imports and kernels that the first image of any size would pay for."""
    for picture in (Picture("photograph", 500, 600, "JPEG"), Picture("photograph", 500, 600, "PNG")):
        encoded = picture.encode()
        for way in ways((picture.height, picture.width), scale_resolution):
            way.process(encoded)


# --- the table ------------------------------------------------------------------------------------------------


@app.command()
def main(
    scale_resolution: Annotated[
        int, typer.Option(help="Side of the square with a slice's area, in px.")
    ] = 448,
    threads: Annotated[list[int] | None, typer.Option(help="Threads of torch; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed passes over every image.")] = 5,
    limit: Annotated[int | None, typer.Option(help="Only so many of the pictures, spread evenly.")] = None,
    memory: Annotated[bool, typer.Option(help="Whether to measure the peak of memory.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for all that was measured.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Prints time and memory of ours and of the peers, image by image, and the medians of the ratios."""
    warnings.filterwarnings("ignore")
    if worker is not None:
        assert folder is not None
        measure(worker, folder, scale_resolution, rounds)
        return
    pictures = PICTURES if limit is None else PICTURES[:: max(-(-len(PICTURES) // limit), 1)]
    measured: dict[str, Any] = {"scale_resolution": scale_resolution, "rounds": rounds}
    with tempfile.TemporaryDirectory() as name:
        for number, picture in enumerate(pictures):
            (Path(name) / f"{number:02d}").write_bytes(picture.encode())
        for count in threads or [2, 1]:
            timed = start_worker("time", Path(name), count, scale_resolution, rounds)
            measured[f"threads {count}"] = timed
            print_times(pictures, timed, count)
        if memory:
            fastest = [list(fastest_ways(entries).values()) for entries in timed]
            (Path(name) / "ways.json").write_text(json.dumps(fastest))
            measured["memory"] = start_worker("memory", Path(name), 1, scale_resolution, rounds)
            print_memory(pictures, measured["memory"])
    if json_path is not None:
        measured["pictures"] = [picture.name for picture in pictures]
        json_path.write_text(json.dumps(measured, indent=1))


def start_worker(kind: str, folder: Path, threads: int, scale_resolution: int, rounds: int) -> Any:
    """Runs `measure` in a process with so many threads."""
    command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder)]
    command += ["--scale-resolution", str(scale_resolution), "--rounds", str(rounds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=environment, check=True)
    return json.loads((folder / f"{kind}.json").read_text())


def measure(kind: str, folder: Path, scale_resolution: int, rounds: int) -> None:
    warm_up(scale_resolution)
    paths = sorted(path for path in folder.iterdir() if not path.suffix)
    measured: list[Any]
    if kind == "time":
        measured = [time_ways(path, scale_resolution, rounds) for path in paths]
    else:
        chosen = json.loads((folder / "ways.json").read_text())
        measured = [
            {
                entry["processor"]: peak_megabytes(path, scale_resolution, entry["processor"], entry["way"])
                for entry in entries
            }
            for path, entries in zip(paths, chosen, strict=True)
        ]
    (folder / f"{kind}.json").write_text(json.dumps(measured))


def fastest_ways(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each processor the entry of least time."""
    best: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry["processor"] not in best or entry["seconds"] < best[entry["processor"]]["seconds"]:
            best[entry["processor"]] = entry
    return best


def print_times(pictures: list[Picture], timed: list[list[dict[str, Any]]], threads: int) -> None:
    plural = "s" if threads > 1 else ""
    typer.echo(f"\nTime in ms ({threads} thread{plural}); in brackets slices, megapixels made, way\n")
    print_header("CPU")
    ratios: list[tuple[float, ...]] = []
    for picture, entries in zip(pictures, timed, strict=True):
        best = fastest_ways(entries)
        cells = [
            f"{1000 * entry['seconds']:.1f} ({entry['slices']}, {entry['megapixels']:.2f}; {entry['way']})"
            for entry in (best[name] for name in (OURS, OURS_FULL, *PEER_NAMES))
        ]
        peer, peer_cpu = (min(best[name][key] for name in PEER_NAMES) for key in ("seconds", "cpu_seconds"))
        ratios.append(
            (
                peer / best[OURS]["seconds"],
                peer / best[OURS_FULL]["seconds"],
                peer_cpu / best[OURS]["cpu_seconds"],
            )
        )
        print_row(picture, cells, ratios[-1])
    print_medians("time of the fastest peer to ours", ratios)


def print_memory(pictures: list[Picture], peaks: list[dict[str, float]]) -> None:
    typer.echo("\nPeak memory in MB\n")
    print_header()
    ratios: list[tuple[float, ...]] = []
    for picture, peak in zip(pictures, peaks, strict=True):
        least = min(peak[name] for name in PEER_NAMES)
        ratios.append((peak[OURS] / least, peak[OURS_FULL] / least))
        cells = [f"{peak[name]:.0f}" for name in (OURS, OURS_FULL, *PEER_NAMES)]
        print_row(picture, cells, ratios[-1])
    print_medians("memory of ours to the leanest peer", ratios)


def print_header(*more_ratios: str) -> None:
    ratios = ["ratio", "full decode", *more_ratios]
    columns = ["picture", "MP", OURS, OURS_FULL, *PEER_NAMES, *ratios]
    typer.echo(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")


def print_row(picture: Picture, cells: list[str], ratios: tuple[float, ...]) -> None:
    columns = [picture.name, f"{picture.megapixels:.1f}", *cells, *(f"{ratio:.2f}" for ratio in ratios)]
    typer.echo(f"| {' | '.join(columns)} |")


def print_medians(what: str, ratios: list[tuple[float, ...]]) -> None:
    """Of the columns of `print_header`."""
    names = ("reduced decode where it applies", "full decode", "CPU time")
    medians = [
        f"{name} {statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})"
        for name, column in zip(names, zip(*ratios, strict=True), strict=False)
    ]
    typer.echo(f"\nratio of the {what}, in the median: {'; '.join(medians)}")


if __name__ == "__main__":
    app()
