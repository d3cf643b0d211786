"""A distribution's kernel, from its packages, ready to boot: nothing is installed here.

Packages are fetched with `apt-get download` (the variable APT_CONFIG may point apt at another release's sources) or
named as files, unpacked with `dpkg-deb`, and an initramfs is made of a static busybox and the few modules that lead
to the root file system.
"""

import dataclasses
import lzma
import re
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

BUSYBOX = "busybox-static"
_MODULES = ("virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "crc32c_generic", "ext4")

_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod /modules/$module || $b echo "insmod $module failed"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro,access=client host /root || $b poweroff -f
for one in proc sys dev; do $b mount --move /$one /root/$one; done
exec $b switch_root /root /usr/bin/python3 -B @GUEST@
"""


class Unavailable(Exception):
    """What a virtual machine needs is not to be had here."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An unpacked kernel."""

    release: str
    image: Path
    modules: Path


def fetch(packages: Iterable[str], directory: Path) -> list[Path]:
    """Download packages of these names into `directory`, and return them and those that are files already."""
    found = [Path(name).resolve() for name in packages if "/" in name]
    names = [name for name in packages if "/" not in name]
    if names:
        before = set(directory.glob("*.deb"))
        done = subprocess.run(
            ["apt-get", "download", "-q", *names], cwd=directory, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise Unavailable(f"apt-get download {' '.join(names)}: {done.stderr.strip()[-300:]}")
        found += sorted(set(directory.glob("*.deb")) - before)
    return found


def kernel_packages(name: str) -> list[str]:
    """The packages with the kernel itself: what a meta-package depends on, what holds image and modules."""
    if "/" in name or "," in name:
        return name.split(",")
    names, waiting = [], [name]
    while waiting:
        one = waiting.pop()
        names.append(one)
        waiting += [other for other in _dependencies(one) if other not in names + waiting]
    return [one for one in names if re.search(r"\d\.\d+\.\d", one)]


def _dependencies(name: str) -> list[str]:
    done = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout:
        raise Unavailable(f"apt knows no kernel package {name}; run apt-get update first")
    return re.findall(r"^ +Depends: (linux-(?:image|modules|binary)-[\w.+-]+)$", done.stdout, re.MULTILINE)


def unpack(debs: Iterable[Path], directory: Path) -> Kernel:
    """The kernel that these packages hold."""
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", deb, directory], check=True)
    images = [path for pattern in ("boot/vmlinuz*", "usr/lib/modules/*/vmlinuz") for path in directory.glob(pattern)]
    modules = [path for pattern in ("lib/modules/*", "usr/lib/modules/*") for path in directory.glob(pattern)]
    if not images or not modules:
        raise Unavailable(f"no kernel with modules in {', '.join(deb.name for deb in debs)}")
    return Kernel(modules[0].name, images[0], modules[0])


def write_initramfs(kernel: Kernel, busybox: Path, guest: Path, file: Path) -> None:
    """What mounts the host's root file system, read-only, and starts `guest` in it as the first process."""
    modules = _load_order(kernel)
    order = "\n".join(modules) + "\n"
    entries = {
        "bin": None,
        "modules": None,
        "bin/busybox": busybox.read_bytes(),
        "modules/order": order.encode(),
        "init": _INIT.replace("@GUEST@", str(guest)).encode(),
        **{f"modules/{name}": content for name, content in modules.items()},
    }
    with file.open("wb") as archive:
        for number, (name, content) in enumerate(entries.items(), 1):
            archive.write(_cpio_entry(number, name, content))
        archive.write(_cpio_entry(0, "TRAILER!!!", b""))


def _cpio_entry(number: int, name: str, content: bytes | None) -> bytes:
    """One entry of the "new ASCII" format; None is a directory. cpio(5)"""
    mode = stat.S_IFDIR | 0o755 if content is None else stat.S_IFREG | 0o755
    content = content or b""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4)


def _load_order(kernel: Kernel) -> dict[str, bytes]:
    """The modules that are needed and not built in, uncompressed, each after those that it depends on."""
    files = {_plain(path.name): path for path in kernel.modules.glob("kernel/**/*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        path = files.get(_plain(name))
        if path is None or f"{_plain(name)}.ko" in loaded:
            return  # built in, as far as the boot will tell
        content = _uncompressed(path)
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in depends[1].decode().split(",") if depends else ():
            load(other)
        loaded[f"{_plain(name)}.ko"] = content

    for name in _MODULES:
        load(name)
    return loaded


def _plain(name: str) -> str:
    return name.split(".ko")[0].replace("-", "_")


def _uncompressed(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout
    return path.read_bytes()
