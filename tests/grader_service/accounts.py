"""Unix users and groups that exist for one test or one module, and code that runs as such a user."""

import contextlib
import grp
import os
import pwd
import secrets
import shutil
import traceback
from collections.abc import Callable, Iterator

import pytest

from attacks.harness import Stage, eventually
from campus import _account, _killed


class Accounts:
    """Makes users and groups whose names begin with a word of this object's own, and removes them at the end.

    The words that they are made from have at most eight letters.
    """

    def __init__(self, stage: Stage) -> None:
        word = secrets.token_hex(2)
        self.directory = stage.directory / f"accounts-{word}"
        # the stage removes users of such names at the end of the session, if this process cannot; 32 letters at most
        self._prefix = f"{stage._prefix}-{word}"
        self._users: list[str] = []
        self._groups: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls, stage: Stage) -> Iterator["Accounts"]:
        """`directory` belongs to root and everybody may enter it. Skips where no users can be made."""
        if os.geteuid() != 0:
            pytest.skip("only root can make Unix users")
        if missing := [
            name for name in ("useradd", "usermod", "userdel", "groupadd", "groupdel") if not shutil.which(name)
        ]:
            pytest.skip(f"no Unix users can be made without {', '.join(missing)}")
        accounts = cls(stage)
        accounts.directory.mkdir()
        accounts.directory.chmod(0o755)
        try:
            yield accounts
        finally:
            accounts.close()

    def name(self, word: str) -> str:
        """What a user or group is called really."""
        return self._prefix + word

    def group(self, word: str) -> int:
        """A new group; its gid."""
        _account("groupadd", self.name(word))
        self._groups.append(self.name(word))
        return grp.getgrnam(self.name(word)).gr_gid

    def user(self, word: str, primary: str, *others: str) -> pwd.struct_passwd:
        """A new user with a home that is closed to others. The groups are words that `group` was given."""
        home = self.directory / word
        options = ["--no-user-group", "--no-create-home", "--home-dir", str(home), "--shell", "/bin/sh"]
        more = ["--groups", ",".join(self.name(other) for other in others)] if others else []
        _account("useradd", *options, "--gid", self.name(primary), *more, self.name(word))
        self._users.append(self.name(word))
        entry = pwd.getpwnam(self.name(word))
        home.mkdir(mode=0o700)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        return entry

    def set_groups(self, word: str, *others: str) -> None:
        """Put a user into exactly these groups, beside the primary one."""
        _account("usermod", "--groups", ",".join(self.name(other) for other in others), self.name(word))

    def set_primary(self, word: str, group: str) -> None:
        """Give a user another primary group."""
        _account("usermod", "--gid", self.name(group), self.name(word))

    def remove(self, word: str) -> None:
        """End a user: processes first."""
        name = self.name(word)
        uid = pwd.getpwnam(name).pw_uid
        eventually(lambda: not _killed(uid), 20)
        _account("userdel", name)
        self._users.remove(name)

    def close(self) -> None:
        """Remove all that is left, whoever uses it."""
        for name in tuple(self._users):
            self.remove(name.removeprefix(self._prefix))
        for name in self._groups:
            _account("groupdel", name, check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


def run_as(entry: pwd.struct_passwd, code: Callable[[], str]) -> str:
    """What `code` returns in a child process of this user, or `ExceptionName: words` of what it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(os.getgrouplist(entry.pw_name, entry.pw_gid))
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            try:
                said = code()
            except Exception as error:  # noqa: BLE001
                said = f"{type(error).__name__}: {error}"
            os.write(writer, said.encode(errors="backslashreplace"))
        except BaseException:  # noqa: BLE001
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(child, 0)
    return said
