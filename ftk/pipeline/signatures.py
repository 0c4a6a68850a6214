"""Which files hold an image, told by their first bytes and not by their suffix."""

HEAD_BYTES = 32
_STARTS = (
    *((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF")),
    *((b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF")),
    *((b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"\xff\x0a", "JPEG XL"), (b"II\xbc\x01", "JPEG XR")),
    *((b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000")),
    *((b"8BPS\0\x01", "Photoshop"), (b"8BPS\0\x02", "large Photoshop"), (b"gimp xcf", "GIMP")),
    *((b"v/1\x01", "OpenEXR"), (b"#?RADIANCE", "Radiance HDR"), (b"#?RGBE", "Radiance HDR")),
    *((b"DDS |\0\0\0", "DDS"), (b"qoif", "QOI"), (b"icns", "ICNS"), (b"\0\0\1\0", "ICO")),
    *((b"FUJIFILMCCD-RAW", "camera raw"), (b"IIRO", "camera raw"), (b"IIRS", "camera raw"), (b"MMOR", "camera raw")),
    *((b"IIU\0", "camera raw"), (b"FOVb", "camera raw"), (b"\0MRM", "camera raw")),
)
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    **dict.fromkeys((b"mif1", b"mif2", b"msf1"), "HEIF"),
    b"crx ": "camera raw",
}
OTHER_SUFFIXES = frozenset(
    # Text, tables, settings and programs;
    {".txt", ".text", ".md", ".rst", ".rtf", ".doc", ".docx", ".odt", ".pdf", ".html", ".htm", ".xml", ".xmp", ".aae", ".pp3"}
    | {".caption", ".captions", ".cap", ".tag", ".tags", ".prompt", ".prompts", ".desc", ".description", ".url", ".lnk"}
    | {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log"}
    | {".py", ".ipynb", ".sh", ".ps1", ".bat", ".exe", ".dll", ".db", ".sqlite", ".lock", ".tmp", ".part", ".crdownload"}
    # arrays and weights; archives; sound and subtitles.
    | {".npz", ".npy", ".pt", ".pth", ".ckpt", ".pkl", ".bin", ".safetensors", ".onnx", ".gguf"}
    | {".tar", ".tgz", ".gz", ".zip", ".7z", ".rar", ".mp3", ".wav", ".flac", ".aac", ".ogg", ".srt", ".vtt"}
)
"""Suffixes, in small letters, of files that are never looked at: they are no image, whatever lies beside them."""


def name(head: bytes) -> str | None:
    """What kind of image a file is by its first `HEAD_BYTES`; None for anything else."""
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head.startswith(b"RIFF"):
        return "WebP" if head[8:12] == b"WEBP" else None
    if head.startswith(b"BM"):
        # Two letters begin many a text: the reserved fields are zero, and the size of the next header is a known one.
        return "BMP" if head[6:10] == b"\0\0\0\0" and head[14:18] in _BMP_HEADERS else None
    if head[:1] == b"P" and head[1:2] in (b"4", b"5", b"6") and head[2:3] in (b"\n", b" ", b"\r", b"\t"):
        return "PNM" if head[3:4].isdigit() or head[3:4] == b"#" else None
    return next((kind for start, kind in _STARTS if head.startswith(start)), None)


_BMP_HEADERS = frozenset(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))
