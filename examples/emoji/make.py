"""A captioned image set from an installed colour-emoji font: PNG drawings with their Unicode names.

python examples/emoji/make.py data/emoji [--font NotoColorEmoji.ttf] [--size 128] [--limit N]

Writes an image folder (`*.png` and `metadata.jsonl`) that `shoestring encode` reads as it is. Needs Pillow
only. People also come in five skin tones where Pillow can draw them (it needs its `raqm` layout, which the
published wheels have).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "C:/Windows/Fonts/seguiemj.ttf",
)
PIXELS = (109, 160, 136, 128)  # sizes that bitmap fonts come in: Noto's, Apple's, others'
RANGES = ((0x203C, 0x3300), (0x1F000, 0x1FB00))
TONES = {
    "\U0001f3fb": "light skin tone",
    "\U0001f3fc": "medium light skin tone",
    "\U0001f3fd": "medium skin tone",
    "\U0001f3fe": "medium dark skin tone",
    "\U0001f3ff": "dark skin tone",
}
HELP = (
    "No colour-emoji font found. Install one (Debian, Ubuntu: apt install fonts-noto-color-emoji; "
    "Fedora: dnf install google-noto-color-emoji-fonts) or give one with --font."
)


def find_font() -> str:
    """The first known font that is there, else what fontconfig knows; ends the program without one."""
    for path in FONTS:
        if Path(path).is_file():
            return path
    if shutil.which("fc-list"):
        found = subprocess.run(
            ["fc-list", ":color=true", "file"], capture_output=True, text=True, check=False
        )
        for line in found.stdout.splitlines():
            if "emoji" in line.lower():
                return line.strip().rstrip(":")
    sys.exit(HELP)


def open_font(path: str) -> ImageFont.FreeTypeFont:
    """The font at a size it has."""
    for pixels in PIXELS:
        try:
            return ImageFont.truetype(path, pixels)
        except OSError as error:
            problem = error
    sys.exit(f"{path}: cannot be opened as a colour font ({problem}). {HELP}")


def characters() -> Iterator[tuple[str, str]]:
    """(text, caption) of every symbol that could be an emoji, and of it in five skin tones."""
    toned = features.check("raqm")
    for start, stop in RANGES:
        for code in range(start, stop):
            symbol = chr(code)
            if unicodedata.category(symbol) != "So" or symbol in TONES:
                continue
            name = unicodedata.name(symbol, "").lower()
            yield symbol, name
            if toned:
                for tone, words in TONES.items():
                    yield symbol + tone, f"{name} {words}"


def draw(font: ImageFont.FreeTypeFont, text: str, size: int, widest: float) -> Image.Image | None:
    """One coloured glyph in the middle of a white square; None where the font has not exactly that."""
    width = font.getlength(text)
    if not 0 < width <= widest:  # nothing, or two glyphs side by side
        return None
    side = int(1.3 * max(font.size, widest))
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((side // 8, side // 8), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or canvas.convert("RGB").convert("HSV").getchannel("S").getextrema()[1] < 30:
        return None
    glyph = canvas.crop(box)
    square = max(glyph.size) * 17 // 16
    picture = Image.new("RGBA", (square, square), (255, 255, 255, 255))
    picture.alpha_composite(glyph, ((square - glyph.width) // 2, (square - glyph.height) // 2))
    return picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def main() -> None:
    """Draw every emoji of the font into a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the images go")
    parser.add_argument("--font", help="a colour-emoji font; the installed one by default")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--limit", type=int, help="stop after so many")
    arguments = parser.parse_args()
    font = open_font(arguments.font or find_font())
    widest = 1.2 * font.getlength("\U0001f600")  # of a face, which every such font has
    arguments.folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(arguments.folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for text, caption in characters():
            picture = draw(font, text, arguments.size, widest)
            if picture is None:
                continue
            name = "-".join(f"{ord(each):05x}" for each in text) + ".png"
            picture.save(arguments.folder / name)
            metadata.write(json.dumps({"file_name": name, "text": caption}) + "\n")
            count += 1
            if count == arguments.limit:
                break
    print(
        f"{arguments.folder}: {count} drawings. Next: shoestring encode {arguments.folder} --out stores/emoji"
    )


if __name__ == "__main__":
    main()
