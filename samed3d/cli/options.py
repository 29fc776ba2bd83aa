"""Option types that several commands share, and the check that an input exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or mps.")]
Model = Annotated[str, typer.Option(help="Shipped checkpoint, .safetensors file, or hf://OWNER/NAME.")]
MinIslandMm3 = Annotated[float, typer.Option(help="Remove separate pieces below this volume.")]
KeepLargest = Annotated[bool, typer.Option("--keep-largest", help="Keep the largest piece only.")]
FillHoles = Annotated[bool, typer.Option("--fill-holes", help="Fill what the mask encloses.")]
SmoothMm = Annotated[float, typer.Option(help="Round the surface; thinner parts disappear.")]
GrowMm = Annotated[float, typer.Option(help="Move the surface outwards; negative: inwards.")]
MaskFormat = Annotated[
    str | None, typer.Option(help="nifti, nrrd, mha, seg.nrrd, dicom-seg or rtstruct. [default: by the suffix]")
]
Modality = Annotated[str | None, typer.Option(help="CT, MR, ... [default: the DICOM tag, or by intensities]")]
Untilt = Annotated[
    bool, typer.Option("--untilt", help="Resample tilted or unevenly spaced DICOM slices by their positions.")
]
Texts = list[str] | None
Codes = Annotated[
    Texts, typer.Option("--code", metavar="OBJECT=SCHEME:VALUE:MEANING", help="DICOM code of an object (name or id).")
]
Paths = list[Path] | None
