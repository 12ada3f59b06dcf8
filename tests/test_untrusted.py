"""Files made here to attack their reader: each must be refused in one line, and what it carries must never run."""

import ast
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from itera_lite.base.core import CheckpointError, sha256_file
from itera_lite.checkpoints import untrusted
from itera_lite.checkpoints.archives import MAGIC, scan
from itera_lite.checkpoints.folder import load_model, save_model
from itera_lite.checkpoints.pickles import SLACK_BYTES
from itera_lite.checkpoints.untrusted import read_foreign, run_child
from itera_lite.models.config import named_config
from itera_lite.models.model import build_model

# archives with two entries of a name; torch's old formats
pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:.*deprecated")
ROOT = Path(__file__).resolve().parents[1]
LEGACY = ROOT.parent / "shared/legacy"
BARE_BYTES = 120 * 2**20  # a child that refuses before it needs torch takes less than this


# Pickles, opcode by opcode


def u(text):
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def g(module, name):
    return f"c{module}\n{name}\n".encode()


def i(number):
    return (
        b"J" + struct.pack("<i", number)
        if -(2**31) <= number < 2**31
        else b"\x8a\x0a" + number.to_bytes(10, "little", signed=True)
    )


def t(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *args):
    return function + t(*args) + b"R"


def p(*parts, proto=2, stop=b"."):
    return b"\x80" + bytes([proto]) + b"".join(parts) + stop


ORDERED = call(g("collections", "OrderedDict"))
OS = call(g("builtins", "__import__"), u("os"))


def storage(numel=4, key="0", kind="FloatStorage", device="cpu"):
    return t(u("storage"), g("torch", kind), u(key), u(device), i(numel)) + b"Q"


def tensor(size=(4,), stride=(1,), offset=0, of=None, **kwargs):
    of = storage(**kwargs) if of is None else of
    return call(
        g("torch._utils", "_rebuild_tensor_v2"), of, i(offset), t(*map(i, size)), t(*map(i, stride)), b"\x89", ORDERED
    )


def state(*pairs):
    """A dict of names and values, given as pickled parts."""
    return b"}(" + b"".join(u(name) + value for name, value in pairs) + b"u"


def zipped(pickled, data=None, *, compress=zipfile.ZIP_STORED, edit=None, more=(), top="archive"):
    """The archive that torch.save writes, around a pickle and the bytes of its storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        entries = {
            "data.pkl": pickled,
            "byteorder": b"little",
            "version": b"3\n",
            **{f"data/{k}": v for k, v in ({"0": bytes(16)} if data is None else data).items()},
        }
        for name, content in [*((f"{top}/{name}", content) for name, content in entries.items()), *more]:
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            z.writestr(info, content, compress)
    return edit(buffer.getvalue()) if edit else buffer.getvalue()


GOOD = p(state(("w", tensor())))


def executing(canary):
    """Pickles that create `canary` where they are obeyed, each complete in itself."""
    shell, code = u(f"touch {canary}"), u(f"open({str(canary)!r}, 'w').close()")
    touch = b"](" + u("touch") + u(str(canary)) + b"e"
    system = g("posix", "system")
    return {
        "posix.system": p(call(system, shell)), "os.system": p(call(g("os", "system"), shell)),
        "exec": p(call(g("builtins", "exec"), code)), "eval": p(call(g("builtins", "eval"), code)),
        "eval of Python 2": p(call(g("__builtin__", "eval"), code)),
        "subprocess.call": p(call(g("subprocess", "call"), touch)),
        "subprocess.check_output": p(call(g("subprocess", "check_output"), touch)),
        "getattr of an import": p(call(call(g("builtins", "getattr"), OS, u("system")), shell)),
        "methodcaller": p(call(call(g("operator", "methodcaller"), u("system"), shell), OS)),
        "attrgetter": p(call(call(call(g("operator", "attrgetter"), u("system")), OS), shell)),
        "resolve_name": p(call(call(g("pkgutil", "resolve_name"), u("os:system")), shell)),
        "partial": p(call(call(g("functools", "partial"), system, shell))),
        "timeit": p(call(g("timeit", "timeit"), code, u("pass"), g("time", "perf_counter"), i(1))),
        "cProfile.run": p(call(g("cProfile", "run"), code)),
        "pickle.loads": p(
            call(
                g("_pickle", "loads"),
                call(g("_codecs", "encode"), u(f"cposix\nsystem\n(Vtouch {canary}\ntR."), u("latin1")),
            )
        ),
        "STACK_GLOBAL": p(u("posix") + u("system") + b"\x93" + t(shell) + b"R", proto=4),
        "dotted STACK_GLOBAL": p(u("os") + u("path.os.system") + b"\x93" + t(shell) + b"R", proto=4),
        "dotted GLOBAL": p(call(g("os", "path.os.system"), shell), proto=4),
        "protocol 5": pickle.dumps(Reduced(canary), 5), "protocol 0": pickle.dumps(Reduced(canary), 0),
        "INST": p(b"(" + shell + b"iposix\nsystem\n"), "OBJ": p(b"(" + system + shell + b"o"),
        "OBJ, then POP": p(b"(" + system + shell + b"o0" + state(("w", i(1)))),
        "POP_MARK after it ran": p(b"(" + call(system, shell) + b"1" + b"}"),
        "DUP of the function": p(system + b"2" + t(shell) + b"R0" + t(shell) + b"R"),
        "memo, overwritten by PUT": p(
            g("collections", "OrderedDict") + b"p0\n0" + system + b"p0\n0g0\n" + t(shell) + b"R"
        ),
        "memo, overwritten by BINPUT": p(
            g("collections", "OrderedDict") + b"q\0" + system + b"q\0h\0" + t(shell) + b"R"
        ),
        "memo, MEMOIZE": p(system + b"\x94h\0" + t(shell) + b"R", proto=4),
        "BUILD of __setstate__": p(ORDERED + b"}" + u("__setstate__") + system + b"sb" + shell + b"b"),
        "NEWOBJ of Popen": p(g("functools", "partial") + t(system, shell) + b"\x81" + b")R"),
        "NEWOBJ_EX": p(g("functools", "partial") + t(system, shell) + b"}\x92)R", proto=4),
        "runs, then breaks": p(call(system, shell), stop=b"\xff\xff garbage"),
        "runs, then ends early": p(call(system, shell), stop=b""),
        "in a value": p(state(("w", i(1)), ("x", call(system, shell)))),
        "in a key": p(b"}" + call(system, shell) + i(1) + b"s"),
        "in an argument of an honest call": p(call(g("collections", "OrderedDict"), call(system, shell))),
        "dictConfig": p(
            call(
                g("logging.config", "dictConfig"),
                b"}("
                + u("version")
                + i(1)
                + u("filters")
                + state(("f", state(("()", u("subprocess.getoutput")), ("cmd", shell))))
                + b"u",
            )
        ),
        "second pickle behind the first": p(state(("x", i(1)))) + p(call(system, shell)),
    }


class Reduced:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.canary}",)


NAMES = [  # what known attacks look up; to be refused for the name alone
    "torch.storage _load_from_bytes",
    "torch load",
    "torch.serialization load",
    "torch.hub load",
    "torch.jit load",
    "torch.ops load_library",
    "torch._dynamo.utils import_submodule",
    "torch.fx.graph_module _deserialize_graph_module",
    "torch.utils.data.datapipes.utils.decoder basichandlers",
    "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch._utils _rebuild_sparse_tensor",
    "torch._tensor _rebuild_from_type_v2",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch Tensor",
    "torch UntypedStorage",
    "torch.nn.parameter Parameter",
    "torch.nn.modules.linear Linear",
    "numpy.core.multiarray _reconstruct",
    "numpy.testing._private.utils runstring",
    "numpy load",
    "joblib load",
    "dill._dill _create_function",
    "cloudpickle.cloudpickle subimport",
    "marshal loads",
    "types FunctionType",
    "types CodeType",
    "copyreg _reconstructor",
    "copyreg add_extension",
    "copy_reg _reconstructor",
    "builtins getattr",
    "builtins setattr",
    "builtins bytearray",
    "__builtin__ apply",
    "importlib import_module",
    "ctypes CDLL",
    "pty spawn",
    "socket socket",
    "webbrowser open",
    "code interact",
    "shutil rmtree",
    "pathlib PosixPath",
    "collections Counter",
    "collections OrderedDict.update",
    "__main__ Model",
    "os FooConfig.system",
    "os.path\u00e9 FooConfig",
]


def opcodes():
    """What torch.save never writes, each in an otherwise good file."""
    bad_pids = {
        "text": u("0"),
        "module": t(u("module"), g("torch", "FloatStorage"), u("0"), u("cpu"), i(4)),
        "negative": t(u("storage"), g("torch", "FloatStorage"), u("0"), u("cpu"), i(-4)),
        "bool": t(u("storage"), g("torch", "FloatStorage"), u("0"), u("cpu"), b"\x88"),
        "path": t(u("storage"), g("torch", "FloatStorage"), u("../../etc/passwd"), u("cpu"), i(4)),
        "class": t(u("storage"), g("collections", "OrderedDict"), u("0"), u("cpu"), i(4)),
        "device": t(u("storage"), g("torch", "FloatStorage"), u("0"), u("nfs:/x"), i(4)),
        "meta": t(u("storage"), g("torch", "FloatStorage"), u("0"), u("meta"), i(4)),
        "short": t(u("storage")),
        "number": i(0),
    }
    config = g("__main__", "OldConfig")
    return {
        **{f"persistent id: {name}": p(state(("w", tensor(of=pid + b"Q")))) for name, pid in bad_pids.items()},
        "persistent id as text": p(state(("w", b"Pstorage\n"))),
        "one storage, two declarations": p(state(("a", tensor()), ("b", tensor(kind="HalfStorage")))),
        "EXT1": p(b"\x82\x01)R"), "EXT2": p(b"\x83\x01\0)R"), "EXT4": p(b"\x84\x01\0\0\0)R"),
        "FRAME": p(b"\x95" + struct.pack("<Q", 2**62) + b"}"), "BYTEARRAY8": p(b"\x96" + struct.pack("<Q", 2**40)),
        "NEXT_BUFFER": p(b"\x97"), "READONLY_BUFFER": p(b"}\x98"), "EMPTY_SET": p(b"\x8f"), "FROZENSET": p(b"(\x91"),
        "STRING": p(b"S'x'\n"), "FLOAT": p(b"F1.5\n"), "BINBYTES": p(b"C\x01x"), "second PROTO": p(b"\x80\x02}"),
        "unknown opcode": p(b"\xfe"), "empty": b"", "only STOP": b".", "stack underflow": p(b"}R"),
        "pop beyond a mark": p(i(1) + b"(\x85"), "missing memo": p(b"h\x07"), "values left": p(i(1) + b"}"),
        "mark left": p(b"}(}"), "BUILD on OrderedDict": p(ORDERED + b"}" + u("__class__") + i(1) + b"sb"),
        "BUILD on dict": p(b"}}b"), "BUILD on a tensor": p(state(("w", tensor() + t(i(1)) + b"b"))),
        "OrderedDict with arguments": p(call(g("collections", "OrderedDict"), b"]")),
        "REDUCE of a dtype": p(call(g("torch", "float32"))),
        "REDUCE of a storage class": p(call(g("torch", "FloatStorage"), i(2**40))),
        "REDUCE of a text": p(u("x") + b")R"), "SETITEM on a list": p(b"]" + i(0) + i(1) + b"s"),
        "APPEND to a dict": p(b"}" + i(0) + b"a"), "odd SETITEMS": p(b"}(" + i(0) + b"u"),
        "key twice": p(state(("a", i(1)), ("a", i(2)))), "key is a tuple": p(b"}" + t(i(1)) + i(1) + b"s"),
        "memo written twice": p(b"}q\0q\0"), "hooks of a tensor": GOOD.replace(ORDERED, b"}" + i(1) + i(1) + b"s"),
        "config: REDUCE": p(state(("config", call(config)))),
        "config: arguments": p(state(("config", config + t(i(1)) + b"\x81"))),
        "config: a list as state": p(state(("config", config + b")\x81]b"))),
        "config: slots": p(state(("config", config + b")\x81" + t(b"N", b"}") + b"b"))),
        "config: __class__": p(
            state(("w", tensor()), ("config", config + b")\x81}" + u("__class__") + u("os") + b"sb"))
        ),
        "config: built twice": p(
            state(("config", config + b")\x81" + state(("a", i(1))) + b"b" + state(("b", i(1))) + b"b"))
        ),
        "config: a tensor in it": p(
            state(("w", tensor()), ("config", config + b")\x81" + state(("a", tensor())) + b"b"))
        ),
        "config: class itself": p(state(("w", tensor()), ("config", config))),
        "config: a thousand objects": p(b"}" + u("config") + b"](" + (config + b")\x81") * 1000 + b"es"),
        "not a state dict: list": p(b"]"), "not a state dict: tensor": p(tensor()), "no tensors": p(state(("a", i(1)))),
        "both wrappers": p(state(("model_state_dict", state(("w", tensor()))), ("state_dict", b"}"))),
        "name with a line end": p(state(("w\n\x1b[31m", tensor()))),
        "name twice after flattening": p(state(("a", state(("b", tensor()))), ("a.b", tensor()))),
        "bare storage": p(state(("w", storage()))),
    }


def bombs():
    """Few bytes that stand for many."""
    tuples = b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    popped = b"]" + b"".join(b"q" + bytes([n]) + b"0](h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(60))
    lists, dicts = b"]q\0", b"}q\0"  # made from the inside, as pickle does: each holds the one before twice
    for n in range(1, 60):
        lists = b"](" + lists + b"h" + bytes([n - 1]) + b"eq" + bytes([n])
        dicts = b"}(" + u("a") + dicts + u("b") + b"h" + bytes([n - 1]) + b"uq" + bytes([n])
    texts = b"](" + u("x" * 10**6) + b"q\0" + b"h\0" * 1000 + b"e"
    views = b"".join(u(f"w{n}") + tensor(size=(4,), offset=n, of=b"h\0") for n in range(1000))
    return {
        "laughs: tuples": p(state(("config", tuples))), "laughs: lists": p(state(("config", lists))),
        "laughs: dicts": p(state(("config", dicts))), "laughs: lists, with POP": p(state(("config", popped))),
        "one text, a thousand times": p(state(("config", texts))),
        "a list in itself": p(state(("config", b"]q\0h\0a"))), "a dict in itself": p(b"}q\0" + u("config") + b"h\0s"),
        "nested 100,000 deep: tuples": p(b")" + b"\x85" * 100_000),
        "nested 100,000 deep: lists": p(state(("config", b"]" * 100_000 + b"a" * 99_999))),
        "nested 100,000 deep: marks": p(b"(" * 100_000), "text of 4 GiB": p(b"X\xff\xff\xff\xff"),
        "text of 2^62": p(b"\x8d" + struct.pack("<Q", 2**62)), "number of 2 GiB": p(b"\x8b\xff\xff\xff\x7f"),
        "number of 255 bytes": p(state(("w", tensor()), ("n", b"\x8a\xff" + b"\x7f" * 255))),
        "decimal number of a million digits": p(b"L" + b"9" * 10**6 + b"L\n"), "a million opcodes": p(b"]" * 1_100_000),
        "pickle of 17 MiB": p(u("x" * (17 * 2**20))),
        "memo index of 2^32": p(b"}r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff"),
        "storage of 2^40 numbers": p(state(("w", tensor(numel=2**40)))),
        "storage that is not there": p(state(("w", tensor(key="7")))),
        "storage shorter than the file's": p(state(("w", tensor(numel=3, size=(3,))))),
        "stride 0": p(state(("w", tensor(size=(2**40,), stride=(0,))))),
        "stride 0, small": p(state(("w", tensor(size=(5, 4), stride=(0, 1))))),
        "shape overflows": p(state(("w", tensor(size=(2**62, 2**62), stride=(0, 0))))),
        "negative shape": p(state(("w", tensor(size=(-4,))))), "negative stride": p(state(("w", tensor(stride=(-1,))))),
        "negative offset": p(state(("w", tensor(offset=-1)))), "offset beyond": p(state(("w", tensor(offset=1)))),
        "shape without strides": p(state(("w", tensor(stride=())))),
        "nine dimensions": p(state(("w", tensor(size=(1,) * 9, stride=(1,) * 9)))),
        "empty, and overflows": p(state(("w", tensor(size=(0, 2**62, 2**62), stride=(1, 1, 1))))),
        "shape of 300,000 dimensions": p(state(("w", tensor(size=(1,) * 300_000, stride=(1,) * 300_000)))),
        "shape that is a bool": p(
            state(
                (
                    "w",
                    call(
                        g("torch._utils", "_rebuild_tensor_v2"), storage(), i(0), t(b"\x88"), t(i(1)), b"\x89", ORDERED
                    ),
                )
            )
        ),
        "a thousand views of one storage": p(
            b"}(" + u("first") + tensor(of=storage(numel=1004) + b"q\0") + views + b"u"
        ),
        "quantised without a scale": p(state(("w", tensor(numel=16, size=(16,), kind="QInt8Storage")))),
        "scale of a plain tensor": p(state(("w", quantised("FloatStorage")))),
        "scale not a number": p(state(("w", quantised("QInt8Storage", b"G" + struct.pack(">d", float("nan")))))),
    }


def quantised(kind, scale=b"G?\xe0\0\0\0\0\0\0"):  # 0.5
    return call(
        g("torch._utils", "_rebuild_qtensor"),
        storage(kind=kind, numel=16),
        i(0),
        t(i(16)),
        t(i(1)),
        t(g("torch", "per_tensor_affine"), scale, i(0)),
        b"\x89",
        ORDERED,
    )


def flag(bit):
    """Set a bit of every entry's flags, in both tables."""

    def edit(content):
        content = bytearray(content)
        for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            where = content.find(signature)
            while where >= 0:
                content[where + at] |= bit
                where = content.find(signature, where + 4)
        return bytes(content)

    return edit


def overlapping(content):
    """The list at the end says that data/0 begins where data.pkl does."""
    where = content.rfind(b"PK\1\2")
    return content[: where + 42] + struct.pack("<I", 0) + content[where + 46 :]


def archives():
    """Zip archives that are not quite torch's, around a good pickle."""
    link = zipfile.ZipInfo("archive/data/1")
    link.external_attr = 0o120777 << 16

    def more(name, content=b"x"):
        return zipped(GOOD, more=[(name, content)])

    npz = io.BytesIO()
    with zipfile.ZipFile(npz, "w") as z:
        z.writestr("arr_0.npy", b"\x93NUMPY")
    return {
        "two data.pkl": more("archive/data.pkl", GOOD), "two data/0": more("archive/data/0", bytes(16)),
        "another folder's data.pkl": more("other/data.pkl", GOOD), "path upwards": more("archive/../../evil"),
        "absolute path": more("/etc/evil"), "backslashes": more("archive\\..\\evil"),
        "NUL in a name": zipped(
            GOOD, more=[("archive/data/1Z.txt", b"x")], edit=lambda c: c.replace(b"1Z.txt", b"1\0.txt")
        ),
        "folder upwards": zipped(GOOD, top=".."), "deeper data.pkl": more("archive/x/data.pkl", GOOD),
        "stray file": more("archive/evil.py"), "numbers of no tensor": more("archive/data/1"),
        "no version": zipped(GOOD, edit=lambda c: c.replace(b"/version", b"/.format")),
        "symbolic link": zipped(GOOD, more=[(link, b"/etc/passwd")]), "encrypted": zipped(GOOD, edit=flag(1)),
        "strongly encrypted": zipped(GOOD, edit=flag(0x40)), "compressed": zipped(GOOD, compress=zipfile.ZIP_DEFLATED),
        "bzip2": zipped(GOOD, compress=zipfile.ZIP_BZIP2),
        "zip bomb": zipped(
            p(state(("w", tensor(numel=50_000_000, size=(50_000_000,))))), {"0": bytes(200_000_000)},
            compress=zipfile.ZIP_DEFLATED,
        ),
        "overlapping entries": zipped(GOOD, edit=overlapping),
        "names that differ": zipped(GOOD, edit=lambda c: c.replace(b"archive/data/0", b"archive/data/9", 1)),
        "a byte of a tensor changed": zipped(GOOD, edit=lambda c: c.replace(bytes(16), bytes(15) + b"\1", 1)),
        "bytes appended": zipped(GOOD) + b"x", "a second archive appended": zipped(GOOD) + zipped(GOOD),
        "comment": zipped(GOOD, edit=lambda c: c[:-2] + b"\x04\0evil"), "truncated": zipped(GOOD)[:-30],
        "bytes in front": b"PK\3\4" + bytes(60) + zipped(GOOD),
        "big-endian": zipped(GOOD, edit=lambda c: c.replace(b"little", b"biglit")),
        "another pickle behind": zipped(GOOD + GOOD),
        "TorchScript": more("archive/code/__torch__.py", b"def forward(self): pass"),
        "TorchScript constants": more("archive/constants.pkl", GOOD), "npz": npz.getvalue(),
        "no data.pkl": zipped(GOOD, edit=lambda c: c.replace(b"data.pkl", b"data.pkk")),
        "empty archive": b"PK\5\6" + bytes(18), "only a signature": b"PK\3\4",
    }


def saved(obj, **kwargs):
    buffer = io.BytesIO()
    torch.save(obj, buffer, **kwargs)
    return buffer.getvalue()


def legacies(evil):
    """Files of torch's format before zip, and bare pickles, that carry `evil` or contradict themselves."""
    good = saved({"w": torch.ones(4)}, _use_new_zipfile_serialization=False)
    version = p(b"M\xe9\x03")
    system = p(state(("little_endian", b"\x88")))
    assert good.startswith(MAGIC + version)
    keys = p(b"](" + u("0") + b"e")
    body = struct.pack("<q", 4) + bytes(16)
    head = MAGIC + version + system
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name))
    return {
        "in the pickle": head + evil + keys + body,
        "in place of the version": MAGIC + evil + system + GOOD + keys + body,
        "in place of the system": MAGIC + version + evil + GOOD + keys + body,
        "in place of the keys": head + GOOD + evil + body, "behind the end": good + evil,
        "before the head": evil + good, "bytes behind": good + b"x", "cut": good[:-1], "only the head": MAGIC,
        "a key too many": head + GOOD + p(b"](" + u("0") + u("1") + b"e") + body,
        "a key twice": head + GOOD + p(b"](" + u("0") + u("0") + b"e") + body + body,
        "no keys": head + GOOD + p(b"]") + body,
        "another length": head + GOOD + keys + struct.pack("<q", 2**40) + bytes(16),
        "storage of 2^40 numbers": (
            head + p(state(("w", tensor(numel=2**40)))) + keys + struct.pack("<q", 2**40) + bytes(16)
        ),
        "big-endian": MAGIC + version + p(state(("little_endian", b"\x89"))) + GOOD + keys + body,
        "another version": MAGIC + p(b"M\xea\x03") + system + GOOD + keys + body, "tar": tar.getvalue(),
        "bare pickle": evil, "bare pickle, honest": pickle.dumps({"w": [1.0]}, 2),
        "pickle with an archive behind": evil + zipped(GOOD),
        "GIF with an archive behind": b"GIF89a" + bytes(100) + zipped(GOOD), "nothing": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }


def table(header, body=bytes(16), length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + body


def entry(shape=(4,), dtype="F32", offsets=(0, 16), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def tables():
    """Safetensors files whose header lies."""
    half = {"a": entry((2,), offsets=(0, 8)), "b": entry((2,), offsets=(8, 16))}
    return {
        "header of 2^63 bytes": table({}, length=2**63),
        "header of 2^64-1 bytes": table({}, length=2**64 - 1),
        "header longer than the file": table({"w": entry()}, length=200),
        "header of 17 MiB": table(b"{" + b" " * (17 * 2**20) + b"}"),
        "no header": b"\0" * 8,
        "seven bytes": b"\2\0\0\0\0\0\0",
        "not UTF-8": table(b'{"\xff\xfe": 1}'),
        "not JSON": table(b"{w}"),
        "nested deep": table(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a list": table(b"{}".replace(b"{}", b"[1]")),
        "a key twice": table(b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}"),
        "an offset twice": table(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"data_offsets":[0,16]}}'),
        "overlap": table({**half, "b": entry((2,), offsets=(4, 12))}),
        "the same bytes twice": table({"a": entry(), "b": entry()}),
        "hole": table({**half, "b": entry((2,), offsets=(12, 20))}, bytes(20)),
        "hole at the beginning": table({"w": entry((2,), offsets=(8, 16))}),
        "trailing bytes": table({"w": entry()}, bytes(17)),
        "bytes missing": table({"w": entry()}, bytes(15)),
        "no numbers": table({"w": entry((0,), offsets=(0, 0))}, b""),
        "no numbers beside some": table({"w": entry(), "e": entry((0,), offsets=(16, 16))}),
        "negative shape": table({"w": entry((-4,))}),
        "two negatives": table({"w": entry((-2, -2))}),
        "shape overflows": table({"w": entry((2**32, 2**32, 2**32))}),
        "shape wraps to 4": table({"w": entry((2**63 + 2, 2))}),
        "shape of floats": table({"w": entry((4.0,))}),
        "shape of bools": table({"w": entry((True, 4))}),
        "shape is text": table({"w": {**entry(), "shape": "4"}}),
        "nine dimensions": table({"w": entry((1,) * 8 + (4,))}),
        "dtype twice as wide": table({"w": entry(dtype="F64")}),
        "dtype half as wide": table({"w": entry(dtype="F16")}),
        "unknown dtype": table({"w": entry(dtype="F31")}),
        "dtype of none": table({"w": entry(dtype=None)}),
        "dtype FP8": table({"w": entry((16,), dtype="F8_E4M3")}),
        "offsets backwards": table({"w": entry(offsets=(16, 0))}),
        "negative offsets": table({"w": entry(offsets=(-16, 0))}),
        "three offsets": table({"w": entry(offsets=(0, 8, 16))}),
        "no shape": table({"w": {"dtype": "F32", "data_offsets": [0, 16]}}),
        "another field": table({"w": entry(extra=1)}),
        "entry is a number": table({"w": 1}),
        "metadata is a number": table({"__metadata__": {"a": 1}, "w": entry()}),
        "metadata is a list": table({"__metadata__": [], "w": entry()}),
        "no tensors": table({}, b""),
        "name with terminal codes": table({"w\x1b[31m\n": entry()}),
        "NaN": table(b'{"w": NaN}'),
        "number of a million digits": table(b'{"w": ' + b"9" * 10**6 + b"}"),
    }


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x)


def scripted():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Net()), buffer)
    return buffer.getvalue()


def cases(canary):
    """(family, name, suffix, content) of every attack."""
    evil = executing(canary)
    for name, pickled in evil.items():
        yield "executing", name, ".pt", zipped(pickled)
    for name in NAMES:
        yield "names", name, ".pth", zipped(p(state(("x", g(*name.split(" "))))))
    for family, made in (("opcodes", opcodes()), ("bombs", bombs())):
        for name, pickled in made.items():
            yield family, name, ".pt", zipped(pickled, {"0": bytes(1004 * 4)} if "thousand views" in name else None)
    for name, content in archives().items():
        yield "archives", name, ".bin" if name == "stray file" else ".pt", content
    for name, content in legacies(evil["posix.system"]).items():
        yield "legacy", name, ".pt", content
    for name, content in tables().items():
        yield "safetensors", name, ".safetensors", content
    whole = {
        "whole module": saved(Net()),
        "whole module, legacy": saved(Net(), _use_new_zipfile_serialization=False),
        "protocol 4": saved({"w": torch.ones(2)}, pickle_protocol=4),
        "complex numbers": saved({"w": torch.ones(2, dtype=torch.complex64)}),
        "sparse": saved({"w": torch.ones(2, 2).to_sparse()}),
        "FP8": saved({"w": torch.ones(2).to(torch.float8_e4m3fn)}),
        "on the device meta": saved({"w": torch.ones(2, device="meta")}),
        "TorchScript": scripted(),
    }
    for name, content in whole.items():
        yield "honest, but not accepted", name, ".pt", content
    honest = safetensors_bytes({"w": torch.ones(4)})
    for name, suffix, content in (
        ("pickle as safetensors", ".safetensors", evil["posix.system"]),
        ("archive as safetensors", ".safetensors", zipped(GOOD)),
        ("legacy as safetensors", ".safetensors", MAGIC + evil["posix.system"]),
        ("safetensors as .pt", ".pt", honest),
        ("safetensors as .bin", ".bin", honest),
        ("pickle as .pkl", ".pkl", evil["posix.system"]),
        ("archive without suffix", "", zipped(GOOD)),
        ("ONNX", ".onnx", b"\x08\x07\x12\x07pytorch"),
        ("ONNX as .pt", ".pt", b"\x08\x07\x12\x07pytorch"),
        ("joblib", ".joblib", evil["exec"]),
    ):
        yield "false names", name, suffix, content


def one_line(error):
    line = str(error)
    assert line.isprintable() and len(line) < 1000, line
    return line


# The tests


def test_the_attacks_are_real(tmp_path):
    """Obeyed by pickle itself, in a process of its own, each does create the canary: refusing them means something."""
    canary = tmp_path / "canary"
    (tmp_path / "attacks").write_bytes(pickle.dumps(executing(canary)))
    program = """
import io, os, pickle, sys
sys.stdout = io.StringIO()
for name, attack in pickle.load(open(sys.argv[1], "rb")).items():
    file = io.BytesIO(attack)
    try:
        while file.tell() < len(attack): pickle.load(file)
    except Exception: pass
    if not os.path.exists(sys.argv[2]): print(name, file=sys.__stdout__)
    else: os.remove(sys.argv[2])
"""
    out = subprocess.run(
        [sys.executable, "-I", "-c", program, tmp_path / "attacks", canary], capture_output=True, text=True, check=True
    ).stdout
    assert out.split("\n") == [""], f"harmless: {out}"


def test_every_attack_is_refused(tmp_path, monkeypatch):
    canary, peaks, counts = tmp_path / "canary", {}, {}

    def watched(path, folder, memory_bytes, seconds):
        report = run_child(path, folder, memory_bytes, seconds)
        peaks[path.stem] = report["peak_bytes"]
        return report

    monkeypatch.setattr(untrusted, "run_child", watched)
    wrong = []
    for number, (family, name, suffix, content) in enumerate(cases(canary)):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        try:
            # a name is refused before anything else is tried: no child each
            (scan if family == "names" else read_foreign)(path)
            wrong.append(f"{family}: {name}: accepted")
        except CheckpointError as e:
            if "Error" in one_line(e) and "is damaged (" not in str(e) and "not JSON (" not in str(e):
                wrong.append(f"{family}: {name}: {e}")  # refused by accident, not by a check
        if canary.exists() or peaks.get(path.stem, 0) > BARE_BYTES:
            wrong.append(f"{family}: {name}: canary {canary.exists()}, peak {peaks.get(path.stem, 0):,} bytes")
        counts[family] = counts.get(family, 0) + 1
        path.unlink()
    print(
        f"{sum(counts.values())} attacks refused: {counts}; {len(peaks)} by a child, of at most {max(peaks.values()):,}"
        " bytes, all without torch"
    )
    assert not wrong, "\n".join(wrong)


def test_model_folders_refuse_every_attack(tmp_path):
    """The same files in place of model.safetensors, also where the folder's hash was forged to match."""
    canary, folder, count = tmp_path / "canary", tmp_path / "model", 0
    save_model(build_model(named_config("micro", vocab_size=50)), folder)
    good = json.loads((folder / "config.json").read_text())
    for family, name, _, content in cases(canary):
        (folder / "model.safetensors").write_bytes(content)
        for forged in (False, True):
            forgery = {"weights": {"model.safetensors": sha256_file(folder / "model.safetensors")}, "sha256": None}
            config = good | forgery if forged else good
            (folder / "config.json").write_text(json.dumps(config))
            try:
                load_model(folder)
            except CheckpointError as e:
                assert "\n" not in str(e), (family, name)
            except Exception as e:
                raise AssertionError(f"{family}: {name}: {type(e).__name__}: {e}") from e
            else:
                raise AssertionError(f"{family}: {name}: accepted")
            count += 1
    print(f"{count} model folders refused")
    assert not canary.exists()


def test_guard_stops_what_an_attack_would_do(tmp_path):
    """Were all else wrong: the child's audit hook."""
    program = """
import os, pickle, socket, subprocess, sys
from itera_lite.checkpoints.sandbox import guard
os.mkdir(sys.argv[1] + "/own")
guard(sys.argv[1] + "/own")
canary = sys.argv[1] + "/canary"
touch = ["touch", canary]
acts = [lambda: os.system(f"touch {canary}"), lambda: subprocess.run(touch), os.fork, lambda: os.kill(0, 9),
        socket.socket, lambda: os.posix_spawn("/usr/bin/touch", touch, {}), lambda: os.execv("/usr/bin/touch", touch),
        lambda: open(canary, "w"), lambda: os.open(canary, os.O_CREAT), lambda: os.symlink("/etc", canary),
        lambda: os.mkdir(canary), lambda: os.rename(sys.argv[1] + "/own", canary),
        lambda: pickle.loads(b"cposix\\nsystem\\n.")]
for act in acts:
    try: act()
    except PermissionError: print("stopped")
open(sys.argv[1] + "/own/file", "w").write("x")
"""
    command = [sys.executable, "-c", program, tmp_path]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.split() == ["stopped"] * 13
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_honest_files_come_through_within_bounds(tmp_path):
    tied = torch.randn(500, 400)
    honest = {f"w{n}": torch.randn(300, 400) for n in range(20)} | {
        "tied.a": tied,
        "tied.b": tied,
        "half": torch.randn(300, 100).half().t(),
        "scalar": torch.tensor(3),
    }
    for name, zipformat in (("zip", True), ("legacy", False)):
        path = tmp_path / f"{name}.pt"
        torch.save(
            {
                "model_state_dict": honest, "optimizer_state_dict": {"m": torch.ones(3)}, "config": {"a": [1, None]},
                "ratio": 1.69,
            },
            path, _use_new_zipfile_serialization=zipformat,
        )
        found = read_foreign(path)
        assert found.format == f"torch {name}" and found.config == {"a": [1, None]} and found.extra == {"ratio": 1.69}
        assert found.tensors.keys() == honest.keys() and found.tensors["tied.a"] is found.tensors["tied.b"]
        assert all(
            torch.equal(found.tensors[n], honest[n]) and found.tensors[n].dtype == honest[n].dtype for n in honest
        )
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.tensors.values())
        assert any("shares" in note for note in found.notes) and any(
            "optimizer_state_dict" in note for note in found.notes
        )
        size = path.stat().st_size
        folder = tmp_path / f"{name}-out"
        folder.mkdir()
        report = run_child(path, folder, 2 * size + SLACK_BYTES, 60)
        print(f"{name}: {(report['peak_bytes'] - report['baseline_bytes']) / size:.2f} times the file beyond torch")
        assert report["peak_bytes"] - report["baseline_bytes"] <= 2 * size


def test_dynamic_quantisation_and_configuration_objects(tmp_path):
    weight = torch.quantize_per_channel(
        torch.randn(4, 8), torch.rand(4) + 0.1, torch.zeros(4, dtype=torch.long), 0, torch.qint8
    )
    packed = OrderedDict(
        {
            "fc._packed_params.dtype": torch.qint8, "fc._packed_params._packed_params": (weight, None),
            "x": torch.ones(2, dtype=torch.bfloat16),
        }
    )
    torch.save(packed, tmp_path / "int8.pt")
    found = read_foreign(tmp_path / "int8.pt")
    assert found.tensors.keys() == {"fc.weight", "fc.weight_scale", "fc.weight_zero_point", "x"} and found.extra == {
        "fc._packed_params.dtype": "torch.qint8"
    }
    codes, scale, zero = (found.tensors[f"fc.weight{end}"] for end in ("", "_scale", "_zero_point"))
    assert torch.equal((codes - zero[:, None]).float() * scale[:, None], weight.dequantize())
    config = g("gone.module", "ModelConfig") + b")\x81" + state(("hidden_size", i(8)), ("name", u("x"))) + b"b"
    (tmp_path / "config.pt").write_bytes(zipped(p(state(("config", config), ("w", tensor(device="cuda:0"))))))
    found = read_foreign(tmp_path / "config.pt")
    assert found.config == {"hidden_size": 8, "name": "x"} and torch.equal(found.tensors["w"], torch.zeros(4))
    assert any("gone.module.ModelConfig" in note for note in found.notes)


@pytest.mark.parametrize("name", ["itera_lite_micro_distilled", "itera_lite_mixed_precision"])
def test_files_of_the_first_version_are_read(name):
    path = LEGACY / f"{name}.pt"
    if not path.exists():
        pytest.skip(f"{LEGACY} is not here: the file {name}.pt cannot be tried")
    found = read_foreign(path)
    assert found.format == "torch zip" and found.tensors["lm_head.weight"] is found.tensors["embedding.weight"]
    if name == "itera_lite_micro_distilled":
        assert (
            sum(
                t.numel() for n, t in found.tensors.items() if n != "lm_head.weight" and not n.endswith("expert_counts")
            )
            == 293_656
            and found.config is None
        )
    else:
        assert found.config["num_experts"] == 0 and {str(t.dtype) for t in found.tensors.values()} == {
            "torch.float16", "torch.float32",
        }


# Nobody else reads pickles

MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "pickletools",
}
CALLS = {
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.save", "pandas.read_pickle", "torch.serialization.load",
}
MAY = {  # room → what it may mention, and why
    "checkpoints/pickles": {"pickletools"},  # parses opcodes
    "checkpoints/sandbox": {"torch.load"},  # reads weights only, in the child
}
MAY_WRITE = {  # notebooks that make files to read: writing runs nothing
    "checkpoints/03_pickles", "checkpoints/03a_archives", "checkpoints/03b_sandbox", "checkpoints/03c_untrusted",
    "checkpoints/05_convert",
}


def mentions(source):
    """Readers (and writers) of pickles that a program names, by whatever name it imported them."""
    names, found = {}, set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found |= MODULES & {alias.name.split(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found |= MODULES & {(node.module or "").split(".")[0], alias.name} | CALLS & {
                    names[alias.asname or alias.name]
                }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            head, *rest = ast.unparse(node).split(".")
            full = ".".join([names.get(head, head), *rest])
            found |= {full} & CALLS
            found |= {"read_pickle"} & {full.split(".")[-1]}
        if isinstance(node, ast.Call):
            function, arguments = ast.unparse(node.func), [
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
            if function.split(".")[-1] in ("__import__", "import_module", "getattr", "resolve_name"):
                found |= {a for a in arguments if a.split(".")[0] in MODULES or function == "getattr" and a == "load"}
            found |= {
                "allow_pickle"
                for k in node.keywords
                if k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            }
            found |= {
                "weights_only"
                for k in node.keywords
                if k.arg == "weights_only" and not (isinstance(k.value, ast.Constant) and k.value.value is True)
            }
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads as x",
        "from torch import load",
        "import torch as t\nt.load('x')",
        "from torch import load as l\nl('x')",
        "import joblib.parallel",
        "import importlib\nimportlib.import_module('dill')",
        "__import__('marshal')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch\nreader = torch.load",
        "import torch\ngetattr(torch, 'load')",
        "def f():\n import shelve",
        "import pandas as pd\npd.read_pickle('x')",
        "from torch.serialization import load as l\nl('x')",
        "load(path, weights_only=False)",
    ],
)
def test_mentions_are_found(source):
    assert mentions(source)


def code_of(notebook):
    """The code cells of a notebook, without IPython's own lines (%magic, !shell)."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    lines = [line for c in cells for line in "".join(c["source"]).split("\n")]
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def test_nobody_else_reads_pickles():
    """Every module and every notebook, in whatever room, names no reader of pickles but those in MAY."""
    modules, notebooks = ROOT / "itera_lite", ROOT / "nbs"
    library = {path.relative_to(modules).with_suffix("").as_posix(): path for path in modules.rglob("*.py")}
    pages = {path.relative_to(notebooks).with_suffix("").as_posix(): path for path in notebooks.rglob("*.ipynb")}
    assert MAY.keys() <= library.keys() and MAY_WRITE <= pages.keys()
    wrong = {}
    for room, path in library.items():
        wrong[f"itera_lite/{room}"] = mentions(path.read_text()) - MAY.get(room, set())
    for room, path in pages.items():
        folder, _, name = room.rpartition("/")
        may = MAY.get(f"{folder}/{re.sub(r'^[0-9]+[a-z]?_', '', name)}", set())
        wrong[f"nbs/{room}"] = mentions(code_of(path)) - may - ({"torch.save"} if room in MAY_WRITE else set())
    assert not {where: found for where, found in wrong.items() if found}
    assert library["checkpoints/sandbox"].read_text().count("torch.load(") == 1
    assert "weights_only=True" in library["checkpoints/sandbox"].read_text()


def test_only_the_child_and_its_starter_know_the_sandbox():
    """Nobody else calls what loads a pickle: the sandbox's reading functions run in the child alone."""
    reading = {"main", "read_pickled", "load_planned", "plan_within"}
    for path in (ROOT / "itera_lite").rglob("*.py"):
        if path.stem == "sandbox":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == "sandbox":
                names = {alias.name for alias in node.names} & reading
                assert names <= ({"main"} if path.stem == "untrusted" else set()), f"{path.name}: {names}"
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func).split(".")[-1] not in reading - {"main"} | {"child_main"}, path.name
