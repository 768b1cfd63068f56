"""Files of torch.save written by hand, instruction by instruction, without PyTorch."""

import struct
import zipfile


def integer(n):
    return b"J" + struct.pack("<i", n)


def string(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def tuple_of(*parts):
    return b"(" + b"".join(parts) + b"t"


def ordered(**entries):
    body = b"".join(string(key) + value for key, value in entries.items())
    return name_of("collections", "OrderedDict") + b")R" + b"(" + body + b"u"


def storage(kind, key, size):
    where = (string("storage"), name_of("torch", f"{kind}Storage"), string(key), string("cpu"))
    return tuple_of(*where, integer(size)) + b"Q"


def tensor(kind, key, size, offset, shape, strides):
    counts = (tuple_of(*map(integer, shape)), tuple_of(*map(integer, strides)))
    arguments = (storage(kind, key, size), integer(offset), *counts, b"\x89", ordered())
    return name_of("torch._utils", "_rebuild_tensor_v2") + tuple_of(*arguments) + b"R"


def program(body, protocol=2):
    return b"\x80" + bytes([protocol]) + body + b"."


def write_zip(path, saved, storages, **options):
    """Writes what was saved, a pickle's body, and the bytes of its storages by key."""
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", program(saved))
        archive.writestr("archive/byteorder", options.get("byteorder", "little"))
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def write_old(path, saved, storages, itemsize=4):
    """As `write_zip`, in the format from before PyTorch 1.6."""
    magic = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    system = b"}(" + string("little_endian") + b"\x88" + b"u"
    keys = b"](" + b"".join(map(string, storages)) + b"e"
    parts = [program(part) for part in (magic, integer(1001), system, saved, keys)]
    for data in storages.values():
        parts += [struct.pack("<q", len(data) // itemsize), data]
    path.write_bytes(b"".join(parts))
