"""Rows 1 to 22: what can be read and written of the host's files."""

import pytest

from attacks.harness import Attacker


@pytest.mark.threat(1, 2)
def test_host_accounts_and_homes_are_absent(attacker: Attacker) -> None:
    said = attacker.run("""
say(shadow=attempt(open, "/etc/shadow"), passwd=open("/etc/passwd").read(), root=os.listdir("/root"),
    home=os.listdir("/home"), root_dir=sorted(os.listdir("/")))
""").said
    assert said["shadow"] == "ENOENT"
    assert attacker.person.name == "root" or attacker.person.name not in said["passwd"]
    assert said["passwd"].splitlines()[0].startswith("student:")
    assert (said["root"], said["home"]) == ([], ["student"])
    assert not {"srv", "mnt", "media", "boot", "sys", "opt", "course"} & set(said["root_dir"])
