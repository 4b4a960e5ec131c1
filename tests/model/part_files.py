"""Whole model files written again in several parts, by the gguf package: a writer that is not ours."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

_WRITERS_OWN = ("GGUF.", "general.architecture")


def split_copy(whole: Path, folder: Path, n_tensors: int, *, first_has_none: bool = False) -> list[Path]:
    """The paths of a copy of `whole`, in parts of so many tensors, in `folder`."""
    reader = GGUFReader(whole)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(
        folder / whole.name, architecture, split_max_tensors=n_tensors, small_first_shard=first_has_none
    )
    for name, field in reader.fields.items():
        if not name.startswith(_WRITERS_OWN):
            inner = field.types[1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{whole.stem}-*-of-*.gguf"))
