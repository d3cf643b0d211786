"""Canaries: secrets, sockets and files that a hostile notebook must not reach, and who counts whether it did.

Everything is planted in the demo's own temporary directory or on the loopback interface, and everything
is looked at from outside the sandbox. A canary that cannot sing proves nothing: `rehearse` reaches for
each socket once, as an attacker would, and fails if that goes unnoticed.
"""

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

TOKENS = ("environment", "submission", "hidden", "gradebook", "tutors", "home", "config")


class DeafCanary(RuntimeError):
    """A canary did not notice a connection that the demo itself made."""


@dataclass
class Ear:
    """A listening socket and how often somebody reached it."""

    name: str
    socket: socket.socket
    heard: int = 0

    def listen(self) -> None:
        """Count until the socket is closed."""
        while True:
            try:
                if self.socket.type == socket.SOCK_DGRAM:
                    self.socket.recv(1024)
                else:
                    self.socket.accept()[0].close()
            except OSError:
                return
            self.heard += 1


@dataclass
class Canaries:
    """What is planted for one run of the demo, and what hostile students are told about it."""

    root: Path
    marker: str = field(default_factory=lambda: f"nbga-{secrets.token_hex(4)}")
    tokens: dict[str, str] = field(
        default_factory=lambda: {name: f"canary-{name}-{secrets.token_hex(8)}" for name in TOKENS}
    )
    ears: dict[str, Ear] = field(default_factory=dict)

    @property
    def home_file(self) -> Path:
        """A private key in the instructor's home."""
        return self.root / "home" / ".ssh" / "id_demo"

    @property
    def target(self) -> Path:
        """A file of the instructor's that symlinks of hostile students point to."""
        return self.root / "home" / "lecture.txt"

    @property
    def tutors_file(self) -> Path:
        """A file beside the gradebook."""
        return self.root / "course" / "tutors.txt"

    def plant(self) -> None:
        """Write the files and the secrets into the copy of the course."""
        self.home_file.parent.mkdir(parents=True)
        self.home_file.write_text(f"{self.tokens['home']}\n")
        self.target.write_text("Lecture 1: nobody may change this file.\n")
        self.tutors_file.write_text(f"the tutors' password is {self.tokens['tutors']}\n")
        self._insert("course/nbgrader_config.py", "c = get_config()", f"# {self.tokens['config']}")
        hidden = f"hidden_canary = '{self.tokens['hidden']}'"
        begin = '"### BEGIN HIDDEN TESTS\\n",'
        self._insert("course/source/ps1/functions.ipynb", begin, f'"{hidden}\\n",')

    def _insert(self, name: str, after: str, line: str) -> None:
        path = self.root / name
        text = path.read_text()
        if after not in text:
            raise ValueError(f"{name} has no line {after!r} to plant a canary after")
        path.write_text(text.replace(after, f"{after}\n{line}", 1))

    def plant_in_submission(self, notebook: Path) -> None:
        """Put a token into a student's work, where other students' notebooks look for it."""
        content = nbformat.read(notebook, as_version=4)
        content.cells.append(nbformat.v4.new_markdown_cell(f"My own notes: {self.tokens['submission']}"))
        nbformat.write(content, notebook)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Open the sockets, try them, and count until the end of the block."""
        folder = os.open(self.root, os.O_RDONLY)
        kinds: dict[str, tuple[int, int, Any]] = {
            "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.marker}"),
            # through /proc, because a path of more than 107 bytes does not fit into an address
            "unix": (socket.AF_UNIX, socket.SOCK_STREAM, f"/proc/self/fd/{folder}/door"),
        }
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, folder)
            for name, (family, kind, address) in kinds.items():
                opened = stack.enter_context(socket.socket(family, kind))
                opened.bind(address)
                if kind == socket.SOCK_STREAM:
                    opened.listen(64)
                # close() alone does not wake a thread that waits in accept or recv
                stack.callback(_shut, opened)
                self.ears[name] = Ear(name, opened)
                threading.Thread(target=self.ears[name].listen, daemon=True).start()
            (self.root / "door").chmod(0o777)
            self.rehearse()
            yield

    def rehearse(self) -> None:
        """Reach each socket once, wait until that was counted, and start again at zero."""
        for ear in self.ears.values():
            with socket.socket(ear.socket.family, ear.socket.type) as probe:
                probe.connect(ear.socket.getsockname())
                if probe.type == socket.SOCK_DGRAM:
                    probe.send(b"rehearsal")
                for _ in range(200):
                    if ear.heard:
                        break
                    threading.Event().wait(0.01)
            if ear.heard != 1:
                raise DeafCanary(f"the {ear.name} canary heard {ear.heard} of 1 rehearsals")
            ear.heard = 0

    def told(self) -> dict[str, Any]:
        """What a well-informed attacker knows: where everything is, but no secret itself."""
        course = self.root / "course"
        read = {
            "home file": self.home_file,
            "file beside the gradebook": self.tutors_file,
            "gradebook.db": course / "gradebook.db",
            "nbgrader_config.py": course / "nbgrader_config.py",
            "source notebook": course / "source/ps1/functions.ipynb",
            "autograded notebook with its hidden tests": course / "autograded/mallory-reads/ps1/functions.ipynb",
            "submission of aino": course / "submitted/aino/ps1/functions.ipynb",
            "autograded notebook of aino": course / "autograded/aino/ps1/functions.ipynb",
        }
        return {
            "marker": self.marker,
            "pid": os.getpid(),
            "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
            "course": str(course),
            "submitted": str(course / "submitted"),
            "gradebook": str(course / "gradebook.db"),
            "target": str(self.target),
            "secret_name": self.root.name.rsplit("-", 1)[1],
            "read": {name: str(path) for name, path in read.items()},
            "tcp": self.ears["tcp"].socket.getsockname()[1],
            "udp": self.ears["udp"].socket.getsockname()[1],
            "abstract": self.marker,
            "unix": str(self.root / "door"),
        }

    def found(self, folders: list[Path]) -> dict[str, list[str]]:
        """For each token, the files below folders that hold it and must not.

        A submission's token belongs into its own student's files. The hidden tests belong into the source of
        the test cells; only `witness.tries` can tell whether student code read them.
        """
        result: dict[str, list[str]] = {name: [] for name in self.tokens}
        # released feedback is called by a hash, so a file of aino's own is known by its content
        released = [path.read_bytes() for path in (self.root / "course/feedback/aino").rglob("*.html")]
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            for name, token in self.tokens.items():
                allowed = name == "hidden" or (name == "submission" and ("aino" in path.parts or data in released))
                if not allowed and token.encode() in data:
                    result[name].append(str(path.relative_to(self.root)))
        return result


def _shut(opened: socket.socket) -> None:
    """Wake the thread that waits for this socket."""
    with contextlib.suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
