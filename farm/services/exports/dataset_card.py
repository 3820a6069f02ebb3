"""Summary files of a dataset: its manifest, its card, and its Croissant metadata.

Hugging Face's hub shows the card. It also holds the configuration that `load_dataset` reads from
a folder. Croissant 1.1 is MLCommons' vocabulary for datasets: https://docs.mlcommons.org/croissant
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from farm.services.exports.rows import DESCRIPTIONS, VARIED

CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
TYPES = {"string": "sc:Text", "double": "sc:Float", "bool": "sc:Boolean"}
"""Croissant type by Arrow type. All other types are integers."""

MEDIA_TYPES = {
    ".parquet": "application/x-parquet",
    ".tar": "application/x-tar",
    ".jsonl": "application/jsonlines",
}
FILES = {"webdataset": "data/*.tar", "parquet": "data/*.parquet"}
LOADED = {
    "webdataset": 'load_dataset("webdataset", data_files="data/*.tar", split="train")',
    "parquet": 'load_dataset("parquet", data_files="data/*.parquet", split="train")',
    "imagefolder": 'load_dataset("imagefolder", data_dir="data", split="train")',
}
FORMS = {
    "webdataset": "WebDataset shards: `.png` (or `.jpg`, `.webp`), `.txt` with the prompt and "
    "`.json` with every column. Each has a Parquet with the same columns, which also lists the "
    "frames that have no picture.",
    "parquet": "Parquet shards with the pictures in the column `image`.",
    "imagefolder": "The pictures' own files, with a `metadata.parquet` in each folder.",
}


@dataclass(frozen=True)
class ExportSummary:
    """Facts about a dataset whose shards are written."""

    export_id: str
    kind: str
    schema: pa.Schema
    """Its columns."""
    jobs: Sequence[Mapping[str, Any]]
    """Jobs, each with id, pipeline, total and created_at."""
    shards: Sequence[Mapping[str, Any]]
    """Shards, each with number, job, first, stop, images, missing, rejected and files.

    `rejected` counts images that filters rejected. Each file has name, bytes and sha256.
    """
    images: int
    missing: int
    bytes: int

    @property
    def files(self) -> list[Mapping[str, Any]]:
        """All files that the manifest lists."""
        return [file for shard in self.shards for file in shard["files"]]


def manifest(summary: ExportSummary) -> bytes:
    """Build the manifest: every shard with its files' hashes, and the number of missing frames."""
    content = {
        "export": summary.export_id,
        "kind": summary.kind,
        "jobs": list(summary.jobs),
        "images": summary.images,
        "missing": summary.missing,
        "rejected": sum(shard["rejected"] for shard in summary.shards),
        "bytes": summary.bytes,
        "shards": list(summary.shards),
    }
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def card(summary: ExportSummary) -> bytes:
    """Build the README of the dataset."""
    pipelines = sorted({str(job["pipeline"]) for job in summary.jobs})
    configs = (
        f'configs:\n- config_name: default\n  data_files: "{FILES[summary.kind]}"\n'
        if summary.kind in FILES
        else ""
    )
    columns = "\n".join(
        f"| `{name}` | {DESCRIPTIONS.get(name, VARIED)} |" for name in summary.schema.names
    )
    jobs = "\n".join(
        f"- `{job['id']}`: {job['total']:,} frames of {job['pipeline']}" for job in summary.jobs
    )
    shards = f"{len(summary.shards):,} shards"
    counts = f"{summary.images:,} pictures in {shards}, {summary.bytes:,} bytes"
    missing = f"{summary.missing:,} frames have no picture"
    return f"""---
pretty_name: {json.dumps(_title(summary))}
task_categories:
- text-to-image
tags:
- synthetic
- diffusion
size_categories:
- {_size_category(summary.images)}
{configs}---

# {_title(summary)}

{counts}, rendered by
{", ".join(pipelines)}. {missing}; `missing.jsonl` lists them with
the reasons. `manifest.json` lists every shard with the sha256 of its files.

{FORMS[summary.kind]}

```python
from datasets import load_dataset

data = {LOADED[summary.kind]}
```

Every picture file holds all its parameters. `farm replay PICTURE` renders the picture again and
compares the pixels, for example `farm replay 000000000.png`.

## Jobs

{jobs}

## Columns

| column | meaning |
| --- | --- |
{columns}
""".encode()


def croissant(summary: ExportSummary) -> bytes:
    """Build the machine-readable description of the files and their columns."""
    files = [
        {
            "@type": "cr:FileObject",
            "@id": file["name"],
            "name": file["name"],
            "contentUrl": file["name"],
            "contentSize": f"{file['bytes']} B",
            "encodingFormat": MEDIA_TYPES[f".{file['name'].rpartition('.')[2]}"],
            "sha256": file["sha256"],
        }
        for file in summary.files
    ]
    tables = "data/*/metadata.parquet" if summary.kind == "imagefolder" else "data/*.parquet"
    content = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": _title(summary).lower().replace(" ", "-"),
        "description": f"{summary.images} pictures with their prompts and parameters.",
        "datePublished": str(max(job["created_at"] for job in summary.jobs))[:10],
        "version": "1.0.0",
        "distribution": [
            *files,
            {
                "@type": "cr:FileSet",
                "@id": "tables",
                "name": "tables",
                "includes": tables,
                "encodingFormat": MEDIA_TYPES[".parquet"],
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "pictures",
                "name": "pictures",
                "field": [_field(field.name, str(field.type)) for field in summary.schema],
            }
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def _field(name: str, kind: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"pictures/{name}",
        "name": name,
        "description": DESCRIPTIONS.get(name, VARIED),
        "dataType": TYPES.get(kind, "sc:Integer"),
        "source": {"fileSet": {"@id": "tables"}, "extract": {"column": name}},
    }


def _title(summary: ExportSummary) -> str:
    return f"Farm export {summary.export_id[:8]}"


def _size_category(images: int) -> str:
    """Size category in the form of Hugging Face's hub, for example `1K<n<10K`."""
    for limit, name in (
        (10**3, "n<1K"),
        (10**4, "1K<n<10K"),
        (10**5, "10K<n<100K"),
        (10**6, "100K<n<1M"),
        (10**7, "1M<n<10M"),
    ):
        if images < limit:
            return name
    return "10M<n<100M"
