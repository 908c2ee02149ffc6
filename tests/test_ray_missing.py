"""The package and its command line where Ray is not installed."""

from __future__ import annotations

import subprocess
import sys

from rlhf_fast import cli


def test_a_missing_ray_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "rlhf_fast.placement", raising=False)
    assert cli.main(["ray", "sft"]) == 2
    assert "ray needs the package 'ray': pip install 'rlhf-fast[ray]'" in capsys.readouterr().err


def test_importing_the_package_imports_nothing_of_ray():
    code = "import sys, rlhf_fast, rlhf_fast.cli, rlhf_fast.config; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
