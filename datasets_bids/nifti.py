"""The `Nifti` feature, mended: encode, decode and cast, on `datasets`' own class.

How it works:

- A value is stored as `{"bytes", "path"}`, as ever. What an image is told by are its first bytes, never its name.
- `decode_example` returns a plain nibabel image. From bytes it is lazy: nibabel's own array proxy reads from a
  `StoredFile`, a read-only file over the stored bytes that inflates no more than is asked for, can be shared by
  threads and pickles at its compressed size.
- `encode_example` asks what an image was read from and reads that header again. If nothing that nibabel would write
  differs, the very bytes (or the path) it came from are stored; otherwise the image is serialized, and voxels that
  were not touched keep their stored values and scale factors.
- Everything above the line "Patches" could stand in `features/nifti.py`; below it are the places of `datasets` that
  have to know about images.
"""

import bz2
import copy
import dataclasses
import functools
import gzip
import io
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, List, concatenate_datasets, config
from datasets.arrow_dataset import transmit_format
from datasets.arrow_writer import TypedSequence
from datasets.features import Features, Nifti
from datasets.features.features import _visit, cast_to_python_objects, decode_nested_example, encode_nested_example
from datasets.utils.file_utils import is_local_path, xopen
from numpy.lib import recfunctions

from .patching import Patch
from .shards import download_config, local_path, refuse_content


if TYPE_CHECKING:
    import nibabel as nib


_CHUNK = 1 << 18
"""Bytes inflated at a time: large against the cost of a call, small against an image."""

_HEAD = 1024
"""Bytes that tell an image by: the longest header (NIfTI-2, 540 bytes) and what nibabel itself looks at."""


class StoredFile(io.RawIOBase):
    """What one stored image inflates to, as a read-only file that array proxies and threads can share.

    Each thread has its own position, so nibabel's seek-then-read pairs cannot get mixed up. Inflated data are not kept
    as long as reads move forward (a header, a first slice, the whole array). From the first read that goes back, what
    is inflated is kept, so that no byte is inflated a third time.

    Args:
        source: The bytes as stored, or the local path of a file that nibabel cannot open by its name.
        path: The name that goes with the bytes, for messages and for storing them again.

    Raises:
        OSError: on reading, if the data are damaged or cut off. The message names the file.
    """

    def __init__(self, source: Union[bytes, str], path: Optional[str] = None):
        super().__init__()
        self.source = source
        self.path = source if isinstance(source, str) else path
        self.name = self.path or "<bytes without a path>"
        self.expected_nbytes = 0
        """Bytes that header and voxels take. A read within them that comes out short is an error, not the end."""
        self._lock = threading.Lock()
        self._local = threading.local()
        self._stream: Any = None
        self._at = 0
        self._kept: Optional[bytearray] = None
        with self._raw() as f:
            start = f.read(4)
        self.compression = next((kind for kind, magic in _MAGIC.items() if start.startswith(magic)), None)

    def __reduce__(self):
        return _restore_stored_file, (type(self), self.source, self.path, self.expected_nbytes)

    def _raw(self) -> Any:
        # BytesIO shares the bytes object, it makes no copy
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb")

    def _open(self) -> Any:
        return self._raw() if self.compression is None else _open_compressed(self.compression, self._raw())

    def head(self) -> bytes:
        """The first bytes of the inflated file, read on the side so that the forward stream is still untouched."""
        with self._reported(), self._open() as stream:
            head = b""
            while len(head) < _HEAD and (piece := _read1(stream, _HEAD - len(head), first=not head)):
                head += piece
        return head

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return getattr(self._local, "position", 0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            # numpy.memmap asks for the end before anything else and goes another way when it gets this error
            raise io.UnsupportedOperation("the inflated size is not known before everything is inflated")
        self._local.position = offset + (self.tell() if whence == os.SEEK_CUR else 0)
        return self._local.position

    def readinto(self, buffer) -> int:
        start = self.tell()
        with memoryview(buffer) as given, given.cast("B") as view:
            with self._lock, self._reported():
                if self.compression is None:
                    n = self._read_plain(start, view)
                elif self._kept is not None or (self._stream is not None and start < self._at):
                    n = self._read_kept(start, view)
                else:
                    n = self._read_forward(start, view)
            if n < len(view) and start + len(view) <= self.expected_nbytes:
                raise OSError(
                    f"{self.name}: cut off after {start + n} of {self.expected_nbytes} bytes. "
                    "Fetch or convert the file again."
                )
        self._local.position = start + n
        return n

    def _read_plain(self, start: int, view: memoryview) -> int:
        if self._stream is None:
            self._stream = self._raw()
        self._stream.seek(start)
        return self._stream.readinto(view)

    def _read_forward(self, start: int, view: memoryview) -> int:
        if self._stream is None:
            self._stream, self._at = self._open(), 0
        while self._at < start:
            if not self._inflate(start - self._at):
                return 0
        n = 0
        while n < len(view) and (piece := self._inflate(len(view) - n)):
            view[n : n + len(piece)] = piece
            n += len(piece)
        self._check_end()
        return n

    def _read_kept(self, start: int, view: memoryview) -> int:
        if self._kept is None or self._stream is None:
            self._close_stream()
            self._stream, self._at, self._kept = self._open(), 0, bytearray()
        end = start + len(view)
        if self._at < end:
            while self._at < end and (piece := self._inflate(end - self._at)):
                self._kept += piece
            self._check_end()
        with memoryview(self._kept) as kept, kept[start:end] as part:
            view[: len(part)] = part
            return len(part)

    def _inflate(self, size: int) -> bytes:
        piece = _read1(self._stream, min(size, _CHUNK), first=self._at == 0)
        self._at += len(piece)
        return piece

    def _check_end(self) -> None:
        # The checksum behind the last byte is only looked at by a read that goes there, and nibabel's end before it
        if hasattr(self._stream, "peek"):
            try:
                self._stream.peek(1)
            except gzip.BadGzipFile as e:
                if not _is_trailing(e):
                    raise

    def _reported(self) -> "_Reported":
        return _Reported(self)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        if not self.closed:
            self._close_stream()
            self._kept = None
        super().close()


class _Reported:
    """Turns what a decompressor raises (each its own class) into an `OSError` that names the file."""

    def __init__(self, file: StoredFile):
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, (MemoryError, ImportError)):
            return
        self.file._close_stream()
        self.file._kept = None
        if self.file.compression is not None:
            raise OSError(
                f"{self.file.name}: the {self.file.compression} data are damaged or cut off ({error}). "
                "Fetch the file again."
            ) from error


def _restore_stored_file(cls, source, path, expected_nbytes) -> StoredFile:
    file = cls(source, path)
    file.expected_nbytes = expected_nbytes
    return file


_MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}


def _open_compressed(compression: str, raw: Any) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if compression == "bzip2":
        return bz2.BZ2File(raw)
    from nibabel.openers import ImageOpener

    # nibabel knows which zstd package it works with, and says which one to install
    zstd_open, _ = ImageOpener.compress_ext_map[".zst"]
    return zstd_open(raw, "rb")


def _read1(stream: Any, size: int, first: bool) -> bytes:
    try:
        # read1 hands over what was inflated before the stream looks further, so nothing is lost if that fails
        return stream.read1(size)
    except gzip.BadGzipFile as e:
        if first or not _is_trailing(e):
            raise
        return b""


def _is_trailing(error: gzip.BadGzipFile) -> bool:
    """True for bytes behind the last gzip member that are no gzip: gunzip and nibabel ignore them."""
    return str(error).startswith("Not a gzipped file")


def looks_like(head: bytes) -> Optional[str]:
    """What a file that is no NIfTI image is, and what to do about it ("is ...: ..."); `None` if nothing is recognized.

    Args:
        head: The first bytes (about a thousand) of the inflated file.
    """
    if not head:
        return "is empty: fetch it again"
    if head.lstrip().startswith(b"<?xml"):
        return "is an XML document, most likely the error message of a download: fetch it again"
    if _is_pair_header(head):
        return "is the header half of a .hdr/.img pair: convert the pair to one .nii.gz file"
    if head[128:132] == b"DICM":
        return "is a DICOM file: convert the series with dcm2niix"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip archive: extract it"
    return refuse_content(head)


def _is_pair_header(head: bytes) -> bool:
    return head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0"


def _not_an_image(name: str, head: bytes) -> ValueError:
    reason = looks_like(head) or f"starts with {head[:16]!r}, which is neither NIfTI-1, NIfTI-2 nor CIFTI-2"
    return ValueError(f"{name} is no NIfTI image: it {reason}.")


def _load_stored(file: StoredFile) -> "nib.Nifti1Image":
    """The image in `file`: a plain `Nifti1Image`, `Nifti2Image` or `Cifti2Image`.

    Raises:
        ValueError: if the bytes are no NIfTI image. The message names the file.
    """
    import nibabel as nib

    head = file.head()
    for image_class in (nib.Nifti1Image, nib.Cifti2Image, nib.Nifti2Image):
        if image_class.header_class.may_contain_header(head) and not _is_pair_header(head):
            break
    else:
        raise _not_an_image(file.name, head)
    try:
        image = image_class.from_file_map({"image": nib.FileHolder(fileobj=file)}, mmap=False)
    except OSError:
        raise
    except Exception as e:
        raise ValueError(f"{file.name}: the NIfTI header cannot be read ({e}). Convert the file again.") from e
    file.expected_nbytes = _expected_nbytes(image)
    return image


def refuse_image(path: str) -> Optional[str]:
    """Why the local file at `path`, once it is embedded, would be no image, or `None`. Inflates no more than the header."""
    try:
        file = StoredFile(path)
        _load_stored(file)
    except (ValueError, OSError) as e:
        return str(e).removeprefix(path).lstrip(": ")
    nbytes = os.path.getsize(path)
    if file.compression is None and nbytes < file.expected_nbytes:
        return f"is cut off: it has {nbytes} of {file.expected_nbytes} bytes; fetch or convert it again"
    return None


def _load_path(path: str) -> "nib.spatialimages.SpatialImage":
    """The image at a local `path`: as `nibabel.load` has it, or by its content if its name does not say what it is."""
    import nibabel as nib

    try:
        image = nib.load(path)
    except nib.filebasedimages.ImageFileError as e:
        file = StoredFile(path)
        head = file.head()
        if looks_like(head) is None and str(path).lower().endswith((".img", ".hdr", ".mgz", ".mgh", ".mnc")):
            raise ValueError(f"{path} cannot be read: {e}") from e
        return _load_stored(file)
    except FileNotFoundError as e:
        if os.path.islink(path):
            raise FileNotFoundError(
                f"{path} is a link to a file that is not there: run `datalad get` or `git annex get` to fetch it."
            ) from e
        raise
    except OSError:
        raise
    except Exception as e:
        raise ValueError(f"{path}: the header cannot be read ({e}). Convert the file again.") from e
    if isinstance(image, nib.Nifti1Image) and not path.lower().endswith((".gz", ".bz2", ".zst")):
        if os.path.getsize(path) < _expected_nbytes(image):
            # Cut off, or a header alone, as in bids-examples: readable until voxels are asked for, and then named
            return _load_stored(StoredFile(path))
    return image


def _expected_nbytes(image: "nib.dataobj_images.DataobjImage") -> int:
    proxy = image.dataobj
    return int(proxy.offset) + int(np.prod(proxy.shape, dtype=object)) * proxy.dtype.itemsize


def is_image(value: Any) -> bool:
    """True for a nibabel image with voxels or grayordinates. Imports nothing: without nibabel there are no images."""
    nibabel = sys.modules.get("nibabel")
    return nibabel is not None and isinstance(value, nibabel.dataobj_images.DataobjImage)


def encode_example(
    self: Nifti, value: Union[str, os.PathLike, bytes, bytearray, dict, "nib.Nifti1Image"]
) -> dict[str, Optional[Union[str, bytes]]]:
    """Encode an example into the format for Arrow.

    Args:
        value: A path, the bytes of a file, a dictionary with "path" and/or "bytes", or a nibabel image. An image that
            was read from a file or from bytes and not modified is stored as that path or those bytes. As in nibabel,
            changes to the array that `get_fdata` caches are no changes to the image.

    Returns:
        `dict` with "path" and "bytes".

    Raises:
        ValueError: if the value is none of these.
    """
    if isinstance(value, str):
        return {"path": value, "bytes": None}
    elif isinstance(value, os.PathLike):
        return {"path": str(Path(value).absolute()), "bytes": None}
    elif isinstance(value, (bytes, bytearray, memoryview)):
        return {"path": None, "bytes": bytes(value)}
    elif is_image(value):
        return encode_nibabel_image(value)
    elif isinstance(value, dict):
        path, bytes_ = value.get("path"), value.get("bytes")
        path = os.fspath(path) if path is not None else None
        if bytes_ is not None and path is not None and _holds(path, bytes_):
            # not duplicated: the data are available locally
            return {"path": path, "bytes": None}
        elif bytes_ is not None or path is not None:
            return {"path": path, "bytes": bytes_}
        else:
            raise ValueError(
                f"A nifti sample should have one of 'path' or 'bytes' but they are missing or None in {value}."
            )
    else:
        raise ValueError(
            f"A nifti sample should be a string, bytes, Path, nibabel image, or dict, but got {type(value)}."
        )


def _holds(path: str, bytes_: bytes) -> bool:
    # A relative path names a file of the dataset repository; one in the working directory is another file
    return (
        os.path.isabs(path)
        and os.path.isfile(path)
        and os.path.getsize(path) == len(bytes_)
        and Path(path).read_bytes() == bytes_
    )


def encode_nibabel_image(
    img: "nib.dataobj_images.DataobjImage", force_bytes: bool = False
) -> dict[str, Optional[Union[str, bytes]]]:
    """Encode a nibabel image into a dictionary.

    An image that was not modified since it was read is encoded as what it was read from, byte for byte.
    Any other is serialized as an uncompressed NIfTI file.

    Args:
        img: A nibabel image.
        force_bytes: Encode the bytes of the file instead of its path.

    Returns:
        `dict` with "path" and "bytes".
    """
    source = _unmodified_source(img)
    if isinstance(source, StoredFile) and isinstance(source.source, bytes):
        return {"path": source.path, "bytes": source.source}
    if source is not None:
        path = os.path.abspath(source.source if isinstance(source, StoredFile) else source)
        if not force_bytes:
            return {"path": path, "bytes": None}
        if len(img.files_types) == 1:
            return {"path": os.path.basename(path), "bytes": Path(path).read_bytes()}
    return {"path": None, "bytes": _to_bytes(img)}


def _unmodified_source(image: "nib.dataobj_images.DataobjImage") -> Union[None, str, StoredFile]:
    """The path or the file that `image` was read from, if nibabel would write nothing else than what is there."""
    proxy = image.dataobj
    if not getattr(proxy, "is_proxy", False) or getattr(image, "_dtype_alias", None) is not None:
        return None
    # Formats with proxies of their own (MINC, PAR/REC) do not say what the proxy reads from
    source = getattr(proxy, "file_like", None) or image.get_filename()
    try:
        if isinstance(source, StoredFile):
            as_read = _load_stored(StoredFile(source.source, source.path))
        elif isinstance(source, (str, os.PathLike)):
            source = os.fspath(source)
            as_read = _load_path(source)
        else:
            return None
    except (OSError, ValueError):
        return None  # the file is no longer what it was
    same = (
        isinstance(image, type(as_read))
        and all(
            getattr(proxy, name, None) == getattr(as_read.dataobj, name, None)
            for name in ("shape", "dtype", "offset", "slope", "inter", "order")
        )
        and _equal_affines(getattr(image, "affine", None), getattr(as_read, "affine", None))
        and _written_headers(image) == _written_headers(as_read)
    )
    return source if same else None


def _equal_affines(a: Optional[np.ndarray], b: Optional[np.ndarray]) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b, equal_nan=True))


def _written_headers(image: "nib.dataobj_images.DataobjImage") -> list[Any]:
    """Everything that is written before the voxels, in a form that compares."""
    header, cifti_code = image.header, None
    written: list[Any] = []
    if hasattr(image, "nifti_header"):
        # CIFTI-2: the header that users edit is parsed from an extension, and written in its place
        written.append(header.to_xml())
        header, cifti_code = image.nifti_header, 32
    written.append(header.binaryblock if hasattr(header, "binaryblock") else header)
    written.append(getattr(header, "endianness", None))
    for extension in getattr(header, "extensions", ()):
        if extension.get_code() != cifti_code:
            f = io.BytesIO()
            extension.write_to(f, byteswap=False)
            written.append(f.getvalue())
    return written


def _to_bytes(image: "nib.dataobj_images.DataobjImage") -> bytes:
    import nibabel as nib

    if isinstance(image, nib.Cifti2Image):
        return copy.copy(image).to_bytes()
    image_class = type(image) if isinstance(image, nib.Nifti1Image) else nib.Nifti1Image
    if image_class is nib.Nifti1Image and max(image.shape, default=0) > np.iinfo(np.int16).max:
        image_class = nib.Nifti2Image
    header, proxy = image_class.header_class.from_header(image.header), image.dataobj
    alias = getattr(image, "_dtype_alias", None)
    if (
        isinstance(proxy, nib.arrayproxy.ArrayProxy)
        and (proxy.slope, proxy.inter) != (1.0, 0.0)
        and proxy.dtype == header.get_data_dtype()
        and header.get_slope_inter() == (None, None)
        and alias is None
    ):
        # Only the header was edited: scaling the voxels anew would change them
        image = image_class(proxy.get_unscaled(), image.affine, header)
        image.header.set_slope_inter(proxy.slope, proxy.inter)
        return image.to_bytes()
    if isinstance(image, image_class):
        # a copy, because nibabel lets an image point to where it was last written
        return copy.copy(image).to_bytes()
    return image_class(proxy, image.affine, header).to_bytes()


def decode_example(
    self: Nifti, value: Union[str, dict], token_per_repo_id: Optional[dict[str, Union[str, bool, None]]] = None
) -> "nib.Nifti1Image":
    """Decode an example into a nibabel image.

    Args:
        value: A path, or a dictionary with "path" and "bytes". The format (NIfTI-1, NIfTI-2, CIFTI-2; plain, gzip,
            bzip2, zstd) is told by the content.
        token_per_repo_id: Repository id to token, for files in private repositories on the Hub.

    Returns:
        A plain `Nifti1Image`, `Nifti2Image` or `Cifti2Image`; from a local path, whatever `nibabel.load` makes of it.
        Voxels are read when they are asked for.

    Raises:
        ValueError: if there are neither bytes nor a path, or they hold no NIfTI image. The message names the path.
        OSError: on reading voxels, if the data are damaged or cut off. The message names the path.
    """
    if not config.NIBABEL_AVAILABLE:
        raise ImportError("To support decoding NIfTI files, please install 'nibabel'.")
    if isinstance(value, str):
        value = {"path": value, "bytes": None}
    if not isinstance(value, dict):
        return value  # decoding is idempotent: a value that is already an image is returned as is

    path, bytes_ = value["path"], value["bytes"]
    if bytes_ is None:
        if path is None:
            raise ValueError(f"A nifti should have one of 'path' or 'bytes' but both are None in {value}.")
        # gzipped files in streaming mode have the structure 'gzip://T1.nii::<local_path>'
        if path.startswith("gzip://") and is_local_path(path.split("::")[-1]):
            path = path.split("::")[-1]
        local = local_path(path)
        if local is not None:
            image = _load_path(local)
        else:
            with xopen(path, "rb", download_config=download_config(path, token_per_repo_id)) as f:
                image = _load_stored(StoredFile(f.read(), path))
    else:
        image = _load_stored(StoredFile(bytes_ if isinstance(bytes_, bytes) else bytes(bytes_), path))
    _show_in_notebook(image)
    return image


_decoded: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Images that a dataset gave out in this notebook. Others are shown as nibabel shows them."""


def _show_in_notebook(image: "nib.dataobj_images.DataobjImage") -> None:
    """Let a notebook show `image` with NiiVue. No class of our own: nibabel's functions make new images by class."""
    if "IPython" not in sys.modules:
        return
    shell = sys.modules["IPython"].get_ipython()
    if shell is None:
        return
    _decoded.add(image)
    formatter = shell.display_formatter.formatters["text/html"]
    try:
        formatter.lookup_by_type(type(image))  # a viewer that the user has set up stays
    except KeyError:
        formatter.for_type_by_name("nibabel.dataobj_images", "DataobjImage", _niivue_html)


def _niivue_html(image: "nib.dataobj_images.DataobjImage") -> None:
    if image not in _decoded:
        return
    try:
        from ipyniivue import NiiVue, ShowRender, SliceType, Volume
    except ImportError:
        return
    from IPython.display import display

    encoded = encode_nibabel_image(image, force_bytes=True)
    viewer = NiiVue()
    viewer.set_slice_type(SliceType.MULTIPLANAR)
    viewer.opts.multiplanar_show_render = ShowRender.ALWAYS
    viewer.opts.show_3d_crosshair = True
    viewer.opts.multiplanar_force_render = True
    viewer.load_volumes([Volume(name=encoded["path"] or "volume.nii", data=encoded["bytes"])])
    display(viewer)


def plain_storage(storage: pa.Array) -> pa.Array:
    """Reduce the Arrow types that can hold paths or bytes to `string`, `binary` and structs of them.

    These are what `cast_storage` of Image, Audio, Video, Pdf, Mesh and Nifti know. pandas 3 makes `large_string`, Polars
    `string_view`.

    Raises:
        pa.ArrowInvalid: if one array holds more than 2 GiB of paths or bytes.
    """
    if isinstance(storage, pa.ExtensionArray):
        storage = storage.storage
    type_ = storage.type
    if pa.types.is_dictionary(type_):
        # values first: pyarrow cannot decode dictionaries of views
        return pa.DictionaryArray.from_arrays(storage.indices, plain_storage(storage.dictionary)).dictionary_decode()
    if pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return storage.cast(pa.string())
    if pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_) or pa.types.is_fixed_size_binary(type_):
        return storage.cast(pa.binary())
    if pa.types.is_struct(type_):
        names = [field.name for field in type_]
        fields = [plain_storage(storage.field(i)) for i in range(len(names))]
        if [field.type for field in fields] != [field.type for field in type_]:
            return pa.StructArray.from_arrays(fields, names, mask=storage.is_null())
    return storage


def image_array(image: "nib.dataobj_images.DataobjImage") -> np.ndarray:
    """The values of `image` (scale factors applied) in native byte order, shape as the image has it.

    RGB and RGBA voxels, which no tensor library has a type for, become a last axis of length 3 or 4.
    """
    array = np.asanyarray(image.dataobj)
    if array.dtype.fields:
        array = recfunctions.structured_to_unstructured(array)
    return np.asarray(array, dtype=array.dtype.newbyteorder("="))


# Patches


def _has_nifti(feature: Any) -> bool:
    if feature is None:
        return False
    found = False

    def visit(feature):
        nonlocal found
        found = found or isinstance(feature, Nifti)

    _visit(feature, visit)
    return found


def _encode_images(value: Any, force_bytes: bool = False) -> Any:
    """`value` with every image in its lists and dictionaries encoded."""
    if is_image(value):
        return encode_nibabel_image(value, force_bytes=force_bytes)
    if isinstance(value, Mapping):
        return {k: _encode_images(v, force_bytes) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_images(v, force_bytes) for v in value]
    return value


def _holds_images(value: Any) -> bool:
    """True if there is an image in `value`.

    Of a list of anything but containers one value is looked at: this runs for every example of every dataset.
    """
    if isinstance(value, dict):
        return any(map(_holds_images, value.values()))
    if isinstance(value, (list, tuple)):
        for v in value:
            if isinstance(v, (dict, list, tuple)):
                if _holds_images(v):
                    return True
            elif v is not None:
                return is_image(v)
        return False
    return is_image(value)


def _first_image_depth(data: Any) -> Optional[int]:
    """0 if the first value of `data` that is not empty is an image, 1 if it is a list of images, `None` otherwise."""
    if "nibabel" not in sys.modules or not isinstance(data, (list, tuple)):
        return None
    for value in data:
        if value is None or (isinstance(value, (list, tuple)) and not value):
            continue
        if isinstance(value, (list, tuple)):
            return 1 if is_image(next((v for v in value if v is not None), None)) else None
        return 0 if is_image(value) else None
    return None


def _inferred_feature(data: Any) -> Union[None, Nifti, List]:
    depth = _first_image_depth(data)
    return None if depth is None else List(Nifti()) if depth else Nifti()


def _infer_custom_type_and_encode(original):
    def infer(data):
        feature = _inferred_feature(data)
        return original.__func__(data) if feature is None else (_encode_images(data), feature)

    return staticmethod(infer)


def _typed_sequence_init(original):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        feature = self.type if self.type is not None else self.try_type
        if feature is None or not isinstance(self.data, (list, tuple)):
            return
        if _has_nifti(feature):
            self.data = _encode_images(self.data)
        elif self.type is None and _inferred_feature(self.data) is not None:
            # images in the place of something else: let their type be inferred
            self.try_type, self.trying_type = None, False

    return __init__


def _features_encode_example(original):
    @functools.wraps(original)
    def encode_example(self, example):
        return original(self, _encode_columns(self, example))

    return encode_example


def _features_encode_batch(original):
    @functools.wraps(original)
    def encode_batch(self, batch):
        return original(self, _encode_columns(self, batch))

    return encode_batch


def _features_encode_column(original):
    @functools.wraps(original)
    def encode_column(self, column, column_name):
        return original(self, _encode_columns(self, {column_name: column})[column_name], column_name)

    return encode_column


def _encode_columns(features: Features, columns: Any) -> Any:
    if not isinstance(columns, dict) or not _holds_images(columns):
        return columns
    return {k: _encode_images(v) if _has_nifti(features.get(k)) else v for k, v in columns.items()}


def _infer_features_from_batch(original):
    @functools.wraps(original)
    def infer(batch, try_features=None):
        inferred = {k: feature for k, v in batch.items() if (feature := _inferred_feature(v)) is not None}
        features = original({k: _encode_images(v) if k in inferred else v for k, v in batch.items()}, try_features)
        features.update(inferred)
        return features

    return infer


def _cast_to_python_objects(original):
    @functools.wraps(original)
    def cast(obj, *args, **kwargs):
        # Here nothing is known about the type, and a path without a type would not be embedded
        return original(_encode_images(obj, force_bytes=True) if _holds_images(obj) else obj, *args, **kwargs)

    return cast


def _cast_storage(original):
    @functools.wraps(original)
    def cast_storage(self, storage):
        return original(self, plain_storage(storage))

    return cast_storage


def _tensorize(original):
    @functools.wraps(original)
    def tensorize(self, value):
        return original(self, image_array(value) if is_image(value) else value)

    return tensorize


def _polars_decode_row(original):
    @functools.wraps(original)
    def decode_row(self, row):
        import polars as pl

        for name in row.columns:
            if self.features and name in self.features and self.features._column_requires_decoding[name]:
                row = row.with_columns(_polars_decoded(pl, self.features[name], row[name]))
        return row

    return decode_row


def _polars_decode_column(original):
    @functools.wraps(original)
    def decode_column(self, column, column_name):
        import polars as pl

        if self.features and column_name in self.features and self.features._column_requires_decoding[column_name]:
            return _polars_decoded(pl, self.features[column_name], column)
        return column

    return decode_column


def _polars_decoded(pl: Any, feature: Any, column: Any) -> Any:
    values = [None if v is None else decode_nested_example(feature, v) for v in column.to_list()]
    return pl.Series(column.name, values, dtype=pl.Object)


def _add_item(original):
    @transmit_format
    def add_item(self, item, new_fingerprint=None, **kwargs):
        if not any(_has_nifti(self.features.get(k)) or _inferred_feature([v]) for k, v in item.items()):
            kwargs.update({"new_fingerprint": new_fingerprint} if new_fingerprint is not None else {})
            return original(self, item, **kwargs)
        columns = {k: [encode_nested_example(self.features.get(k), v)] for k, v in item.items()}
        row = Dataset.from_dict(columns)
        row = row.cast(Features({k: self.features.get(k, feature) for k, feature in row.features.items()}))
        return concatenate_datasets([self, row])

    return functools.wraps(original)(add_item)


def _add_column(original):
    @functools.wraps(original)
    def add_column(self, name, column, new_fingerprint=None, feature=None, **kwargs):
        feature = feature if feature is not None else _inferred_feature(column)
        if feature is not None and _has_nifti(feature):
            column = [encode_nested_example(feature, _encode_images(value), level=1) for value in column]
        kwargs.update({"new_fingerprint": new_fingerprint} if new_fingerprint is not None else {})
        return original(self, name, column, feature=feature, **kwargs)

    return add_column


def _check_if_features_can_be_aligned(original):
    @functools.wraps(original)
    def check(features_list):
        # whether a value is decoded when it is read says nothing about how it is stored
        original([_visit(features, _decoding) for features in features_list])

    return check


def _decoding(feature: Any) -> Any:
    return dataclasses.replace(feature, decode=True) if getattr(feature, "decode", True) is False else feature


# Probes


@functools.cache
def _sample(image_class: str = "Nifti1Image") -> tuple["nib.Nifti1Image", bytes]:
    """A small image and its gzipped file."""
    import nibabel as nib

    image = getattr(nib, image_class)(np.zeros((2, 3, 4), dtype=np.int16), np.eye(4))
    return image, gzip.compress(image.to_bytes())


def _loses_images() -> bool:
    # NIfTI-1 first: nibabel logs a dozen lines when a release reads NIfTI-2 as NIfTI-1
    for image_class in ("Nifti1Image", "Nifti2Image"):
        image, stored = _sample(image_class)
        example = {"path": "image.nii.gz", "bytes": stored}
        decoded = Nifti().decode_example(example)
        if type(decoded) is not type(image) or Nifti().encode_example(decoded) != example:
            return True
    return Nifti().encode_example(image)["bytes"] is None


def _does_not_infer() -> bool:
    return not isinstance(TypedSequence([_sample()[0]]).get_inferred_type(), Nifti)


def _streams_no_images() -> bool:
    from datasets.iterable_dataset import _infer_features_from_batch as infer

    return not isinstance(infer({"image": [_sample()[0]]})["image"], Nifti)


def _does_not_cast_images() -> bool:
    import nibabel as nib

    image = nib.MGHImage(np.zeros((2, 3, 4), dtype=np.float32), np.eye(4))
    return is_image(cast_to_python_objects(image))


def _refuses_some_storage(name: str) -> bool:
    feature = getattr(datasets.features, name)()
    paths = pa.array(["path"], pa.large_string())
    for storage in (paths, paths.cast(pa.string_view()), paths.cast(pa.large_binary()), paths.dictionary_encode()):
        feature.cast_storage(storage)
    return False


def _does_not_tensorize() -> bool:
    from datasets.formatting.np_formatter import NumpyFormatter

    return NumpyFormatter()._tensorize(_sample()[0]).shape != (2, 3, 4)


def _passes_a_dict_to_polars() -> bool:
    from datasets.formatting.polars_formatter import PolarsFeaturesDecoder

    class Row:
        """As much of a polars frame as shows the defect: importing polars for a probe takes too long."""

        columns = ["image"]

        def map_rows(self, function):
            raise TypeError if not callable(function) else AttributeError

    decoder = object.__new__(PolarsFeaturesDecoder)
    decoder.features = Features({"image": Nifti()})
    try:
        decoder.decode_row(Row())
    except TypeError:
        return True
    except Exception:
        return False
    return False


def _cannot_add_items() -> bool:
    image, stored = _sample()
    ds = Dataset.from_dict({"image": [stored]}, features=Features({"image": Nifti()}))
    return len(ds.add_item({"image": image})) != 2


def _cannot_add_columns() -> bool:
    ds = Dataset.from_dict({"id": [0]}).add_column("image", [_sample()[0]], feature=Nifti())
    return not isinstance(ds.features["image"], Nifti)


def _refuses_other_decode() -> bool:
    from datasets.features.features import _check_if_features_can_be_aligned as check

    check([Features({"image": Nifti()}), Features({"image": Nifti(decode=False)})])
    return False


_LOSSY = "images are re-encoded or lost, and what loads from a path does not load from bytes"
_UNTYPED = "new image columns lose the Nifti type, and unmodified images become their bytes"
_NO_ARRAYS = "formats that give arrays fail on images"

PATCHES = (
    Patch("datasets.features:Nifti.encode_example", lambda _: encode_example, _loses_images, _LOSSY),
    Patch("datasets.features:Nifti.decode_example", lambda _: decode_example, _loses_images, _LOSSY),
    Patch("datasets.features.nifti:encode_nibabel_image", lambda _: encode_nibabel_image, _loses_images, _LOSSY),
    *(
        Patch(
            f"datasets.features:{name}.cast_storage",
            _cast_storage,
            functools.partial(_refuses_some_storage, name),
            "paths and bytes of large, view and dictionary types (pandas 3) do not cast",
        )
        for name in ("Nifti", "Image", "Audio", "Video", "Pdf", "Mesh")
    ),
    Patch("datasets.arrow_writer:TypedSequence.__init__", _typed_sequence_init, _does_not_infer, _UNTYPED),
    Patch(
        "datasets.arrow_writer:TypedSequence._infer_custom_type_and_encode",
        _infer_custom_type_and_encode,
        _does_not_infer,
        _UNTYPED,
    ),
    Patch(
        "datasets.iterable_dataset:_infer_features_from_batch",
        _infer_features_from_batch,
        _streams_no_images,
        "a streamed dataset without features that yields images cannot be pushed",
    ),
    Patch("datasets.features:Features.encode_example", _features_encode_example, _does_not_infer, _UNTYPED),
    Patch("datasets.features:Features.encode_column", _features_encode_column, _does_not_infer, _UNTYPED),
    Patch("datasets.features:Features.encode_batch", _features_encode_batch, _does_not_infer, _UNTYPED),
    Patch(
        "datasets.features.features:cast_to_python_objects",
        _cast_to_python_objects,
        _does_not_cast_images,
        "images other than NIfTI (CIFTI-2, MGH; in 4.4 all) cannot be written to Arrow",
    ),
    *(
        Patch(f"datasets.formatting.{target}._tensorize", _tensorize, _does_not_tensorize, _NO_ARRAYS)
        for target in (
            "np_formatter:NumpyFormatter",
            "torch_formatter:TorchFormatter",
            "jax_formatter:JaxFormatter",
            "tf_formatter:TFFormatter",
        )
    ),
    Patch(
        "datasets.formatting.polars_formatter:PolarsFeaturesDecoder.decode_row",
        _polars_decode_row,
        _passes_a_dict_to_polars,
        "the polars format raises `'dict' object is not callable` for every decoded feature",
    ),
    Patch(
        "datasets.formatting.polars_formatter:PolarsFeaturesDecoder.decode_column",
        _polars_decode_column,
        _passes_a_dict_to_polars,
        "the polars format cannot hold decoded columns",
    ),
    Patch(
        "datasets.features.features:_check_if_features_can_be_aligned",
        _check_if_features_can_be_aligned,
        _refuses_other_decode,
        "datasets that differ in `decode` alone cannot be concatenated",
    ),
    Patch("datasets:Dataset.add_item", _add_item, _cannot_add_items, "items with images cannot be added"),
    Patch("datasets:Dataset.add_column", _add_column, _cannot_add_columns, "columns of images cannot be added"),
)
